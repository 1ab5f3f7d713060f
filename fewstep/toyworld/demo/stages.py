"""The stages of the demo: each is public commands, printed before they run; finished ones are not run again.

    world  ->  latents  ->  teacher's pairs  ->  KD  ->  DMD2  ->  export  ->  plain diffusers  ->  scores  ->  report

Each command has one thread: on two cores two lanes are faster than one command on two threads. The lanes are cut to end
together.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fewstep
from fewstep.distill.stages import Command, Stage, run
from fewstep.errors import UserError
from fewstep.files import read_json, write_json
from fewstep.toyworld.recipes import GUIDANCE, STUDENT_SHIFT
from fewstep.toyworld.train_tokenizer import PERCEPTUAL, tokenizer

TOY = Path(os.path.relpath(fewstep.TOY))  # short in the commands one reads
Size = Literal["quick", "default", "long"]
IMPORTS = "fewstep.toyworld.demo.imports"
SERIES = {"world": 7_400_000, "heldout": 7_400_001, "real": 7_400_002, "train": 11}  # no clip is in two of them


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
    num_train: int = 24_000  # clips of --from-scratch; its iterations are the recipes' own, or as many as this
    scratch_iters: int | None = None


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        *(256, 128, 512, 128, 1),
        kd=(Learning(60, 16), Learning(60, 16)),
        dmd2=(Learning(60, 16), Learning(60, 16)),
        num_train=256,
        scratch_iters=40,
    ),
    "default": Plan(
        *(1024, 1024, 2048, 512, 3),
        kd=(Learning(250), Learning(250)),
        dmd2=(Learning(290), Learning(670, 16, ("method.guidance=3", "optim.lr=3e-4", "critic_optim.lr=6e-4"))),
    ),
    "long": Plan(
        *(3072, 3072, 2048, 512, 3),
        kd=(Learning(800), Learning(800)),
        dmd2=(Learning(1700), Learning(2300)),
    ),
}
STEPS = 35  # of the teacher's solver


def stages(out: Path, size: Size, from_scratch: bool) -> list[Stage]:
    plan, toy, root = PLANS[size], str(out / "toy" if from_scratch else TOY), f"OUTPUT_ROOT={out}"
    world, held, real, pairs = (str(out / name) for name in ("world", "heldout", "real", "pairs"))

    def render(name: str, num: int, *only: str) -> Command:
        extra = ("--only", ",".join(only)) if only else ()
        where = ("--out", str(out / name), "--num", str(num), "--seed", str(SERIES[name]), "--workers", "1")
        return ("fewstep", "prepare", "toyworld", *where, *extra)

    def train(recipe: str, much: Learning) -> Command:
        sizes = (
            f"trainer.max_iter={much.iters}",
            f"trainer.batch_size={much.batch_size}",
            f"checkpoint.save_iter={min(much.iters, 200)}",
        )
        shown = (f"trainer.log_every={max(1, min(640 // much.batch_size, much.iters // 4))}",)
        other = (f"networks.teacher.pretrained={toy}",) if from_scratch else ()
        return (root, "fewstep", "train", f"experiment={recipe}", *much.more, *sizes, *shown, *other)

    def score(name: str, what: str, *more: str) -> Command:
        where = ("--prompts", held, "--real", real, "--out", str(out / "scores" / f"{name}.json"))
        where = (*where, "--max-tokens", "40", "--mask-text")
        return ("fewstep", "evaluate", what, *where, "--num", str(plan.num_eval), "--sets", str(plan.sets), *more)

    def few(name: str, calls: int) -> Command:
        return score(name, toy, "--calls", str(calls), "--guidance", str(GUIDANCE))

    teacher = ("--steps", str(STEPS), "--sampler", "unipc", "--guidance", str(GUIDANCE))
    students = {name: str(out / "students" / name) for name in ("4step", "1step")}

    def export(name: str) -> Command:
        where = ("--out", students[name], "--format", "diffusers", "--base", toy)
        return (root, "fewstep", "export", f"toyworld/basic/toy_dmd2_{name}", *where)

    def sample(name: str) -> Command:
        alone = os.path.relpath(Path(__file__).with_name("plain_diffusers.py"))
        return (sys.executable, alone, students[name], str(Path(held) / "metas"), str(out / "samples" / name))

    return [
        *(_scratch(out, toy, plan) if from_scratch else ()),
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
        Stage(
            "latents",
            "captions become embeddings, clips latents of the video tokenizer; real clips are compared with others",
            (
                (
                    ("fewstep", "prepare", "text", world, "--text-encoder", toy),
                    ("fewstep", "prepare", "latents", world, "--codec", toy),
                ),
                (("fewstep", "prepare", "text", held, "--text-encoder", toy), score("real", held)),
            ),
        ),
        Stage.of(
            "pairs",
            f"the teacher makes clips from noise, {STEPS} steps with guidance: {2 * STEPS} network calls each",
            *(
                (
                    *(f"RANK={rank}", "WORLD_SIZE=2", "fewstep", "pairs", toy, world, "--out", pairs),
                    *("--num", str(plan.num_pairs), *teacher, "--path-times", "4", "--student-shift", str(STUDENT_SHIFT)),
                    *("--max-tokens", "40", "--mask-text", "--quality", "lossless"),
                )
                for rank in range(2)
            ),
        ),
        Stage.of(
            "kd",
            "knowledge distillation: students regress onto the teacher's clips",
            train("toy_kd_4step", plan.kd[0]),
            train("toy_kd_1step", plan.kd[1]),
        ),
        Stage.of(
            "dmd2",
            "distribution matching: students learn from the difference of two scores",
            train("toy_dmd2_4step", plan.dmd2[0]),
            train("toy_dmd2_1step", plan.dmd2[1]),
        ),
        Stage(
            "export",
            "students become folders of diffusers, and plain diffusers, without fewstep, samples them",
            tuple((export(name), sample(name)) for name in students),
        ),
        Stage(
            "scores",
            "scores of the students; of their teacher, by its pairs and by the best it can do with few network calls; and of "
            "what a student could at best be: real clips through the tokenizer",
            (
                (few("teacher_4calls", 4), few("teacher_1call", 1)),
                (
                    *(score(name, students[name]) for name in students),
                    score("teacher", pairs),
                    score("tokenizer", f"codec:{toy}"),
                ),
            ),
        ),
        Stage.of(
            "report",
            "one page to look at",
            (
                *(sys.executable, "-m", "fewstep.toyworld.demo.page", str(out), "--size", size),
                *(("--toy", toy) if from_scratch else ()),
            ),
        ),
    ]


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
        made = (f"{runs}/{run}", *more, "--out", f"{toy}/{where}")
        return (root, sys.executable, "-m", "fewstep.toyworld.release", part, *made)

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


def demo(out: Path = Path("demo"), size: Size = "default", from_scratch: bool = False) -> Path:
    """Runs what has not run yet and returns the path of the report. Raises ValueError if a command fails."""
    _claim(out, size, from_scratch)
    began = time.monotonic()
    for order, stage in enumerate(stages(out, size, from_scratch)):
        run(stage, out, order, again="fewstep demo", preload=IMPORTS, num_threads=1)
    report = out / "report.html"
    summary = json.loads((out / "summary.json").read_text())
    print(f"\n{json.dumps({k: v for k, v in summary.items() if k in _SHOWN}, indent=1)}")
    print(f"the whole took {time.monotonic() - began:.0f} s this time; every number: {out}/summary.json")
    print(f"the report: {report.resolve()}")
    return report


_SHOWN = tuple(
    f"{name}{end}"
    for name in (
        *("frechet_real", "frechet_tokenizer", "frechet_teacher", "frechet_teacher_4calls", "frechet_teacher_1call"),
        *("frechet_4step", "frechet_1step", "frechet_ratio_4step", "frechet_ratio_1step"),
        *("gap_closed_4step", "gap_closed_1step", "clips_per_s_teacher", "clips_per_s_4step", "clips_per_s_1step"),
    )
    for end in ("", "_spread")
)


def _claim(out: Path, size: Size, from_scratch: bool) -> None:
    """One folder is one demo: a quick one does not go on as a long one."""
    out.mkdir(parents=True, exist_ok=True)
    path, about = out / "demo.json", {"size": size, "from_scratch": from_scratch}
    if path.is_file() and read_json(path, f"Remove {out}, or choose another --out") != about:
        raise UserError(f"{out}: holds another demo ({path.read_text().strip()}). Remove it, or choose another --out")
    write_json(path, about, indent=None)
