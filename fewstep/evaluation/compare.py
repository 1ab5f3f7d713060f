"""Which differences between models are real: `fewstep evaluate --compare A.json B.json C.json`.

Every file is compared with the first. Both were scored on the same prompts with the same noise, so differences are paired:

    scores of single clips       mean difference over clips, bootstrap interval over clips
    MMD, coverage, ..            difference of the scores of the same random halves of the clips, from the stored features
    all others                   difference of the two values, intervals added as if independent

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

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.bootstrap import halves, resampled
from fewstep.evaluation.mmd import mmd_of_subsets
from fewstep.evaluation.neighbours import of_subsets
from fewstep.evaluation.score_files import read_scores
from fewstep.files import write_json
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.text import fault_of

How = Literal["clip by clip", "same halves", "independent"]
Verdict = Literal["better", "worse", "no difference", "not measured"]


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
    features: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> _Scores:
        record = read_scores(path)
        if record.get("protocol") is None:
            raise UserError(f"{path}: is no file of scores with a protocol. Evaluate the model again")
        features = path.with_suffix("") / "features.safetensors"
        if not features.is_file():
            return cls(path, record, {})
        return cls(path, record, read_safetensors(features, "Evaluate the model again")[0])

    def per_clip(self, name: str) -> Tensor | None:
        columns = [part["per_clip"].get(name) for part in self.record["sets"]]
        if not columns or any(column is None for column in columns):
            return None
        return torch.tensor([math.nan if x is None else x for column in columns for x in column], dtype=torch.float64)


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
        _clip_by_clip(name, first, other, real) or _same_halves(name, first, other) or _independent(name, first, other, real)
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
    a, b = first.per_clip(name), other.per_clip(name)
    if a is None or b is None or len(a) != len(b):
        return None
    both = a.isfinite() & b.isfinite()
    if int(both.sum()) < 2:
        return None
    rows = torch.stack([a[both], b[both]], dim=1)

    def score(some: Tensor) -> float:
        mean_a, mean_b = some.mean(dim=0).tolist()
        return mean_b - mean_a if real is None else abs(mean_b - real) - abs(mean_a - real)

    spread = resampled(score, rows, draws=1000)
    return spread.value, spread.low, spread.high, "clip by clip", len(rows)


def _same_halves(name: str, first: _Scores, other: _Scores) -> _Found | None:
    score, _, network = name.partition("_")
    measure = {"mmd": mmd_of_subsets, "coverage": _coverage}.get(score)
    keys = sorted(key for key in first.features if key.endswith(f"/{network}"))
    if measure is None or not keys or not all(key in other.features for key in keys):
        return None
    values, variances, num = list[float](), list[float](), 0
    for key in keys:
        a, b, real = (rows.double() for rows in (first.features[key], other.features[key], first.features[f"{key}.real"]))
        if len(a) != len(b):
            return None
        if score == "coverage":  # of equal numbers of clips
            a, b, real = (rows[: min(len(a), len(real))] for rows in (a, b, real))
        subsets = [torch.arange(len(a)), *halves(len(a), 50)]
        pairs = zip(measure(a, real, subsets), measure(b, real, subsets), strict=True)
        whole, *some = (of_b - of_a for of_a, of_b in pairs)
        values.append(whole)
        variances.append(statistics.variance(some))
        num += len(a)
    value, reach = sum(values) / len(values), 1.96 * math.sqrt(sum(variances)) / len(variances)
    return value, value - reach, value + reach, "same halves", num


def _coverage(rows: Tensor, real: Tensor, subsets: Sequence[Tensor]) -> list[float]:
    k = min(5, max(1, len(rows) // 2 - 1))
    return [one.coverage for one in of_subsets(real, rows, [(subset, subset) for subset in subsets], k)]


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
    return "\n".join(lines)


def write(out: Path, rows: Sequence[Difference]) -> None:
    """Every difference as JSON, which knows no nan: null is what could not be measured."""
    cleaned = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()} for row in rows
    ]
    write_json(out, {"differences": cleaned})
