"""Does a distilled student keep the control that its teacher follows? The toy teacher with its edge branch, and its student.

    OUTPUT_ROOT=edge python benchmarks/edge_student.py              5 minutes of one core; finished parts are not made again

Prints Canny F1 of both on held-out scenes, whose edges are exact, beside chance, and the share of the teacher's F1 above chance
that the student keeps. edge/report.html shows the clips with the edges over them.
"""

from __future__ import annotations

import json
import sys

import fewstep
from fewstep.cli import main
from fewstep.environment import output_root
from fewstep.evaluation.fidelity import UNRELATED

TOY = str(fewstep.TOY)
TEXT = ("--max-tokens", "40", "--mask-text")
TEACHER = ("--steps", "12", "--sampler", "unipc", "--guidance", "2")


def run(*words: str) -> None:
    print("fewstep", *words, file=sys.stderr)
    if status := main(list(words)):
        sys.exit(status)


def measure() -> None:
    root = output_root()
    world, held, pairs = (str(root / name) for name in ("world", "held", "pairs"))
    for folder, num, seed in ((world, "512", "7400000"), (held, "128", "7400001")):
        run("prepare", "toyworld", "--out", folder, "--num", num, "--seed", seed)
        run("prepare", "text", folder, "--text-encoder", TOY)
    run("prepare", "latents", world, "--codec", TOY, "--control", "edge")
    path = ("--path-times", "4", "--student-shift", "3", "--quality", "lossless")
    run("pairs", TOY, world, "--out", pairs, "--control", "edge", *TEACHER, *path, *TEXT)
    common = (f"teacher={TOY}", "control=edge", "steps=4", "shift=3", f"data.dataset_dir={pairs}", "job.name=edge_kd")
    learning = ("trainer.max_iter=200", "trainer.batch_size=32", "optim.schedule=cosine", "optim.warmup_iters=10")
    run("train", "experiment=kd", *common, *learning, "trainer.num_threads=1", "ema.profile=constant", "ema.beta=0.98")
    models = {
        "teacher": (TOY, *TEACHER),
        "teacher_4calls": (TOY, "--steps", "4", "--sampler", "unipc", "--guidance", "1"),
        "student": ("general/stack/edge_kd@latest:student.ema", "--codec", TOY),
    }
    values: dict[str, float] = {}
    chance: dict[str, float] = {}
    for name, (address, *more) in models.items():
        out = root / "scores" / f"{name}.json"
        where = ("--prompts", held, "--control", "edge,vis,depth,seg,keypoint", "--out", str(out), "--sets", "1", *TEXT)
        run("evaluate", address, *more, *where)
        record = json.loads(out.read_text())
        values[name] = record["scores"]["edge_f1"]["value"]
        chance[name] = record["anchors"][UNRELATED]["edge_f1"]["value"]
    run("report", *(str(root / "scores" / f"{name}.json") for name in models), "--out", str(root / "report.html"))
    whole = values["teacher"] - chance["teacher"]
    for name, value in values.items():
        kept = (value - chance[name]) / whole
        print(
            f"{name:15} edge F1 {value:.3f}, unrelated clips {chance[name]:.3f}, share of the teacher's above chance {kept:.3f}"
        )


if __name__ == "__main__":
    measure()
