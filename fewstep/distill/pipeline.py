"""Causal students in stages: what `fewstep pipeline NAME` does. Each stage is public commands that one could type.

Below `work` lie pairs/, runs/, bridge/, scores/ and the record of each stage; the student is written to `out`. A gate (a stage
whose name ends in _scores) compares the student with that of the gate before it; where it misses a bound of the user's, no
further stage runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from fewstep.distill.chains import AGAIN, PipelineRequest, Training
from fewstep.distill.stages import Command, Stage, claim, launcher, marker_of, print_commands, run, with_own
from fewstep.errors import UserError
from fewstep.evaluation.score_files import read_scores
from fewstep.evaluation.verdict import sentences, table, verdicts
from fewstep.files import lock
from fewstep.inference.teacher import Teacher, teacher_at


def pipeline(request: PipelineRequest, dryrun: bool = False) -> None:
    """Runs what has not run yet. Raises UserError where a command fails or a gate is missed."""
    road = stages(request, teacher_at(request.address))
    assert [stage.name for stage in road] == list(request.chain.stages)
    if dryrun:
        print_commands(road)
        print("\ndry run: nothing was written")
        return
    with lock(request.work / ".lock"):
        claim(road, request.work, request.only)
        for order, stage in enumerate(road):
            if request.only and stage.name not in request.only:
                continue
            run(stage, request.work, order, again=AGAIN)
            if stage.name in _gates(request):
                _judge(request, stage.name)
    print(f"\nthe student: {request.out}" if (request.out / "student.json").is_file() else f"\ndone so far: {request.work}")


def stages(request: PipelineRequest, teacher: Teacher) -> list[Stage]:
    """The stages of a request, in their order."""
    trainings = request.chain.trainings
    out = list(_data(request))
    for number, training in enumerate(trainings):
        resumes = (Path(_run_of(request, training)),)
        out.append(Stage.of(training.name, training.about, _train(request, number), resumes=resumes))
        if not training.is_scored:
            continue
        about = "the gate: the student's clips against those of the data"
        out.append(Stage.of(f"{training.name}_scores", about, _scores(request, training, teacher)))
        if training is trainings[-1]:
            out.append(Stage.of("export", "the student with its card", _export(request, "export", training, request.out)))
        else:
            about = "the student's weights as a file: what the next training begins with"
            out.append(Stage.of("bridge", about, _export(request, "bridge", training, _bridge(request))))
    return [*out, Stage.of("report", "one page: scores, curves, clips", _report(request), is_optional=True)]


# ---- the commands ----------------------------------------------------------------------------------------------------


def _data(request: PipelineRequest) -> Iterator[Stage]:
    data, teacher = str(request.data), request.address
    if request.chain.pairs is not None:
        words = (
            *launcher(request.processes),
            "pairs",
            teacher,
            "--prompts",
            str(request.prompts),
            "--out",
            data,
            *request.chain.pairs,
        )
        about = "ODE pairs: the teacher makes clips of the prompts, and states on the way are kept"
        yield Stage.of("pairs", about, _with_options(request, "pairs", *words), resumes=(request.data,))
        return
    text = _with_options(request, "text", "fewstep", "prepare", "text", data, "--text-encoder", teacher)
    yield Stage.of("text", "captions become embeddings", text)
    latents = _with_options(request, "latents", "fewstep", "prepare", "latents", data, "--codec", teacher)
    yield Stage.of("latents", "clips become latents of the video tokenizer", latents)


def _train(request: PipelineRequest, number: int) -> Command:
    chain = request.chain
    training = chain.trainings[number]
    words = [f"experiment={training.recipe}"]
    if not training.recipe.startswith("toy_") and training.begins != "teacher":
        words.append(f"teacher={request.address}")
    if number and training.begins:
        before = chain.trainings[number - 1]
        source = f"{_bridge(request)}/student.safetensors" if before.is_scored else _run_of(request, before)
        words.append(f"{training.begins}={source}")
    if training.begins not in ("teacher", "networks.teacher_init"):  # those have the chunks of the causal teacher
        own = {"chunk": request.chunk, "span": request.span}
        words += [f"networks.student.causal.{key}={value}" for key, value in own.items() if value is not None]
    words += [f"data.dataset_dir={request.data}", *training.words]
    words += ["job.project=runs", "job.group=causal", f"job.name={training.name}", "job.after=[]"]
    words = with_own(words, request.settings_of(training.name))
    return (f"OUTPUT_ROOT={request.work}", *launcher(request.processes), "train", *words)


def _scores(request: PipelineRequest, training: Training, teacher: Teacher) -> Command:
    data, address = str(request.data), request.address
    out = str(_score_file(request, f"{training.name}_scores"))
    words = ("fewstep", "evaluate", _run_of(request, training), "--codec", address, "--prompts", data, "--real", data)
    words += ("--num", str(request.num_eval), "--sets", "1", "--max-tokens", str(teacher.text.max_tokens))
    words += ("--mask-text",) if teacher.text.uses_mask else ()
    return _with_options(request, "scores", *words, "--out", out)


def _export(request: PipelineRequest, stage: str, training: Training, out: Path) -> Command:
    return _with_options(request, stage, "fewstep", "export", _run_of(request, training), "--out", str(out))


def _report(request: PipelineRequest) -> Command:
    files = [str(_score_file(request, name)) for name in _gates(request)]
    runs = [_run_of(request, training) for training in request.chain.trainings]
    page = ("--out", str(request.work / "report.html"), "--title", f"{request.name}: {Path(request.address).name}")
    names = [name.removesuffix("_scores") for name in _gates(request)]
    says = [word for before, name in pairwise(names) for word in ("--verdict", f"{name}:{before}")]
    return ("fewstep", "report", *files, *runs, *page, *says)


def _with_options(request: PipelineRequest, stage: str, *command: str) -> Command:
    """The command with the user's STAGE.OPTION=VALUE in the place of its own; STAGE.OPTION is an option without a value."""
    words = list(command)
    for setting in request.settings_of(stage):
        name, equals, value = setting.partition("=")
        option = f"--{name.replace('_', '-')}"
        if equals and option in words:
            words[words.index(option) + 1] = value
        elif option not in words:
            words += [option, value] if equals else [option]
    return tuple(words)


