"""The work of an evaluation in pieces: divided over processes, kept in files, continued after a kill.

    OUT/measured-HASH/set0.1of2.safetensors     what the second of two processes has measured of the first set so far

The piece with number p belongs to process p modulo their number, as torchrun numbers them (RANK, WORLD_SIZE); they need no
connection, only one file system. What is kept is small (measured.py), whatever the number and the length of the clips. It is
written every half minute, and read by the process that goes on. HASH is over all that decides a clip and its scores, so that
the parts of another model or protocol are not taken for these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.environment import Ranks
from fewstep.evaluation.measured import Divisible, Part
from fewstep.evaluation.score import Clip, ClipSet

WRITE_S = 30.0  # seconds between two writes of what is measured


class Seen(Sequence[Clip]):
    """Clips; `look` receives every one that is asked for, with its number."""

    def __init__(self, clips: Sequence[Clip], look: Callable[[int, Clip], None]) -> None:
        self._clips, self._look = clips, look

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, place: Any) -> Any:  # Any: a number or a slice
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        clip = self._clips[place]
        self._look(place, clip)
        return clip


@dataclass(frozen=True)
class Job:
    """A set of clips to be measured."""

    name: str
    samples: ClipSet
    scorers: Mapping[str, Divisible]
    keep: Callable[[int, Clip], None] = lambda number, clip: None  # is given each clip once

    def __len__(self) -> int:
        return len(self.samples.clips)


@dataclass(frozen=True)
class Shares:
    """The folder of what is measured, and the place of this process among the others."""

    folder: Path
    ranks: Ranks
    size: int  # clips in a piece

    def measure(self, job: Job) -> Part | None:
        """Measures this process's share of a set. Returns what is measured of the whole, or None where others still work."""
        own = self._file(job)
        part = Part.read(own) or Part()
        others = frozenset[int]().union(*(other.numbers for other in self._others(job)))
        written, is_new = time.monotonic(), False
        for numbers in self._pieces(len(job)):
            todo = [number for number in numbers if number not in part.numbers and number not in others]
            if not todo:
                continue
            part, is_new = part.merge(_measured(job, todo)), True
            if time.monotonic() - written >= WRITE_S:
                part.write(own)
                written, is_new = time.monotonic(), False
        if is_new and (self.ranks.size > 1 or own.is_file()):
            part.write(own)
        whole = part
        for other in self._others(job):
            whole = whole.merge(other)
        return whole if len(whole.numbers) == len(job) else None

    def _pieces(self, num: int) -> Iterator[range]:
        for piece, first in enumerate(range(0, num, self.size)):
            if piece % self.ranks.size == self.ranks.rank:
                yield range(first, min(first + self.size, num))

    def _file(self, job: Job) -> Path:
        return self.folder / f"{job.name}.{self.ranks.rank}of{self.ranks.size}.safetensors"

    def _others(self, job: Job) -> list[Part]:
        paths = sorted(self.folder.glob(f"{job.name}.*of*.safetensors"))
        parts = [Part.read(path) for path in paths if path != self._file(job)]
        return [part for part in parts if part is not None]  # None: another process has just removed the folder, being done


def _measured(job: Job, numbers: Sequence[int]) -> Part:
    shapes, fresh = set[tuple[int, ...]](), set(numbers)

    def look(number: int, clip: Clip) -> None:
        shapes.add(clip.shape[:3])
        if number in fresh:
            fresh.remove(number)
            job.keep(number, clip)

    samples = replace(job.samples, clips=Seen(job.samples.clips, look))
    by_scorer = {name: scorer.measured(samples, numbers) for name, scorer in job.scorers.items()}
    return Part(frozenset(numbers), frozenset(shapes), by_scorer)
