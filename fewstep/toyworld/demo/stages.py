"""The stages of the demo: each is public commands, printed before they run; finished ones are not run again.

    world  ->  text  ->  latents  ->  teacher's pairs  ->  KD  ->  DMD2  ->  export  ->  plain diffusers  ->  scores  ->  report

From text to export they are the stages of `fewstep distill` for a student of four steps and one of one step (distill/road.py),
side by side, with pairs that both share. With --method, before the report: the training of each further method, and the scores
of its student, of KD's and of DMD2's four-step student at 1, 2, 4, 8 and 16 calls.

Each command has one thread: on two cores two lanes are faster than one command on two threads. The lanes are cut to end
together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import fewstep
from fewstep.distill import road
from fewstep.distill.facts import Facts, facts_of
from fewstep.distill.request import DistillRequest
from fewstep.distill.stages import Command, Stage
from fewstep.toyworld.recipes import GUIDANCE, STUDENT_SHIFT
from fewstep.toyworld.train_tokenizer import PERCEPTUAL, tokenizer

TOY = Path(os.path.relpath(fewstep.TOY))  # short in the commands one reads
Size = Literal["quick", "default", "long"]
IMPORTS = "fewstep.toyworld.demo.imports"
AGAIN = "Remove it, and run fewstep demo again"  # advice for a file of the demo that cannot be read
SERIES = {"world": 7_400_000, "heldout": 7_400_001, "real": 7_400_002, "train": 11}  # no clip is in two of them


METHODS = {"rcm": "rCM", "scm": "sCM", "flow_map": "flow map"}  # of --method, with their titles
TRAININGS = {"rcm": ("rcm",), "scm": ("scm",), "flow_map": ("flow_map", "flow_map_on_policy")}  # runs, of recipes toy_NAME
CALLS = (1, 2, 4, 8, 16)  # at which their students are scored, and those of KD and DMD2


@dataclass(frozen=True)
class Learning:
    """How long a student learns. A few hundred iterations go further in small batches and long steps."""

    iters: int
    batch_size: int = 32
    more: tuple[str, ...] = ()  # settings


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    num_world: int  # prompts for DMD2, and the first of them for the pairs
    num_pairs: int
    num_real: int  # clips that everything is compared with
    num_eval: int  # clips in an evaluation set
    sets: int
    kd: tuple[Learning, Learning]  # of four steps and of one
    dmd2: tuple[Learning, Learning]  # the same; one step is asked less often: as many iterations as take the same time
    methods: Mapping[str, Sequence[Learning]]  # of --method: of each of its TRAININGS
    num_train: int = 24_000  # clips of --from-scratch; its iterations are the recipes' own, or as many as this
    scratch_iters: int | None = None


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        *(256, 128, 512, 128, 1),
        kd=(Learning(60, 16), Learning(60, 16)),
        dmd2=(Learning(60, 16), Learning(60, 16)),
        methods={method: [Learning(20, 16)] * len(names) for method, names in TRAININGS.items()},
        num_train=256,
        scratch_iters=40,
    ),
    "default": Plan(
        *(1024, 1024, 2048, 512, 3),
        kd=(Learning(250), Learning(250)),
        dmd2=(Learning(290), Learning(670, 16, ("method.guidance=3", "optim.lr=3e-4", "critic_optim.lr=6e-4"))),
        methods={"rcm": [Learning(200)], "scm": [Learning(200)], "flow_map": [Learning(700), Learning(480)]},
    ),
    "long": Plan(
        *(3072, 3072, 2048, 512, 3),
        kd=(Learning(800), Learning(800)),
        dmd2=(Learning(1700), Learning(2300)),
        methods={"rcm": [Learning(1200)], "scm": [Learning(1200)], "flow_map": [Learning(4000), Learning(1200)]},
    ),
}
STEPS = 35  # of the teacher's solver
STUDENTS = {"4step": 4, "1step": 1}
FEW = {"4step": "teacher_4calls", "1step": "teacher_1call"}  # what a student has to beat
TITLES = {
    "real": "real clips",
    "tokenizer": "tokenizer",
    "teacher": f"teacher, {STEPS} steps",
    "teacher_4calls": "teacher, 4 calls",
    "teacher_1call": "teacher, 1 call",
    "4step": "student, 4 steps",
    "1step": "student, 1 step",
}
# Settings of the trainings in which the toy world differs from the recipes of any teacher. With them each training is that of
# toy_kd_4step, toy_kd_1step, toy_dmd2_4step or toy_dmd2_1step (tests/toyworld/test_demo_settings.py).
COMMON = ("ema.profile=constant", "ema.beta=0.98", "optim.schedule=cosine", "trainer.num_threads=1")
COMMON += ("health.every=none", "preview=none")  # the demo looks at its students in its last stages
TEXT = ("--max-tokens", "40", "--mask-text")  # of the toy world's captions, for a network
KD = (*COMMON, "optim.warmup_iters=20")
DMD2 = (*COMMON, "optim.warmup_iters=10", "method.student_update_freq=2", "method.times.shift=1")


def stages(out: Path, size: Size, from_scratch: bool, methods: Sequence[str] = ()) -> Iterator[Stage]:
    """All stages. The world is rendered when the first of `students` is asked for: their commands follow from it."""
    toy = str(out / "toy" if from_scratch else TOY)
    yield from beginning(out, size, toy if from_scratch else None)
    yield from students(out, size, facts_of(request(out, size, toy, "4step")), methods)


def request(out: Path, size: Size, toy: str, student: str) -> DistillRequest:
    """What `fewstep distill` is asked for to make this student."""
    plan, number = PLANS[size], list(STUDENTS).index(student)
    kd, dmd2 = plan.kd[number], plan.dmd2[number]
    settings = [*_settings("kd", KD, kd), *_settings("dmd2", DMD2, dmd2), f"kd.data.dataset_dir={out / 'pairs'}"]
    return DistillRequest(
        toy, out / "world", out / "students" / student, STUDENTS[student], guidance=GUIDANCE, negative="zeros",
        shift=STUDENT_SHIFT, teacher_steps=STEPS, num_pairs=plan.num_pairs, kd_iters=kd.iters, iters=dmd2.iters,
        heldout=out / "heldout", num_eval=plan.num_eval, work=out, name=student, settings=tuple(settings),
    )  # fmt: skip


def _settings(training: str, settings: Sequence[str], much: Learning) -> list[str]:
    every = max(1, min(640 // much.batch_size, much.iters // 4))
    sizes = (f"trainer.batch_size={much.batch_size}", f"trainer.log_every={every}")
    sizes += (f"checkpoint.save_iter={min(much.iters, 200)}",)
    return [f"{training}.{word}" for word in (*settings, *much.more, *sizes)]


def beginning(out: Path, size: Size, toy: str | None) -> list[Stage]:
    """The stages before the road of a student. toy: where the stack is to be trained; None: the shipped one is taken."""
    plan = PLANS[size]

    def render(name: str, num: int, *only: str) -> Command:
        extra = ("--only", ",".join(only)) if only else ()
        where = ("--out", str(out / name), "--num", str(num), "--seed", str(SERIES[name]), "--workers", "1")
        return ("fewstep", "prepare", "toyworld", *where, *extra)

    return [
        *(_scratch(out, toy, plan) if toy is not None else ()),
        Stage(
            "world",
            "a small world is rendered: prompts to learn from, and clips nobody learns from",
            (
                (
                    render("heldout", plan.num_eval, "videos", "metas"),
                    render("world", plan.num_world, "videos", "metas", "edge"),
                ),
                (render("real", plan.num_real, "videos", "metas"),),
            ),
        ),
    ]


def students(out: Path, size: Size, facts: Facts, methods: Sequence[str] = ()) -> list[Stage]:
    """The stages of `fewstep distill` for both students, side by side, and what the demo adds: more scores, samples, its page.

    facts: of the request for the student of four steps.
    """
    plan, toy = PLANS[size], facts.request.teacher
    heldout = out / "heldout"
    four = {stage.name: stage for stage in road.stages(facts)}
    one = {stage.name: stage for stage in road.stages(replace(facts, request=request(out, size, toy, "1step")))}

    score = partial(evaluation, out, plan)

    def few(name: str, calls: int) -> Command:
        return score(name, toy, "--calls", str(calls), "--guidance", str(GUIDANCE))

    def sample(name: str) -> Command:
        alone = os.path.relpath(Path(__file__).with_name("plain_diffusers.py"))
        return (sys.executable, alone, str(out / "students" / name), str(heldout / "metas"), str(out / "samples" / name))

    def method(name: str) -> list[Stage]:
        at = curve(name)
        scored = Stage(f"curve_{name}", f"the {METHODS[name]} student at {CALLS} calls", (at[:2], at[2:]))
        training = tuple(trained(out, name, plan.methods[name], toy))
        about = f"{METHODS[name]}: a further student"
        return [Stage(name, about, (training,), resumes=tuple(runs_of(out, name))), scored]

    def curve(name: str) -> tuple[Command, ...]:
        run = runs_of(out, name)[-1]
        return tuple(score(f"{name}_{num}calls", str(run), "--codec", toy, "--calls", str(num)) for num in CALLS)

    further = [stage for name in methods for stage in method(name)]
    if methods:
        further.insert(
            0, Stage("curves", f"the four-step students of KD and DMD2 at {CALLS} calls", (curve("kd"), curve("dmd2")))
        )
    exports = [(*stage.lanes[0], sample(name)) for name, stage in (("4step", four["export"]), ("1step", one["export"]))]
    text, latents, pairs = four["text"], four["latents"], four["pairs"]
    page = (sys.executable, "-m", "fewstep.toyworld.demo.page", str(out), "--size", size)
    page += ("--toy", toy) if toy != str(TOY) else ()
    page += ("--methods", ",".join(methods)) if methods else ()
    return [
        replace(text, lanes=tuple((command,) for lane in text.lanes for command in lane)),
        replace(latents, lanes=(*latents.lanes, (score("real", str(heldout)),))),
        replace(pairs, lanes=tuple((shared(pairs.lanes[0][0], rank),) for rank in range(2))),
        *(_both(four[name], one[name]) for name in ("kd", "dmd2")),
        Stage("export", f"{four['export'].about}, and plain diffusers, without fewstep, samples it", tuple(exports)),
        Stage(
            "scores",
            "scores of the students; of their teacher, by its pairs and by the best it can do with few network calls; and of "
            "what a student could at best be: real clips through the tokenizer",
            (
                (few("teacher_4calls", 4), few("teacher_1call", 1)),
                (
                    *(score(name, str(out / "students" / name)) for name in STUDENTS),
                    score("teacher", str(out / "pairs")),
                    score("tokenizer", f"codec:{toy}"),
                ),
            ),
        ),
        *further,
        Stage("_".join(("report", *methods)), "one page to look at", ((page,),), resumes=tuple(kept_for_the_page(out))),
    ]


def _both(one: Stage, other: Stage) -> Stage:
    """Two stages side by side."""
    return replace(one, lanes=(*one.lanes, *other.lanes), resumes=(*one.resumes, *other.resumes))


def kept_for_the_page(out: Path) -> list[Path]:
    """What the page measures once, of the students that are there then: their speed; and the teacher's clips."""
    return [out / "scores" / "speed.json", out / "scores" / "teacher_shown"]


