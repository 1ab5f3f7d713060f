"""What `fewstep distill` does: reads the facts, prints or runs the stages, judges the student."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.distill import cost
from fewstep.distill.facts import Facts, facts_of
from fewstep.distill.request import DistillRequest
from fewstep.distill.road import SCORED, rivals, score_files, stages
from fewstep.distill.stages import Stage, claim, print_commands, run
from fewstep.errors import UserError
from fewstep.evaluation.verdict import sentences, table, verdicts
from fewstep.files import lock, write_json

AGAIN = "fewstep distill"


def distill(request: DistillRequest, dryrun: bool = False) -> None:
    """Runs what has not run yet. Raises UserError if a command fails, and with `strict` for a student that is worse."""
    facts = facts_of(request)
    road = stages(facts)
    print(_about(facts))
    if dryrun:
        _print(facts, road)
        return
    with lock(request.work_dir / ".lock"):
        claim(road, request.work_dir)
        about = {"teacher": request.teacher, "dataset": str(request.dataset)}
        write_json(request.work_dir / "distill.json", about, indent=None)
        for order, stage in enumerate(road):
            run(stage, request.work_dir, order, again=AGAIN)
    _judge(facts)


def _about(facts: Facts) -> str:
    request, clips, sampler = facts.request, facts.clips, facts.sampler
    windows = f"; the shortest has {clips.frames} frames, all are cut into windows" if facts.is_window else ""
    resized = "" if clips.sizes == (facts.size,) else "; all are resized and cropped"
    times = ", ".join(f"{time:.4g}" for time in facts.teacher.times(request.steps, request.shift))
    return (
        f"teacher   {request.teacher}: {sampler.solver}, {sampler.num_steps} steps, guidance {sampler.guidance:g}, "
        f"{sampler.num_calls} network calls for a clip\n"
        f"clips     {request.dataset}: {clips.num}{windows}{resized}\n"
        f"trained   on {facts.num_frames} frames of {facts.size[0]} x {facts.size[1]} pixels, latents "
        f"{' x '.join(map(str, facts.latent_shape))}\n"
        f"student   {request.out}: {request.steps} steps at {times}; {request.method}"
        f"{f', adapters of rank {request.rank}' if request.rank else ''}"
        + "".join(f"\nwarning   {text}" for text in facts.warnings)
    )


def _print(facts: Facts, road: Sequence[Stage]) -> None:
    print_commands(road)
    rate = cost.speed(facts, facts.request.work_dir)
    print(f"\n{cost.table(facts, rate)}")
    if rate is None:
        print("hours: with --calls-per-s, or once the pairs of this distillation are there")
    print("dry run: nothing was written")


def _judge(facts: Facts) -> None:
    """Prints the scores, and where the student is worse than its teacher in few calls. The page has the same sentences."""
    request, files = facts.request, score_files(facts)
    print(f"\nthe student: {request.out}")
    if not all(path.is_file() for path in files.values()):
        print("its scores are missing: the same command tries that stage again")
        return
    print(table(files, SCORED))
    report = request.out / "report.html"
    if report.is_file():
        print(f"the report: {report}")
    for text in facts.warnings:
        print(f"warning: {text}")
    scores = {rival: verdicts(files["student"], files[rival]) for rival in rivals(facts)}
    for group in scores.values():
        print("\n".join(sentences(group)))
    worse = [one for group in scores.values() for one in group if one.is_teacher and one.outcome == "worse"]
    if request.strict and worse:
        raise UserError(f"the student is worse than {worse[0].whose}, which --strict does not accept; see above")
