"""Seconds of training until a student reaches a distance: the number by which methods, and settings of one, are compared.

    python benchmarks/time_to_quality.py [--only analytic_dmd2 ..] [--target 0.01] [--seeds 3] [a.b=c ..]
    python benchmarks/time_to_quality.py --only RECIPE --score NAME --target X --every 50      # any recipe with a preview

Every recipe is trained as `fewstep train` does it, from its own start (the stage before it is trained first and not counted).
Every --every iterations its preview scores the moving average of the student; the run ends at the first score at or below the
target. The preview's own time is not counted, nor are checkpoints, of which there are none. Time is that of the process on a
CPU, and the wall's on a GPU. One row for each recipe: the median over seeds, and all of them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common.interleaved import CLOCK, DEVICE, now

import fewstep
from fewstep.config import build_recipe, compose, kind, read_command
from fewstep.training.loop import train
from fewstep.training.preview import AnyPreview, Scene
from fewstep.training.run import Run

RECIPES = (
    "analytic_kd",
    "analytic_dmd2",
    "analytic_consistency",
    "analytic_scm",
    "analytic_rcm",
    "analytic_meanflow",
    "analytic_flow_map",
)


@dataclass
class Course:
    """What one run has taken so far, and how good its student is."""

    seconds: float = 0.0
    left: float | None = None  # when the last preview ended
    scores: list[tuple[int, float, float]] = field(default_factory=list[tuple[int, float, float]])  # iteration, seconds, score


COURSES: dict[str, Course] = {}


class Reached(Exception):  # noqa: N818  # no error
    """The target is reached: the run ends."""


@kind("until", group="preview")
@dataclass(frozen=True)
class Until:
    """Another preview, which ends the run at a score, and whose time is not counted."""

    inner: AnyPreview
    name: str  # of COURSES
    score: str
    target: float
    every: int | None = 25

    def show(self, scene: Scene) -> Mapping[str, float]:
        came, course = now(), COURSES[self.name]
        if course.left is not None:
            course.seconds += came - course.left
        values = self.inner.show(scene)
        course.scores.append((scene.step, course.seconds, float(values[self.score])))
        if values[self.score] <= self.target:
            raise Reached
        course.left = now()
        return values


def measure(recipe: str, words: list[str], score: str, target: float, every: int, seed: int) -> Course:
    run = compose(read_command([f"experiment={recipe}", *words]), Run)
    if run.preview is None:
        raise SystemExit(f"{recipe} has no preview that scores its student")
    name = f"{recipe}_{seed}"
    course = COURSES[name] = Course()
    checkpoint = replace(run.checkpoint, save_iter=10**9)
    run = replace(
        run,
        job=replace(run.job, name=name),
        preview=Until(run.preview, name, score, target, every),
        trainer=replace(run.trainer, seed=seed, log_every=10**9),
        checkpoint=checkpoint,
    )
    with suppress(Reached):
        train(run)
    return course


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=RECIPES, help="recipes")
    parser.add_argument("--score", default="energy_distance", help="of the recipes' preview; the lower the better")
    parser.add_argument("--target", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=25, help="iterations between two scores")
    parser.add_argument("--seeds", type=int, default=1)
    options, words = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTPUT_ROOT"] = folder
        for recipe in options.only:
            for stage in build_recipe(recipe).job.after:
                stage_run = build_recipe(stage)
                if not (stage_run.job.folder() / "summary.json").is_file():
                    train(replace(stage_run, preview=None))
            courses = [
                measure(recipe, words, options.score, options.target, options.every, seed) for seed in range(options.seeds)
            ]
            parts[recipe] = _row(courses, options.target)
            print(f"{recipe:24} {parts[recipe]}", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else f"{platform.machine()}, 1 thread"
    record: dict[str, Any] = {
        "name": "time_to_quality",
        "unit": "s of training",
        "better": "lower",
        "score": options.score,
        "target": options.target,
        "settings": words,
        "seeds": options.seeds,
        "clock": CLOCK,
        "device": device,
        "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "parts": parts,
    }
    print(json.dumps(record))
    return record


def _row(courses: list[Course], target: float) -> dict[str, Any]:
    reached = [course.scores[-1][2] <= target for course in courses]
    seconds = [round(course.scores[-1][1], 2) for course in courses]
    return {
        "seconds": statistics.median(seconds) if all(reached) else None,  # None: not reached by every seed
        "each": [value if ok else None for value, ok in zip(seconds, reached, strict=True)],
        "iterations": [course.scores[-1][0] for course in courses],
        "best": round(min(score for course in courses for _, _, score in course.scores), 5),
    }


if __name__ == "__main__":
    main()
