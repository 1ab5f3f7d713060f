"""The road: every stage of `fewstep distill`, as public commands that one could type.

    check -> memory -> text -> (controls) -> latents -> pairs -> kd -> dmd2 -> export -> scores -> report

Below `work` lie runs/student/kd, runs/student/dmd2, pairs/ and the record of each stage; the student is written to `out`, and
its scores and its report beside it. The demo (toyworld/demo/stages.py) takes the stages that make a student from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fewstep.data.folder.layout import CAPTIONS, IMAGES, VIDEOS
from fewstep.data.folder.samples import read_caption
from fewstep.data.folder.texts import opened
from fewstep.distill.facts import Facts
from fewstep.distill.stages import Command, Stage, launcher, with_own
from fewstep.inference.record import weights_stamp

SCORED = {  # who is scored, in the order of the table, which adds the network calls: guidance doubles those of a teacher
    "teacher": "teacher",
    "teacher_few": "teacher in few steps",
    "kd": "student after KD",
    "student": "student",
}
EXPORTED = {
    "diffusers": "a folder of diffusers",
    "pt-original": "a file under the names of the original code, which `fewstep generate` reads: diffusers has no class for it",
    "safetensors": "a file that `fewstep generate` reads: diffusers has no class for it",
}


def stages(facts: Facts) -> list[Stage]:
    """The stages of a request, in their order."""
    request, data = facts.request, str(facts.request.dataset)
    reads = partial(stamp_of, request.dataset)  # not of `check`, which would miss what the next stages make of a new clip
    return [
        Stage.of("check", "the data set is read once", ("fewstep", "check", "data", data), makes_nothing=True),
        Stage.of(
            "memory", "the memory that the training takes on this machine; nothing is loaded", _plan(facts), makes_nothing=True
        ),
        Stage(
            "text",
            "captions become embeddings",
            (tuple(_text(facts)),),
            advice="A text encoder that does not know the words of the captions can be replaced: --text-encoder FOLDER "
            "(`fewstep prepare words` trains a small one)",
            reads=reads,
        ),
        *(
            [Stage("controls", "the control is made from the clips", (tuple(_controls(facts)),))]
            if request.control in ("edge", "vis")  # of the clips; others come from files: fewstep prepare controls --from
            else []
        ),
        Stage.of("latents", "clips become latents of the video tokenizer", *_latents(facts)),
        *_trainings(facts),
        Stage.of("export", f"the student becomes {EXPORTED[facts.form_of_student]}", _export(facts)),
        Stage(
            "scores",
            "clips of the teacher and of the student, against the data set's",
            (tuple(_scores(facts)),),
            advice="The student is complete without them",
            is_optional=True,
        ),
        Stage.of("report", "one page: clips in step, scores, curves", _report(facts), is_optional=True),
    ]


def stamp_of(dataset: Path) -> str:
    """A hash of the names and sizes of the clips and of the captions; the same wherever the data set lies."""
    place = opened(dataset)
    files = [*place.files(VIDEOS).values(), *place.files(IMAGES).values()]
    facts = [(path.name, path.stat().st_size) for path in files]
    captions = [(stem, read_caption(path)) for stem, path in place.files(CAPTIONS).items()]
    return hashlib.sha256(repr((facts, captions)).encode()).hexdigest()[:16]


def run_of(facts: Facts, training: str) -> str:
    """The run folder of a training."""
    return str(facts.request.work_dir / "runs" / facts.request.name / training)


def score_files(facts: Facts) -> dict[str, Path]:
    """The files of the scores by who is scored."""
    trainings = facts.request.trainings
    names = [name for name in SCORED if name != "kd" or len(trainings) > 1]
    return {name: facts.request.out / "scores" / f"{name}.json" for name in names}


def rivals(facts: Facts) -> list[str]:
    """With whom the student is compared: its teacher in as many steps, and the student that DMD2 began with."""
    return ["teacher_few", *(["kd"] if "kd" in score_files(facts) else [])]


# ---- the commands ----------------------------------------------------------------------------------------------------


def _plan(facts: Facts) -> Command:
    shape = "x".join(map(str, facts.latent_shape))
    text = () if facts.text.dim is None else (f"text={facts.text.max_tokens}x{facts.text.dim}",)
    words = [word for word in _recipe(facts, facts.request.trainings[-1]) if not word.startswith("networks.student.init=")]
    return ("fewstep", "plan", *words, f"shape={shape}", *text, f"gpus={facts.request.processes}", "gpu=here")


def _text(facts: Facts) -> Iterator[Command]:
    request = facts.request
    for folder in _sets(facts):
        negative = () if facts.negative == "zeros" else ("--negative-prompt", "")
        prompt = () if request.prompt is None else ("--prompt", request.prompt)
        yield ("fewstep", "prepare", "text", str(folder), "--text-encoder", facts.text_encoder, *negative, *prompt)


def _sets(facts: Facts) -> tuple[Path, ...]:
    """The data set, and the one whose prompts are scored."""
    request = facts.request
    return (request.dataset,) if request.heldout is None else (request.dataset, request.heldout)


def _controls(facts: Facts) -> Iterator[Command]:
    for folder in _sets(facts):
        yield ("fewstep", "prepare", "controls", str(folder), "--type", str(facts.request.control))


def _latents(facts: Facts) -> Iterator[Command]:
    request, clips = facts.request, facts.clips
    scale = facts.scale
    words = () if scale == 1.0 else ("--scale", f"{scale:g}")
    frames = str(facts.num_frames)
    words += ("--num-frames", frames, "--start-frame-interval", frames) if facts.is_window else ()
    if clips.sizes != (facts.size,):
        words += ("--height", str(facts.size[0]), "--width", str(facts.size[1]), "--resize", "crop")
    words += () if request.control is None else ("--control", request.control)
    yield ("fewstep", "prepare", "latents", str(request.dataset), "--codec", facts.codec, *words)


def _trainings(facts: Facts) -> Iterator[Stage]:
    trainings = facts.request.trainings
    if "kd" in trainings:
        calls = facts.sampler.num_calls
        about = f"the teacher makes clips from noise, {calls} network calls each"
        reads = partial(weights_stamp, facts.request.teacher)
        yield Stage.of("pairs", about, _pairs(facts), resumes=(facts.request.work_dir / "pairs",), reads=reads)
        yield _training(facts, "kd", "knowledge distillation: the student regresses onto the teacher's clips")
    if "dmd2" in trainings:
        yield _training(facts, "dmd2", "distribution matching: the student learns from the difference of two scores")


def _training(facts: Facts, name: str, about: str) -> Stage:
    reads = partial(weights_stamp, facts.request.teacher)
    return Stage.of(name, about, _train(facts, name), resumes=(Path(run_of(facts, name)),), reads=reads)


def _pairs(facts: Facts) -> Command:
    request = facts.request
    words = ("--num", str(facts.num_pairs), "--guidance", f"{facts.sampler.guidance:g}", *_conditions(facts))
    words += ("--path-times", str(request.steps), "--student-shift", f"{facts.shift:g}") if request.steps > 1 else ()
    words += () if request.teacher_steps is None else ("--steps", str(request.teacher_steps))
    words += () if facts.codec == facts.teacher.base else ("--codec", facts.codec)
    words += () if request.precision is None else ("--precision", request.precision)
    where = (str(request.dataset), "--out", str(request.work_dir / "pairs"))
    return (*launcher(request.processes), "pairs", request.teacher, *where, *words)


def _train(facts: Facts, training: str) -> Command:
    iters = facts.iters(training)
    sizes = (f"trainer.max_iter={iters}", f"checkpoint.save_iter={max(1, min(500, iters // 4))}")
    sizes += (f"trainer.log_every={max(1, min(50, iters // 10))}",)
    return (_root(facts), *launcher(facts.request.processes), "train", *_recipe(facts, training, *sizes))


def _recipe(facts: Facts, training: str, *more: str) -> tuple[str, ...]:
    """The words of a training; those of the user replace ours."""
    request = facts.request
    words = (f"experiment={training}", f"teacher={request.teacher}", f"steps={request.steps}")
    words += () if request.shift is None else (f"shift={request.shift:g}",)
    words += () if request.control is None else (f"control={request.control}",)
    words += (f"rank={request.rank}",) if request.rank else ()
    if training == "dmd2":
        words += (f"guidance={facts.sampler.guidance:g}",)
        words += (f"networks.student.init={run_of(facts, 'kd')}",) if "kd" in request.trainings else ()
        words += () if request.negative is None else (f"data.negative={facts.negative}",)
    data = str(request.work_dir / "pairs") if training == "kd" else str(request.dataset)
    words += (f"data.dataset_dir={data}", "job.project=runs", f"job.group={request.name}", f"job.name={training}")
    if facts.text != facts.teacher.text:
        words += (f"data.max_tokens={facts.text.max_tokens}", f"data.mask_text={str(facts.text.uses_mask).lower()}")
    words += () if facts.codec == facts.teacher.base else (f"preview.codec={facts.codec}",)
    words += () if request.precision is None else (f"trainer.precision={request.precision}",)
    return with_own((*words, *more), request.settings_of(training))


def _export(facts: Facts) -> Command:
    request, base = facts.request, facts.teacher.base
    where: tuple[str, ...] = ("--out", str(request.out), "--format", facts.form_of_student)
    if facts.form_of_student == "diffusers":
        where += () if base is None else ("--base", base)
        where += () if facts.codec == base else ("--codec", facts.codec)
        where += () if facts.text_encoder == base else ("--text-encoder", facts.text_encoder)
    return (_root(facts), "fewstep", "export", run_of(facts, request.trainings[-1]), *where)


def _scores(facts: Facts) -> Iterator[Command]:
    request = facts.request
    prompts = str(request.heldout or request.dataset)
    common = ("--prompts", prompts, "--real", str(request.dataset), "--num", str(facts.num_eval), "--sets", "1")
    shape = ("--num-frames", str(facts.num_frames), "--height", str(facts.size[0]), "--width", str(facts.size[1]))
    codec = () if facts.codec == facts.teacher.base else ("--codec", facts.codec)
    few = ("--steps", str(request.steps), "--guidance", f"{facts.sampler.guidance:g}")
    many = ("--guidance", few[-1]) if request.teacher_steps is None else ("--steps", str(request.teacher_steps), *few[2:])
    what = {
        "teacher": (request.teacher, *codec, *many),
        "teacher_few": (request.teacher, *codec, *few),
        "kd": (run_of(facts, "kd"), "--codec", facts.codec),
        "student": (str(request.out), *(() if facts.form_of_student == "diffusers" else ("--codec", facts.codec))),
    }
    for name, file in score_files(facts).items():
        yield ("fewstep", "evaluate", *what[name], *common, *shape, *_conditions(facts), "--out", str(file))


def _report(facts: Facts) -> Command:
    request = facts.request
    runs = (run_of(facts, training) for training in request.trainings)
    title = f"{Path(request.teacher).name} in {request.steps} steps"
    out = ("--out", str(request.out / "report.html"), "--title", title)
    says = [word for rival in rivals(facts) for word in ("--verdict", f"student:{rival}")]
    says += [word for text in facts.warnings for word in ("--warning", text)]
    return ("fewstep", "report", *map(str, score_files(facts).values()), *runs, *out, *says)


def _conditions(facts: Facts) -> tuple[str, ...]:
    """What a network receives besides noise, in the options of `pairs` and `evaluate`."""
    text, control = facts.text, facts.request.control
    words = ("--max-tokens", str(text.max_tokens), *(("--mask-text",) if text.uses_mask else ()))
    return (*words, "--negative", facts.negative, *(() if control is None else ("--control", control)))


def _root(facts: Facts) -> str:
    return f"OUTPUT_ROOT={facts.request.work_dir}"
