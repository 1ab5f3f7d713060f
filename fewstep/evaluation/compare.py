"""Which differences between models are real: `fewstep evaluate --compare A.json B.json C.json`.

Every file is compared with the first. Both were scored on the same prompts with the same noise, so differences are paired:

    clip by clip    scores of single clips: the mean difference, with its error over the prompts
    same halves     scores of sets: the difference of the values, with its deviation over the same random halves of the clips
    independent     scores of which a file keeps neither: intervals added as if independent, which are wide

"As real" scores are compared by their distance from the real clips' value. A difference is real where its 95 % interval does
not hold 0. Files with different protocols are refused: their numbers do not compare.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError
from fewstep.evaluation.bootstrap import student_quantile
from fewstep.evaluation.score_files import read_scores
from fewstep.files import write_json
from fewstep.untrusted.text import fault_of

How = Literal["clip by clip", "same halves", "independent"]
Verdict = Literal["better", "worse", "no difference", "not measured"]
_Floats = NDArray[np.float64]

COVERS = (
    "Intervals cover other prompts and noises for the same weights, not another training: "
    "two trainings of one recipe can differ by more."
)
WIDE = (
    "independent: not both files keep what pairs the score, so that its interval is wide. Evaluate both models again; "
    "a scorer of your own returns Record(per_clip=..) or Value(draws=..)."
)


@dataclass(frozen=True)
class Difference:
    """One score of one file against that of the first."""

    score: str
    title: str
    first: str  # file
    other: str
    value_first: float
    value_other: float
    difference: float  # other - first; of "as real" scores: of their distances from the real value
    low: float
    high: float
    verdict: Verdict  # of the other
    how: How
    num: int


@dataclass(frozen=True)
class _Scores:
    path: Path
    record: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Scores:
        record = read_scores(path)
        if record.get("protocol") is None:
            raise UserError(f"{path}: is no file of scores with a protocol. Evaluate the model again")
        return cls(path, record)

    def per_clip(self, name: str) -> NDArray[np.float64] | None:
        """The score of each clip (set, number); None where a set has none."""
        columns = [part["per_clip"].get(name) for part in self.record["sets"]]
        if not columns or any(column is None or len(column) != len(columns[0]) for column in columns):
            return None
        return np.array([[math.nan if x is None else x for x in column] for column in columns])


def compare(files: Sequence[Path], *, headlines: bool = False) -> list[Difference]:
    """The differences of every score, or of the headline scores only, of each file from the first one's."""
    parts = [_Scores.read(path) for path in files]
    with fault_of(f"{parts[0].path} and what it is compared with", "Evaluate the models again"):
        problems = [f"{part.path}: {text}" for part in parts[1:] for text in unlike(parts[0].record, part.record)]
        if problems:
            raise UserError(f"scores of unlike protocols do not compare with {parts[0].path}:\n" + "\n".join(problems))
        legend = {row["name"]: row for row in parts[0].record["legend"] if row["is_headline"] or not headlines}
        rows = [(row, other) for other in parts[1:] for row in legend.values() if _both(row, parts[0], other)]
        return [_difference(row, parts[0], other) for row, other in rows]


