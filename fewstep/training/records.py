"""What run folders say about their runs: settings, progress and scores, from their files alone. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.environment import output_root
from fewstep.errors import UserError
from fewstep.untrusted.text import read_json, read_json_lines

CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"
DIVERGED = "diverged.json"  # why the same command would not finish the run either
_COSTS = ("step", "samples", "student_updates", "rollbacks", "wall_s", "peak_memory_gib", "num_processes")
_RATES = ("samples_per_s", "memory_gib", "derivative_error")
State = Literal["finished", "unfinished", "diverged", "damaged", "refused"]  # refused: of a sweep, never begun


@dataclass(frozen=True)
class RunRecord:
    """One run folder. values: of summary.json, or of an unfinished run the newest of metrics.jsonl."""

    folder: Path
    settings: Mapping[str, str]  # by dotted key
    values: Mapping[str, float]
    step: int
    state: State

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Of a folder with a config.yaml; a run whose files cannot be read is damaged, and has no values."""
        try:
            settings = dict(flat(read_yaml_mapping(read_text(folder / CONFIG), str(folder / CONFIG))))
            newest = newest_metrics(folder / METRICS)
            step = int(newest.pop("step", 0))
            if (folder / SUMMARY).is_file():
                summary = read_json(folder / SUMMARY, "Train again to write it anew")
                newest |= {name: float(value) for name, value in summary.items() if _is_number(value)}
                # A finished run goes on with a larger trainer.max_iter, and its summary.json is old until it ends.
                last = int(newest["step"])
                has_patience = settings.get("checkpoint.patience", "none") != "none"  # which may have ended it earlier
                if last >= int(settings.get("trainer.max_iter", 0)) or (has_patience and step <= last):
                    return cls(folder, settings, newest, max(step, last), "finished")
                step = max(step, last)
        except (UserError, OSError, AttributeError, KeyError, ValueError):
            return cls(folder, {}, {}, 0, "damaged")
        return cls(folder, settings, newest, step, "diverged" if (folder / DIVERGED).is_file() else "unfinished")

    @property
    def name(self) -> str:
        """The folder, as it is called below OUTPUT_ROOT."""
        root = output_root()
        return str(self.folder.relative_to(root)) if self.folder.is_relative_to(root) else str(self.folder)

    @property
    def scores(self) -> dict[str, float]:
        """What previews measured, then losses and health; without costs, rates, and the values before the first step."""
        names = [name for name in self.values if name not in (*_COSTS, *_RATES) and not name.endswith("_undistilled")]
        measured = [name for name in names if "/" not in name or (name.startswith("preview/") and name.endswith("_mse"))]
        rest = [name for name in names if name.startswith(("loss/", "health/"))]
        return {name: self.values[name] for name in (*measured, *rest)}


def find_runs(root: Path) -> Iterator[RunRecord]:
    """Every run folder at or below `root`, in order of their names. What lies inside of a run folder is not looked at."""
    for place, folders, files in os.walk(root):
        folders.sort()
        if CONFIG in files and (METRICS in files or SUMMARY in files or "checkpoints" in folders):
            folders.clear()
            yield RunRecord.read(Path(place))


def run_at(name: str) -> RunRecord:
    """The run in a folder, given by its path or as PROJECT/GROUP/NAME below OUTPUT_ROOT. Raises UserError."""
    for folder in (Path(name), output_root() / name):
        if (folder / CONFIG).is_file():
            return RunRecord.read(folder)
    raise UserError(f"{name}: is no run folder, which has a {CONFIG}. All there are: fewstep ls runs")


def best_first(records: Sequence[RunRecord], score: str, highest: bool = False) -> list[RunRecord]:
    """The runs by a score, the lowest first (with `highest`, the highest); those without it last."""

    def rank(record: RunRecord) -> tuple[bool, float]:
        value = record.values.get(score, math.nan)
        return (True, 0.0) if math.isnan(value) else (False, -value if highest else value)

    return sorted(records, key=rank)


def score_of(records: Sequence[RunRecord], name: str | None) -> str | None:
    """`name`, if some run has such a value; None: the first score that most runs have. Raises UserError."""
    every = list(dict.fromkeys(key for record in records for key in record.values))
    if name is not None and name not in every and records:
        raise UserError(f"--by {name}: no run has it; there are {', '.join(every) or 'no values yet'}")
    if name is not None:
        return name
    counts = Counter(key for record in records for key in record.scores)
    return max(counts, key=lambda key: counts[key], default=None)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:  # Any: plain data, as YAML has them
    """Settings by dotted key, as text."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def metrics_of(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl; one that a killed process left unfinished is skipped."""
    for record in read_json_lines(path):
        if _is_number(record.get("step")):
            yield {name: float(value) for name, value in record.items() if _is_number(value)}


def newest_metrics(path: Path) -> dict[str, float]:
    """The newest value of each name."""
    newest: dict[str, float] = {}
    for record in metrics_of(path):
        newest |= record
    return newest


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first row is their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def number(value: float | None) -> str:
    """For a table; - where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
