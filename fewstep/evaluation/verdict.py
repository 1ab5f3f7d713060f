"""Is a student better than its teacher in few calls, or than the student before it? By the scores of `fewstep evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, Literal

from fewstep.evaluation.score_files import read_scores

Outcome = Literal["better", "worse", "same"]  # same: within the spread


@dataclass(frozen=True)
class Verdict:
    """One score of a student, against the same score of another model."""

    score: str
    better: str  # "lower" or "higher"
    value: float  # the student's
    other: float
    spread: float  # of the difference
    num: int = 0  # clips
    whose: str = "its teacher"  # of whom the other score is
    is_teacher: bool = True

    @property
    def outcome(self) -> Outcome:
        """Of the student: better or worse by more than the spread, or the same."""
        lead = self.other - self.value if self.better == "lower" else self.value - self.other
        return "better" if lead > self.spread else "worse" if -lead > self.spread else "same"

    @property
    def sentence(self) -> str:
        words = {"better": "better than", "worse": "WORSE than", "same": "as good, within the spread, as"}
        return f"{self.score}: the student is {words[self.outcome]} {self.whose}"

    def __str__(self) -> str:
        numbers = f"{self.value:.4g} against {self.other:.4g}, {self.better} is better, spread {self.spread:.2g}"
        return f"{self.sentence} ({numbers})"


def verdicts(student: Path, other: Path) -> list[Verdict]:
    """One for each headline score that tells the two files apart and has a better end.

    Zero for both tells nothing, nor does a Frechet distance of too few clips.
    """
    return list(_verdicts(read_scores(student), read_scores(other), other.stem))


def _verdicts(mine: Mapping[str, Any], other: Mapping[str, Any], stem: str) -> Iterator[Verdict]:
    notes = [*mine.get("notes", []), *other.get("notes", [])]
    is_teacher, calls = "sampler" in other, other.get("num_calls")
    whose = ("its teacher" if is_teacher else f"that of {stem}") + (f" in {_calls(calls)}" if is_teacher and calls else "")
    for score in mine["legend"]:
        name, better = score["name"], score.get("better")
        pair = [record["scores"].get(name) for record in (mine, other)]
        if better not in ("lower", "higher") or not score.get("is_headline"):
            continue
        if any(entry is None or entry["value"] is None for entry in pair) or pair[0]["value"] == pair[1]["value"] == 0:
            continue
        if name.startswith("frechet") and any("undetermined" in note for note in notes):
            continue
        spread, num = hypot(*(entry.get("spread") or 0.0 for entry in pair)), min(entry.get("num", 0) for entry in pair)
        yield Verdict(name, better, pair[0]["value"], pair[1]["value"], spread, num, whose, is_teacher)


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
        return f"As far as {clips} can tell, the student is as good as {whose}: no score differs by more than its spread."
    sides = [f"{outcome} in {' and '.join(outcomes[outcome])}" for outcome in ("better", "worse") if outcomes[outcome]]
    rest = f" In {same} of {len(scores)} scores they differ by less: {clips} do not rank them there." if same else ""
    return f"Against {whose} the student is, by more than the spread, {' and '.join(sides)}.{rest}"


def advice(scores: Sequence[Verdict]) -> list[str]:
    """What to do where a training made a student worse than the one that it began with."""
    worse = [one.score for one in scores if one.outcome == "worse" and not one.is_teacher]
    if not worse:
        return []
    return [
        f"The last training made the student worse in {' and '.join(worse)} than {scores[0].whose}: train it longer, or with a "
        "lower learning rate (optim.lr=..)."
    ]


def sentences(scores: Sequence[Verdict]) -> list[str]:
    """All that a terminal says of the verdicts against one model."""
    return [*map(str, scores), *advice(scores), conclusion(scores)]


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
