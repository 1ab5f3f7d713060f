"""The stages of the demo: each is public commands, printed before they run; finished ones are not run again.

    world  ->  teacher's pairs  ->  KD  ->  DMD2  ->  export  ->  plain diffusers  ->  scores  ->  report

Two commands of a stage run side by side, each on one thread: on two cores that is faster than one on two threads.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fewstep
from fewstep.data.atomic import replacing
from fewstep.recipes.toyworld import GUIDANCE, STUDENT_SHIFT

TOY = Path(os.path.relpath(Path(fewstep.__file__).parent / "toy"))  # short in the commands one reads
Size = Literal["quick", "default", "long"]
SERIES = {"world": 7_400_000, "heldout": 7_400_001, "real": 7_400_002, "train": 11}  # no clip is in two of them


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    num_world: int  # prompts for DMD2, and the first of them for the pairs
    num_pairs: int
    num_real: int  # clips that everything is compared with
    num_eval: int  # clips in an evaluation set
    sets: int
    kd_iters: int
    dmd2_iters: tuple[int, int]  # of four steps and of one, which is asked less often: as many as take the same time
    batch_size: int = 32
    num_train: int = 24_000  # clips of --from-scratch; its iterations are the recipes' own, or as many as this
    scratch_iters: int | None = None


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        *(256, 128, 512, 128, 1),
        kd_iters=60,
        dmd2_iters=(60, 60),
        batch_size=16,
        num_train=256,
        scratch_iters=40,
    ),
    "default": Plan(1024, 1024, 2048, 512, 3, kd_iters=250, dmd2_iters=(290, 380)),
    "long": Plan(6144, 6144, 2048, 512, 3, kd_iters=2500, dmd2_iters=(4000, 5200)),
}
STEPS = 35  # of the teacher's solver


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]  # run side by side


def stages(out: Path, size: Size, from_scratch: bool) -> list[Stage]:
    plan, toy = PLANS[size], str(out / "toy" if from_scratch else TOY)
    world, held, real, pairs = (str(out / name) for name in ("world", "heldout", "real", "pairs"))

    def render(name: str, num: int, *only: str) -> tuple[str, ...]:
        extra = ("--only", ",".join(only)) if only else ()
        where = ("--out", str(out / name), "--num", str(num), "--seed", str(SERIES[name]), "--workers", "1")
        return ("fewstep", "prepare", "toyworld", *where, *extra)

    def train(recipe: str, iters: int) -> tuple[str, ...]:
        sizes = (
            f"trainer.max_iter={iters}",
            f"trainer.batch_size={plan.batch_size}",
            f"checkpoint.save_iter={min(iters, 200)}",
        )
        shown = (f"trainer.log_every={max(1, min(20, iters // 4))}",)
        other = (f"networks.teacher.pretrained={toy}",) if from_scratch else ()
        return ("fewstep", "train", f"experiment={recipe}", *sizes, *shown, *other)

    def score(name: str, what: str, *more: str) -> tuple[str, ...]:
        where = ("--prompts", held, "--real", real, "--out", str(out / "scores" / f"{name}.json"))
        return ("fewstep", "evaluate", what, *where, "--num", str(plan.num_eval), "--sets", str(plan.sets), *more)

    def few(name: str, calls: int) -> tuple[str, ...]:
        return score(name, toy, "--calls", str(calls), "--guidance", str(GUIDANCE))

    teacher = ("--steps", str(STEPS), "--sampler", "unipc", "--guidance", str(GUIDANCE))
    students = {name: str(out / "students" / name) for name in ("4step", "1step")}
    runs = {name: f"toyworld/basic/toy_dmd2_{name}" for name in students}
    return [
        *(_scratch(out, toy, plan) if from_scratch else ()),
        Stage(
            "world",
            "a small world with physics is rendered: prompts to learn from, and clips nobody learns from",
            (
                render("world", plan.num_world, "videos", "metas", "edge"),
                render("real", plan.num_real, "videos", "metas"),
            ),
        ),
        Stage(
            "text",
            "captions become embeddings",
            (
                ("fewstep", "prepare", "text", world, "--encoder", toy),
                render("heldout", plan.num_eval, "videos", "metas"),
            ),
        ),
        Stage(
            "latents",
            "clips become latents of the video tokenizer",
            (
                ("fewstep", "prepare", "latents", world, "--codec", toy),
                ("fewstep", "prepare", "text", held, "--encoder", toy),
            ),
        ),
        Stage(
            "pairs",
            f"the teacher makes clips from noise, {STEPS} steps with guidance: {2 * STEPS} network calls each",
            tuple(
                (
                    *(f"RANK={rank}", "WORLD_SIZE=2", "fewstep", "pairs", toy, world, "--out", pairs),
                    *("--num", str(plan.num_pairs), *teacher, "--path-times", "4", "--student-shift", str(STUDENT_SHIFT)),
                    *("--max-tokens", "40", "--mask-text", "--quality", "lossless"),
                )
                for rank in range(2)
            ),
        ),
        Stage(
            "kd",
            "knowledge distillation: students regress onto the teacher's clips",
            (train("toy_kd_4step", plan.kd_iters), train("toy_kd_1step", plan.kd_iters)),
        ),
        Stage(
            "dmd2",
            "distribution matching: students learn from the difference of two scores",
            (train("toy_dmd2_4step", plan.dmd2_iters[0]), train("toy_dmd2_1step", plan.dmd2_iters[1])),
        ),
        Stage(
            "export",
            "students become folders of diffusers",
            tuple(
                ("fewstep", "export", runs[name], "--out", students[name], "--format", "diffusers", "--base", toy)
                for name in students
            ),
        ),
        Stage(
            "diffusers",
            "plain diffusers, without fewstep, samples them",
            tuple(
                (
                    *(sys.executable, str(Path(__file__).with_name("plain_diffusers.py")), students[name]),
                    *(str(Path(held) / "metas"), str(out / "samples" / name)),
                )
                for name in students
            ),
        ),
        Stage(
            "references",
            "scores of what a student could at best be: real clips, and real clips through the tokenizer",
            (score("real", held), score("tokenizer", f"codec:{toy}")),
        ),
        Stage(
            "students",
            "scores of the students",
            tuple(score(name, students[name]) for name in students),
        ),
        Stage(
            "teacher",
            "scores of the teacher: its pairs, and the best it can do with few network calls",
            (
                ("sh", "-c", f"{shlex.join(score('teacher', pairs))} && {shlex.join(few('teacher_1call', 1))}"),
                few("teacher_4calls", 4),
            ),
        ),
        Stage(
            "report",
            "one page to look at",
            (
                (
                    *(sys.executable, "-m", "fewstep.demo.page", str(out), "--size", size),
                    *(("--toy", toy) if from_scratch else ()),
                ),
            ),
        ),
    ]


def _scratch(out: Path, toy: str, plan: Plan) -> list[Stage]:
    """The tokenizer, the text encoder and the teacher, as the shipped ones were made: hours on two cores."""
    data, runs = str(out / "train"), "toyworld/basic"

    def train(recipe: str) -> tuple[str, ...]:
        short = () if plan.scratch_iters is None else (f"trainer.max_iter={plan.scratch_iters}", "optim.warmup_iters=2")
        return ("fewstep", "train", f"experiment={recipe}", f"data.dataset_dir={data}", *short)

    def release(part: str, run: str, where: str, *more: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "fewstep.recipes.toy_release", part, f"{runs}/{run}", *more, "--out", f"{toy}/{where}")

    clips = ("--out", data, "--num", str(plan.num_train), "--seed", str(SERIES["train"]), "--only", "videos,metas,edge")
    words = (sys.executable, "-m", "fewstep.prepare.toy_words", f"{data}/metas", "--out", f"{toy}/text_encoder")
    return [
        Stage(
            "scratch_world",
            "the clips that tokenizer and teacher learn from",
            (("fewstep", "prepare", "toyworld", *clips),),
        ),
        Stage("scratch_tokenizer", "a video tokenizer, and an encoder of captions", (train("toy_tokenizer"), words)),
        Stage(
            "scratch_codec",
            "latents are measured, and the tokenizer put in its place",
            (release("tokenizer", "toy_tokenizer", "vae", data),),
        ),
        Stage(
            "scratch_latents",
            "the teacher's data",
            (
                ("fewstep", "prepare", "text", data, "--encoder", toy),
                ("fewstep", "prepare", "latents", data, "--codec", toy),
            ),
        ),
        Stage("scratch_teacher", "the teacher", (train("toy_teacher"),)),
        Stage("scratch_release", "the teacher is put in its place", (release("transformer", "toy_teacher", "transformer"),)),
    ]


def demo(out: Path = Path("demo"), size: Size = "default", from_scratch: bool = False) -> Path:
    """Runs what has not run yet and returns the path of the report. Raises ValueError if a command fails."""
    _claim(out, size, from_scratch)
    began = time.monotonic()
    for order, stage in enumerate(stages(out, size, from_scratch)):
        _run(stage, out, order)
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
    if path.is_file() and json.loads(path.read_text()) != about:
        raise ValueError(f"{out}: holds another demo ({path.read_text().strip()}). Remove it, or choose another --out")
    with replacing(path) as beside:
        beside.write_text(json.dumps(about) + "\n")


def _run(stage: Stage, out: Path, order: int) -> None:
    marker = out / "stages" / f"{stage.name}.json"
    print(f"\n--- {stage.name}: {stage.about}", flush=True)
    if marker.is_file():
        print("    done earlier")
        return
    environment = os.environ | {"OUTPUT_ROOT": str(out), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    for command in stage.commands:
        print(f"$ {shown(command)}", flush=True)
    running = [_started(command, environment) for command in stage.commands]
    told = [threading.Thread(target=_relay, args=(process, n, len(running))) for n, process in enumerate(running)]
    try:
        for thread in told:
            thread.start()
        failed = [process.wait() for process in running]
    except BaseException:  # Ctrl-C above all: each command saves what it has
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise
    finally:
        for thread in told:
            thread.join()
    if any(failed):
        raise ValueError(f"stage '{stage.name}' failed, see above. The same `fewstep demo` goes on from here")
    about = {
        "name": stage.name,
        "order": order,
        "commands": [shown(c) for c in stage.commands],
        "seconds": round(time.monotonic() - began, 1),
    }
    with replacing(marker) as beside:
        beside.write_text(json.dumps(about | {"about": stage.about}, indent=1) + "\n")
    print(f"    {about['seconds']} s", flush=True)


def shown(command: Sequence[str]) -> str:
    """As one would type it."""
    told = ["python" if part == sys.executable else part for part in command]
    return " ".join(part if part.startswith(("RANK=", "WORLD_SIZE=")) else shlex.quote(part) for part in told)


def _started(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """`fewstep` is this very one, and NAME=value before a command is its environment, as in a shell."""
    names = dict(part.split("=", 1) for part in command if part.split("=")[0] in ("RANK", "WORLD_SIZE"))
    rest = list(command)[len(names) :]
    if rest[0] == "fewstep":
        rest = [sys.executable, "-m", *rest]
    elif rest[0] == "sh":
        rest[-1] = rest[-1].replace("fewstep evaluate", f"{shlex.quote(sys.executable)} -m fewstep evaluate")
    return subprocess.Popen(
        rest, env=environment | names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _relay(process: subprocess.Popen[str], number: int, num: int) -> None:
    assert process.stdout is not None
    mark = f"[{number + 1}] " if num > 1 else ""
    for line in process.stdout:
        print(f"    {mark}{line.rstrip()}", flush=True)
