"""Is a student better than its teacher in few calls, or than the student before it? By the scores of `fewstep evaluate`.

A score tells two models apart where the 95 % interval of their difference does not hold 0, as in `evaluate --compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.evaluation.compare import COVERS, compare
from fewstep.evaluation.score_files import read_scores

Outcome = Literal["better", "worse", "same"]  # same: not told apart


@dataclass(frozen=True)
class Verdict:
    """One score of a student, against the same score of another model."""

    score: str
    better: str  # "lower" or "higher"
    value: float  # the student's
    other: float
    low: float  # of the 95 % interval of value - other
    high: float
    num: int = 0  # clips
    whose: str = "its teacher"  # of whom the other score is
    is_teacher: bool = True

    @property
    def outcome(self) -> Outcome:
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.value < self.other) == (self.better == "lower") else "worse"

    @property
    def sentence(self) -> str:
        words = {"better": "better than", "worse": "WORSE than", "same": "as good, as far as these clips tell, as"}
        return f"{self.score}: the student is {words[self.outcome]} {self.whose}"

    def __str__(self) -> str:
        numbers = (
            f"{self.value:.4g} against {self.other:.4g}, {self.better} is better, difference {self.low:.2g} to {self.high:.2g}"
        )
        return f"{self.sentence} ({numbers})"


def verdicts(student: Path, other: Path) -> list[Verdict]:
    """One for each headline score that has a better end and an interval.

    Zero for both tells nothing, nor does a Frechet distance of too few clips. Raises UserError for scores of unlike protocols.
    """
    mine, others = read_scores(student), read_scores(other)
    notes = [*mine.get("notes", []), *others.get("notes", [])]
    is_few = any("undetermined" in note for note in notes)
    better = {score["name"]: score.get("better") for score in others["legend"]}  # which compare reads, too
    is_teacher, calls = "sampler" in others, others.get("num_calls")
    whose = ("its teacher" if is_teacher else other.stem) + (f" in {_calls(calls)}" if is_teacher and calls else "")
    return [
        Verdict(row.score, better[row.score], row.value_other, row.value_first, row.low, row.high, row.num, whose, is_teacher)
        for row in compare([other, student], headlines=True)
        if better[row.score] in ("lower", "higher") and row.verdict != "not measured"
        if not (row.value_first == row.value_other == 0) and not (is_few and row.score.startswith("frechet"))
    ]


def conclusion(scores: Sequence[Verdict]) -> str:
    """All verdicts against one model in a sentence or two, for people: by which scores they differ, and which tell nothing."""
    if not scores:
        return "No score tells the two apart: score more clips (--num-eval, --num)."
    outcomes: Mapping[Outcome, list[str]] = {
        outcome: [one.score for one in scores if one.outcome == outcome] for outcome in ("better", "worse", "same")
    }
    num, same, whose = max(one.num for one in scores), len(outcomes["same"]), scores[0].whose
    clips = f"{num} clips" if num else "so few clips"
    if same == len(scores):
        return f"As far as {clips} can tell, the student is as good as {whose}: no score tells the two apart."
    sides = [f"{outcome} in {_list(outcomes[outcome])}" for outcome in ("better", "worse") if outcomes[outcome]]
    rest = f" By {same} of {len(scores)} scores {clips} do not tell them apart." if same else ""
    return f"Against {whose} the student is {', and '.join(sides)}.{rest}"


def _list(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def advice(scores: Sequence[Verdict]) -> list[str]:
    """What to do where a training made a student worse than the one that it began with."""
    worse = [one.score for one in scores if one.outcome == "worse" and not one.is_teacher]
    if not worse:
        return []
    return [
        f"The last training made the student worse in {_list(worse)} than {scores[0].whose}: train it longer, or with a "
        "lower learning rate (optim.lr=..)."
    ]


def sentences(scores: Sequence[Verdict]) -> list[str]:
    """All that a terminal says of the verdicts against one model."""
    return [*map(str, scores), *advice(scores), conclusion(scores), *([COVERS] if scores else [])]


def table(files: Mapping[str, Path], titles: Mapping[str, str]) -> str:
    """The headline scores of everyone who was scored, a row each, with the network calls for a clip."""
    records = {name: read_scores(path) for name, path in files.items() if path.is_file()}
    if not records:
        return ""
    legend = [score for score in next(iter(records.values()))["legend"] if score.get("is_headline")]
    names = {name: _with_calls(titles[name], record.get("num_calls")) for name, record in records.items()}
    width = max(map(len, names.values()))
    lines = [f"{'':{width}}  " + "  ".join(f"{score['name'][:20]:>20}" for score in legend)]
    for name, record in records.items():
        cells = [_cell(record["scores"].get(score["name"])) for score in legend]
        lines.append(f"{names[name]:{width}}  " + "  ".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _with_calls(title: str, num: int | None) -> str:
    return f"{title}, {_calls(num)}" if num and "call" not in title else title


def _calls(num: int) -> str:
    return f"{num} call{'s' * (num != 1)}"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "-"
    return f"{entry['value']:.4g}" + ("" if entry.get("spread") is None else f" +- {entry['spread']:.2g}")
