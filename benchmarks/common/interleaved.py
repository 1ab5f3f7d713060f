"""Iterations of the loop beside the bare calls in them, in turns and in one process.

The data set is the clock: the loop asks it for a batch once per iteration, so that the time between two requests is one whole
iteration as users run it. At each request the data set first does the bare calls of the iteration to come, on networks of its
own, and times them. Whatever else the machine does, it does to both.

On a CPU time is that of the process in all its threads, so that waiting for other processes does not count; on a GPU it is the
wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOCK = "wall clock" if DEVICE.type == "cuda" else "CPU time of the process"


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Timed:
    """Samples in memory, and the seconds of each iteration: bare, and in the loop."""

    def __init__(self, samples: Batch, bare: Callable[[int], None]):
        self.samples, self.bare = samples, bare
        self.bare_s: list[float] = []
        self.loop_s: list[float] = []
        self._left: float | None = None
        self._looked_at = False

    def __len__(self) -> int:
        return self.samples.size()

    def batch(self, index: Tensor) -> Batch:
        came = now()
        if not self._looked_at:  # the loop's own look at the data, before it begins
            self._looked_at = True
            return self.samples.rows(index)
        if self._left is not None:
            self.loop_s.append(came - self._left)
        began = now()
        self.bare(len(self.bare_s))
        self._left = now()
        self.bare_s.append(self._left - began)
        return self.samples.rows(index)


PREPARED: dict[str, Timed] = {}


@kind("timed", group="data")
@dataclass(frozen=True)
class TimedData:
    """What PREPARED holds under this name."""

    name: str

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"x0", "negative"})

    def open(self) -> Timed:
        return PREPARED[self.name]


@dataclass(frozen=True)
class Ratio:
    """Loop over bare, the seconds of an iteration in each, and how many were looked at."""

    value: float
    spread: tuple[float, float]  # with the lower and the upper quartiles in place of the medians
    bare_s: float
    loop_s: float
    runs: int

    def as_json(self) -> dict[str, Any]:
        return {
            "value": round(self.value, 4),
            "spread": [round(end, 4) for end in self.spread],
            "bare_ms": round(1e3 * self.bare_s, 2),
            "loop_ms": round(1e3 * self.loop_s, 2),
            "runs": self.runs,
        }


def ratio(bare_s: Sequence[float], loop_s: Sequence[float], kinds: Sequence[str]) -> Ratio:
    """Of an iteration of the mean kind. Each kind has the median of its ratios, weighed by its bare time and its number."""
    pairs: Mapping[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    num = min(len(bare_s), len(loop_s), len(kinds))
    for name, bare, loop in zip(kinds[:num], bare_s[:num], loop_s[:num], strict=True):
        pairs[name].append((bare, loop / bare))
    bare_total, loops = 0.0, [0.0, 0.0, 0.0]
    for found in pairs.values():
        if not found:
            continue
        weight = len(found) * statistics.median(bare for bare, _ in found)
        ratios = sorted(one for _, one in found)
        quarter = len(ratios) // 4
        ends = (ratios[quarter], statistics.median(ratios), ratios[-1 - quarter])
        bare_total += weight
        loops = [sum + weight * end for sum, end in zip(loops, ends, strict=True)]
    low, middle, high = (loop / bare_total for loop in loops)
    return Ratio(middle, (low, high), bare_total / num, loops[1] / num, num)
