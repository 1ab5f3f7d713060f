"""Is the student better than its teacher in as few steps? By the scores of `fewstep evaluate`, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

from fewstep.evaluation.score_files import read_scores


@dataclass(frozen=True)
class Verdict:
    score: str
    better: str  # "lower" or "higher"
    student: float
    teacher: float  # at the student's number of steps
    spread: float  # of the difference
    other: str = "its teacher's own few steps"

    @property
    def _lead(self) -> float:
        """By how much the student is better; negative if it is worse."""
        return self.teacher - self.student if self.better == "lower" else self.student - self.teacher

    @property
    def is_worse(self) -> bool:
        """Whether the student is worse by more than the spread."""
        return -self._lead > self.spread

    def __str__(self) -> str:
        if self.is_worse:
            word = "WORSE than"
        else:
            word = "better than" if self._lead > self.spread else "as good, within the spread, as"
        numbers = f"{self.student:.4g} against {self.teacher:.4g}, {self.better} is better, spread {self.spread:.2g}"
        return f"{self.score}: the student is {word} {self.other} ({numbers})"


def verdicts(student: Path, teacher: Path, name: str = Verdict.other) -> list[Verdict]:
    """One for each headline score that tells them apart and has a better end. name: of whom `teacher` has the scores.

    Zero for both tells nothing, nor does a Frechet distance of too few clips.
    """
    return list(_verdicts(read_scores(student), read_scores(teacher), name))


def _verdicts(mine: Mapping[str, Any], other: Mapping[str, Any], whose: str) -> Iterator[Verdict]:
    notes = [*mine.get("notes", []), *other.get("notes", [])]
    for score in mine["legend"]:
        name, better = score["name"], score.get("better")
        pair = [record["scores"].get(name) for record in (mine, other)]
        if better not in ("lower", "higher") or not score.get("is_headline"):
            continue
        if any(entry is None or entry["value"] is None for entry in pair) or pair[0]["value"] == pair[1]["value"] == 0:
            continue
        if name.startswith("frechet") and any("undetermined" in note for note in notes):
            continue
        spread = hypot(*(entry.get("spread") or 0.0 for entry in pair))
        yield Verdict(name, better, pair[0]["value"], pair[1]["value"], spread, whose)


def table(files: Mapping[str, Path], titles: Mapping[str, str]) -> str:
    """The headline scores of everyone who was scored, a row each."""
    records = {name: read_scores(path) for name, path in files.items() if path.is_file()}
    if not records:
        return ""
    legend = [score for score in next(iter(records.values()))["legend"] if score.get("is_headline")]
    width = max(len(titles[name]) for name in records)
    lines = [f"{'':{width}}  " + "  ".join(f"{score['name'][:20]:>20}" for score in legend)]
    for name, record in records.items():
        cells = [_cell(record["scores"].get(score["name"])) for score in legend]
        lines.append(f"{titles[name]:{width}}  " + "  ".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    return f"{entry['value']:.4g}" + ("" if entry.get("spread") is None else f" +- {entry['spread']:.2g}")