def runs_of(out: Path, student: str) -> list[Path]:
    """The trainings of a student that is scored at several numbers of calls; the last makes the student."""
    if student in ("kd", "dmd2"):
        return [out / "runs" / "4step" / student]
    return [out / "runs" / "methods" / name for name in TRAININGS[student]]


def trained(out: Path, method: str, much: Sequence[Learning], toy: str) -> Iterator[Command]:
    """The trainings of a further method, each from the one before; all but the flow map begin with KD's student."""
    other = (f"networks.teacher.pretrained={toy}",) if toy != str(TOY) else ()
    other += (f"networks.student.network.pretrained={toy}",) if toy != str(TOY) else ()
    before = None if method == "flow_map" else runs_of(out, "kd")[-1]
    for run, learning in zip(runs_of(out, method), much, strict=True):
        start = () if before is None else (f"networks.student.init={before}",)
        job = (*start, "job.project=runs", "job.group=methods", f"job.name={run.name}", "job.after=[]")
        sizes = (f"trainer.max_iter={learning.iters}", f"trainer.batch_size={learning.batch_size}")
        words = (*job, *learning.more, *sizes, *other)
        yield (f"OUTPUT_ROOT={out}", "fewstep", "train", f"experiment=toy_{run.name}", *words)
        before = run


