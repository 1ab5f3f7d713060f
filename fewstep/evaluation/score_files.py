"""Files of scores, as `fewstep evaluate` writes and people edit them: checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fewstep.evaluation.score import Score
from fewstep.untrusted.text import MAX_JSON_BYTES, Count, parse_json, read_bytes

AGAIN = "Evaluate the model again"


@dataclass(frozen=True)
class _Value:
    value: float | None
    spread: float | None = None
    num: Count = 0
    draws: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class _Set:
    per_clip: dict[str, list[float | None]] = field(default_factory=dict[str, Any])
    prompts: list[str | None] | None = None
    stems: list[str | None] | None = None


@dataclass(frozen=True)
class _Latency:
    clips_per_s_end_to_end: float
    repeats: int
    device: str = ""


@dataclass(frozen=True)
class _File:
    """What a file of scores must be, as far as it is read."""

    what: str
    scores: dict[str, _Value]
    legend: list[Score]
    sets: list[_Set]
    protocol: dict[str, Any] | None = None
    num_calls: int | None = None
    guidance: float | None = None
    notes: list[str] = field(default_factory=list[str])
    latency: _Latency | None = None
    anchors: dict[str, dict[str, _Value]] = field(default_factory=dict[str, Any])


def read_scores(path: Path) -> Mapping[str, Any]:
    """The record in a file of scores. Raises UserError, which names the key that is wrong, or OSError."""
    content = read_bytes(path, MAX_JSON_BYTES)
    parse_json(content, str(path), AGAIN, _File)
    record = parse_json(content, str(path), AGAIN)
    names = {f.name for f in fields(Score)}
    return record | {"legend": [{key: value for key, value in row.items() if key in names} for row in record["legend"]]}