def unlike(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two protocols."""
    own, theirs = first["protocol"], other["protocol"]
    keys = dict.fromkeys((*own, *theirs))
    differing = [key for key in keys if own.get(key) != theirs.get(key)]
    out = [f"{key} is {theirs.get(key)!r}, not {own.get(key)!r}" for key in differing]
    shapes = [shape for protocol in (own, theirs) for shape in protocol.get("frames_height_width") or []]
    if (
        set(differing) in ({"frames_height_width"}, {"frames_height_width", "scorers"})
        and len({tuple(s[1:]) for s in shapes}) == 1
    ):
        out.append(f"their clips differ in length: score both with --num-frames {min(s[0] for s in shapes)}, or fewer")
    return out


def _both(row: Mapping[str, Any], *parts: _Scores) -> bool:
    return all(row["name"] in part.record["scores"] for part in parts)


def _difference(row: Mapping[str, Any], first: _Scores, other: _Scores) -> Difference:
    name, better = row["name"], row["better"]
    values = [part.record["scores"][name]["value"] for part in (first, other)]
    a, b = (math.nan if value is None else float(value) for value in values)
    real = _real(first.record, name) if better == "as real" else None
    value, low, high, how, num = (
        _clip_by_clip(name, first, other, real)
        or _same_halves(name, first, other, real)
        or _independent(name, first, other, real)
    )
    if not all(map(math.isfinite, (value, low, high))) or (better == "as real" and real is None):
        verdict: Verdict = "not measured"
    elif low <= 0 <= high:
        verdict = "no difference"
    else:
        verdict = "better" if (value < 0) == (better != "higher") else "worse"
    return Difference(name, row["title"], str(first.path), str(other.path), a, b, value, low, high, verdict, how, num)


_Found = tuple[float, float, float, How, int]


def _real(record: Mapping[str, Any], name: str) -> float | None:
    """The value of the real clips."""
    values = [part[name]["value"] for part in record.get("anchors", {}).values() if name in part]
    return values[0] if values and values[0] is not None else None


def _clip_by_clip(name: str, first: _Scores, other: _Scores, real: float | None) -> _Found | None:
    """The error is that over clip numbers: the clips of one number in all sets are of one prompt."""
    a, b = first.per_clip(name), other.per_clip(name)
    if a is None or b is None or a.shape != b.shape:
        return None
    both = np.isfinite(a) & np.isfinite(b)
    counts = both.sum(axis=0)
    num = int((counts > 0).sum())
    if num < 2:
        return None
    each = np.where(both, _apart(a, b, float(a[both].mean()), float(b[both].mean()), real), 0.0)
    value = float(each.sum() / counts.sum())
    residuals = (each.sum(axis=0) - value * counts)[counts > 0] / counts[counts > 0].mean()
    reach = student_quantile(num - 1) * float(residuals.std(ddof=1)) / math.sqrt(num)
    return value, value - reach, value + reach, "clip by clip", int(counts.sum())


def _same_halves(name: str, first: _Scores, other: _Scores, real: float | None) -> _Found | None:
    """The error is the deviation of the difference between random halves of the clips."""
    a, b = (part.record["scores"][name] for part in (first, other))
    counts = {len(part.get("draws", ())) for part in (a, b)}
    if a["value"] is None or b["value"] is None or len(counts) > 1 or min(counts) < 2:
        return None
    of_a, of_b = (np.array([part["value"], *part["draws"]], dtype=np.float64) for part in (a, b))
    value, *each = _apart(of_a, of_b, a["value"], b["value"], real).tolist()
    error = statistics.stdev(each)
    num = min(a["num"], b["num"])
    num_prompts = max(2, num // len(first.record["sets"]))
    reach = error * student_quantile(1 / (1 / (len(each) - 1) + 1 / (num_prompts - 1)))  # few draws, of few clips
    return value, value - reach, value + reach, "same halves", num


def _apart(a: _Floats, b: _Floats, of_a: float, of_b: float, real: float | None) -> _Floats:
    """b - a; of "as real" scores how much farther b is from the real value, on the sides of it on which the scores are."""
    if real is None:
        return b - a
    side_a, side_b = (1.0 if of >= real else -1.0 for of in (of_a, of_b))
    return side_b * (b - real) - side_a * (a - real)


def _independent(name: str, first: _Scores, other: _Scores, real: float | None) -> _Found:
    a, b = (part.record["scores"][name] for part in (first, other))
    if a["value"] is None or b["value"] is None:
        return math.nan, math.nan, math.nan, "independent", 0
    value = b["value"] - a["value"] if real is None else abs(b["value"] - real) - abs(a["value"] - real)
    reach = 1.96 * math.hypot(*(math.nan if part["spread"] is None else part["spread"] for part in (a, b)))
    return value, value - reach, value + reach, "independent", min(a["num"], b["num"])


def table(rows: Sequence[Difference]) -> str:
    """A line for each score of each file; those whose difference is real first."""
    lines: list[str] = []
    for other in dict.fromkeys(row.other for row in rows):
        mine = [row for row in rows if row.other == other]
        counts = ", ".join(
            f"{sum(row.verdict == word for row in mine)} {word}" for word in ("better", "worse", "no difference")
        )
        lines.append(f"{other} against {mine[0].first}: {counts}")
        for row in sorted(mine, key=lambda row: ("worse", "better", "no difference", "not measured").index(row.verdict)):
            interval = f"[{row.low:.3g}, {row.high:.3g}]" if math.isfinite(row.low) else "no interval"
            lines.append(
                f"  {row.verdict:13}  {row.score:28} {row.value_first:10.4g} -> {row.value_other:10.4g}   "
                f"difference {row.difference:9.3g} {interval}  ({row.how}, {row.num} clips)"
            )
    if any(row.how == "independent" and row.verdict != "not measured" for row in rows):
        lines.append(WIDE)
    return "\n".join([*lines, COVERS])


def write(out: Path, rows: Sequence[Difference]) -> None:
    """Every difference as JSON, which knows no nan: null is what could not be measured."""
    cleaned = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()} for row in rows
    ]
    write_json(out, {"differences": cleaned})