def evaluation(out: Path, plan: Plan, name: str, what: str, *more: str) -> Command:
    """Scores of clips of the held-out prompts, compared with the real ones."""
    where = ("--prompts", str(out / "heldout"), "--real", str(out / "real"), "--out", str(out / "scores" / f"{name}.json"))
    return ("fewstep", "evaluate", what, *where, *TEXT, "--num", str(plan.num_eval), "--sets", str(plan.sets), *more)


def shared(pairs: Command, rank: int) -> Command:
    """The command for one of two processes, which divide the pairs; their clips, which are scored, lose nothing."""
    return (f"RANK={rank}", "WORLD_SIZE=2", *pairs, "--quality", "lossless")


def _scratch(out: Path, toy: str, plan: Plan) -> list[Stage]:
    """The tokenizer, the text encoder, the teacher and its control branch, as the shipped ones: hours on two cores."""
    data, runs, root = str(out / "train"), "toyworld/basic", f"OUTPUT_ROOT={out}"

    short = () if plan.scratch_iters is None else (f"trainer.max_iter={plan.scratch_iters}", "optim.warmup_iters=2")
    settings = (f"data.dataset_dir={data}", *short)
    tokenizer_module = "fewstep.toyworld.train_tokenizer"
    both_cores = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", tokenizer_module)
    half_a_batch = f"trainer.batch_size={tokenizer().trainer.batch_size // 2}"

    def train(recipe: str, *more: str) -> Command:
        return (root, "fewstep", "train", f"experiment={recipe}", *settings, *more)

    def release(part: str, run: str, where: str, *more: str) -> Command:
        words = (f"{runs}/{run}", *more, "--out", f"{toy}/{where}")
        return (root, sys.executable, "-m", "fewstep.toyworld.release", part, *words)

    clips = ("--out", data, "--num", str(plan.num_train), "--seed", str(SERIES["train"]), "--only", "videos,metas,edge")
    perceptual = (sys.executable, "-m", "fewstep.toyworld.train_features", "--seed", "1", "--out", str(out / PERCEPTUAL))
    perceptual += () if plan.scratch_iters is None else ("--num", "256", "--epochs", "1")
    words = ("fewstep", "prepare", "words", data, "--out", f"{toy}/text_encoder")
    return [
        Stage.of(
            "scratch_world",
            "the clips that tokenizer and teacher are trained on, and the perceptual network of the tokenizer's training",
            ("fewstep", "prepare", "toyworld", *clips),
            perceptual,
        ),
        Stage(
            "scratch_tokenizer",
            "an encoder of captions, and a video tokenizer",
            ((words, (root, *both_cores, "tokenizer", *settings, half_a_batch)),),
        ),
        Stage(
            "scratch_latents",
            "captions become embeddings; the tokenizer is put in its place, clips and their edges become latents",
            (
                (("fewstep", "prepare", "text", data, "--text-encoder", toy),),
                (
                    release("tokenizer", "toy_tokenizer", "vae", data),
                    ("fewstep", "prepare", "latents", data, "--codec", toy, "--control", "edge"),
                ),
            ),
        ),
        Stage.of(
            "scratch_teacher",
            "the teacher; beside it the tokenizer's decoder learns on, which leaves every latent what it is",
            train("toy_teacher"),
            (root, sys.executable, "-m", tokenizer_module, "decoder", *settings, f"tokenizer.pretrained={toy}/vae"),
        ),
        Stage(
            "scratch_control",
            "both are put in their places; then a branch by which edges lead the teacher, which stays as it is",
            (
                (
                    release("transformer", "toy_teacher", "transformer"),
                    release("decoder", "toy_decoder", "vae"),
                    train("toy_edge", f"networks.student.network.pretrained={toy}"),
                    release("control", "toy_edge", "controlnet_edge"),
                ),
            ),
        ),
    ]
