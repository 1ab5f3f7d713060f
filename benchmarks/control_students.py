"""Does a distilled student keep the controls that its teacher follows, and can one student keep several?

    OUTPUT_ROOT=controls python benchmarks/control_students.py        20 minutes of one core; finished parts are not made again

The toy teacher has a branch for edges; others are trained here for blur (vis) and depth. KD makes a student of four steps for
each of the three, and one student for all three by the same number of iterations in all. Each is scored on held-out scenes,
whose signals are exact, beside the teacher. The last lines say what share of the teacher's fidelity above chance each keeps,
and what share of that of the control's own student.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import fewstep
from fewstep.cli import main
from fewstep.environment import output_root
from fewstep.evaluation.fidelity import UNRELATED
from fewstep.toyworld import release

TOY = str(fewstep.TOY)
TEXT = ("--max-tokens", "40", "--mask-text")
TEACHER = ("--steps", "12", "--sampler", "unipc", "--guidance", "2")
SCORES = {"edge": "edge_f1", "vis": "vis_ssim", "depth": "depth_rmse"}
NUM_PAIRS, NUM_HELD, ITERS, BRANCH_ITERS = 192, 128, 100, 350


def run(*words: str) -> None:
    print("fewstep", *words, file=sys.stderr, flush=True)
    if status := main(list(words)):
        sys.exit(status)


def prepare(root: Path) -> None:
    for name, num, seed in (("world", 2048, "7400000"), ("held", NUM_HELD, "7400001")):
        folder = str(root / name)
        only = ("--only", "videos,metas,edge,vis,depth", "--workers", "0")
        run("prepare", "toyworld", "--out", folder, "--num", str(num), "--seed", seed, *only)
        run("prepare", "text", folder, "--text-encoder", TOY)
    for control in SCORES:
        run("prepare", "latents", str(root / "world"), "--codec", TOY, "--control", control)


def teacher(root: Path) -> str:
    """The shipped stack with branches for blur and depth beside the one for edges."""
    stack = root / "stack"
    if not stack.is_dir():
        shutil.copytree(TOY, stack)
    for control in ("vis", "depth"):
        data = (f"data.dataset_dir={root}/world", "checkpoint.save_iter=100", "optim.warmup_iters=30", "ema.beta=0.98")
        run("train", f"experiment=toy_{control}", f"trainer.max_iter={BRANCH_ITERS}", *data)
        if not (stack / f"controlnet_{control}").is_dir():
            release.control(f"toyworld/basic/toy_{control}", stack / f"controlnet_{control}")
    return str(stack)


def train(root: Path, stack: str) -> None:
    path = ("--path-times", "4", "--student-shift", "3", "--quality", "lossless", "--num", str(NUM_PAIRS))
    for control in SCORES:
        own = ("--out", str(root / "pairs" / control), "--control", control)
        run("pairs", stack, str(root / "world"), *own, *TEACHER, *path, *TEXT)
    sources = [f"data.sources.{n}.data.dataset_dir={root}/pairs/{control}" for n, control in enumerate(SCORES)]
    student(stack, ",".join(SCORES), "all", len(SCORES) * ITERS, *sources, "data.block=16")
    for control in SCORES:
        student(stack, control, control, ITERS, f"data.dataset_dir={root}/pairs/{control}")


def student(stack: str, control: str, name: str, iters: int, *data: str) -> None:
    common = ("experiment=kd", f"teacher={stack}", f"control={control}", "steps=4", "shift=3", f"job.name=kd_{name}", *data)
    schedule = (f"trainer.max_iter={iters}", "trainer.batch_size=16", "optim.schedule=cosine", "optim.warmup_iters=10")
    rest = ("trainer.num_threads=1", "ema.profile=constant", "ema.beta=0.98", "checkpoint.save_iter=100", "preview=none")
    run("train", *common, *schedule, *rest)


def score(root: Path, name: str, control: str, address: str, *options: str) -> tuple[float, float]:
    """The fidelity to `control` of clips of a model that received it, and that of unrelated clips."""
    out = root / "scores" / f"{name}_{control}.json"
    where = ("--prompts", str(root / "held"), "--control", control, "--out", str(out), "--sets", "1", "--keep", "8")
    run("evaluate", address, *options, *where, *TEXT)
    record = json.loads(out.read_text())
    return record["scores"][SCORES[control]]["value"], record["anchors"][UNRELATED][SCORES[control]]["value"]


def measure() -> None:
    root = output_root()
    prepare(root)
    stack = teacher(root)
    train(root, stack)
    for control, what in SCORES.items():
        models = {
            "own": (f"general/stack/kd_{control}@latest:student.ema", "--codec", TOY),
            "all": ("general/stack/kd_all@latest:student.ema", "--codec", TOY),
            "teacher": (stack, *TEACHER),
        }
        found = {name: score(root, name, control, *words) for name, words in models.items()}
        above = {name: value - chance for name, (value, chance) in found.items()}
        for name, (value, chance) in found.items():
            shares = (
                f"{above[name] / above['teacher']:.3f} of the teacher's, {above[name] / above['own']:.3f} of its own student's"
            )
            print(f"{control:6} {name:8} {what} {value:.3f}, unrelated clips {chance:.3f}; above chance {shares}")


if __name__ == "__main__":
    measure()
