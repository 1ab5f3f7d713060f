"""What the demo's scores say of its students: the same sentences at the end of the command and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.evaluation.verdict import Verdict, sentences, verdicts
from fewstep.toyworld.demo.stages import FEW, STUDENTS, TITLES

FARTHER = 0.5  # a student that is farther from real clips than its teacher by this share must be told from it


def says(out: Path, summary: Mapping[str, Any]) -> Iterator[str]:
    """The lines at the end of the command."""
    yield from (f"warning: {text}" for text in warnings_of(summary))
    for scores in verdicts_of(out, summary):
        yield from sentences(scores)


def warnings_of(summary: Mapping[str, Any]) -> list[str]:
    """The sentence on too few clips, by their spread."""
    if _ranks(summary):
        return []
    names = ("teacher", *STUDENTS)
    spreads = sorted(summary[f"frechet_{name}_spread"] for name in names)
    distances = "; ".join(f"{summary[f'frechet_{name}']:.1f} ({TITLES[name]})" for name in names)
    return [
        f"{summary['frechet_4step_n']} clips rank nothing. Their distances to real clips, {distances}, have spreads of "
        f"{spreads[0]:.1f} to {spreads[-1]:.1f}: a student {1 + FARTHER:g} times as far as its teacher could not be told "
        "from it. This run shows that every stage works; `fewstep demo` trains longer and scores more clips."
    ]


def verdicts_of(out: Path, summary: Mapping[str, Any]) -> list[list[Verdict]]:
    """Each student against its teacher in as few calls; none where the clips are too few."""
    if not _ranks(summary):
        return []
    files = ((out / "scores" / f"{name}.json", out / "scores" / f"{few}.json") for name, few in FEW.items())
    return [verdicts(student, few) for student, few in files]


def _ranks(summary: Mapping[str, Any]) -> bool:
    """Whether twice the spread of each student's ratio to the teacher is less than what it must tell."""
    return all(2 * summary[f"frechet_ratio_{name}_spread"] < FARTHER for name in STUDENTS)