def _run_of(request: PipelineRequest, training: Training) -> str:
    return str(request.work / "runs" / "causal" / training.name)


def _bridge(request: PipelineRequest) -> Path:
    return request.work / "bridge"


# ---- gates -----------------------------------------------------------------------------------------------------------


def _gates(request: PipelineRequest) -> list[str]:
    return [f"{training.name}_scores" for training in request.chain.trainings if training.is_scored]


def _score_file(request: PipelineRequest, gate_name: str) -> Path:
    return request.work / "scores" / f"{gate_name.removesuffix('_scores')}.json"


def _judge(request: PipelineRequest, name: str) -> None:
    """Raises UserError where a bound is missed, or where the student is worse than at the gate before."""
    names = _gates(request)
    until = names[: names.index(name) + 1]
    files = {gate_name: _score_file(request, gate_name) for gate_name in until}
    print(table(files, {gate_name: gate_name.removesuffix("_scores") for gate_name in until}))
    again = f"Train longer, and remove {marker_of(request.work, name)}; or go on from here by --only"
    missed = list(_missed(request.bounds, files[name]))
    if missed:
        raise UserError(f"{name}: {'; '.join(missed)}. {again}")
    if len(until) > 1:
        print("\n".join(sentences(verdicts(files[name], files[until[-2]]))))


def _missed(bounds: Mapping[str, float], file: Path) -> Iterator[str]:
    record = read_scores(file)
    better = {score["name"]: score["better"] for score in record["legend"]}
    for name, bound in bounds.items():
        if name not in better:
            raise UserError(f"--bound {name}: is no score of {file}; it has {', '.join(better)}")
        value = record["scores"][name]["value"] if name in record["scores"] else None
        if value is None or (value > bound if better[name] == "lower" else value < bound):
            size = "missing" if value is None else f"{value:.4g}"
            yield f"{name} is {size}, and its bound is {bound:g} ({better[name]} is better)"
