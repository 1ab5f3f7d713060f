"""A small report with every part filled, and texts that would break a careless page."""

from __future__ import annotations

import math

import numpy as np

from fewstep.evaluation.plot import Series
from fewstep.evaluation.report import Chart, Film, Gallery, Gate, Model, Report, Row, Score, Stage, Value
from fewstep.evaluation.verdict import Verdict

NASTY = "a <red> \"ball\" & a 'box' </script><script>alert(1)</script> {{title}}"


def film(seed: int, num: int = 6, height: int = 32, width: int = 32) -> np.ndarray:
    """A bright square that wanders over grain, a different way for each seed; the third frame equals the second."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 90, (num, height, width, 3), dtype=np.uint8)
    size = height // 4
    for t in range(num):
        x = (2 * seed + t * width // (2 * num)) % (width - size)
        frames[t, size : 2 * size, x : x + size] = 20 * t, 255 - 9 * seed, 128
    frames[2] = frames[1]
    return frames


def models() -> list[Model]:
    def scores(distance: float, spread: float, share: float) -> dict[str, Value]:
        return {
            "frechet": Value(distance, spread, 512),
            "recall": Value(share, 0.0123, 511),
            "mmd": Value(distance / 40),
        }

    return [
        Model("real", "real clips", scores=scores(-0.12, 0.71, 0.97)),
        Model("codec", "tokenizer", scores=scores(3.21, 0.6, 0.93)),
        Model("teacher", "teacher, 35 steps", 70, 3.5, scores(7.4321, 0.66, 0.86), Value(3.95, 0.051, 64), "UniPC", "shift 3"),
        Model("teacher", "teacher, 2 steps", 4, 3.5, scores(44.4, 1.6, 0.52), Value(66.3, 0.5, 64), "UniPC"),
        Model("teacher", "teacher, 1 step", 2, 3.5, scores(310, 8, 0.08), line="UniPC", is_featured=False),
        Model("student", "student, 4 steps", 4, 1.0, scores(9.13, 0.83, 0.83), Value(68, 0.44, 64)),
        Model("student", "student, 1 step", 1, 1.0, scores(14.85, 1.12, math.nan), Value(251.4, 2.2, 64), note=NASTY),
    ]


SCORES = (
    Score("frechet", "Frechet distance", "How far from real clips.", "lower", is_headline=True),
    Score("recall", "Recall", "What the model can make at all.", "higher", is_headline=True),
    Score("mmd", "MMD", "A second distance.", "lower"),
)
GATES = (
    Gate("4 steps: ratio", 1.229, 1.5, "lower", 0.12),
    Gate("1 step: ratio", 2.04, 2.0, "lower", 0.21),
    Gate("1 step: gap closed", 0.97, 0.5, "higher", unit="of 1"),
    Gate("never measured", math.nan, 0.8, "higher"),
    Gate("below zero", -0.3, 0.1, "lower"),
)
VERDICTS = (
    Verdict("frechet", "lower", 9.13, 44.4, -38.8, -31.7, 512, "its teacher in 4 calls"),
    Verdict("recall", "higher", 0.83, 0.86, -0.13, 0.07, 512, "its teacher in 4 calls"),
    Verdict("clip_score", "higher", 0.1, 0.9, -0.9, -0.7, 512, "its teacher in 4 calls"),
)
STAGES = (
    Stage("Render", "fewstep prepare toyworld --out demo/data --num 512", 14.2),
    Stage("Distil", 'OUTPUT_ROOT="demo" fewstep train experiment=toy a.b=<c> && echo ' + "x" * 200, 204.4),
)


def small(num_rows: int = 2) -> Report:
    kinds = ("real", "codec", "teacher", "teacher", "student", "student")
    rows = [
        Row(f"{NASTY} {i}", [Film(m.name, film(10 * i + k), kind, "calls") for k, (m, kind) in enumerate(zip(models(), kinds))])
        for i in range(num_rows)
    ]
    x = np.arange(5)
    return Report(
        title=NASTY,
        summary=NASTY,
        verdicts=[VERDICTS],
        warnings=[NASTY],
        galleries=[
            Gallery("Same prompts, same noise", rows, 16, "Held out."),
            Gallery("Shorter", [Row("b", [Film("c", film(3, 4), "control")])], 8),
        ],
        gates=GATES,
        models=models(),
        scores=SCORES,
        charts=[Chart("losses", [Series("critic", x, x + 1.5), Series("vsd", x, x / 9)], rules={"rings at 2": 2.0})],
        stages=STAGES,
        limits=[NASTY, "Second."],
        environment={"device": NASTY, "torch": "2.13"},
    )
