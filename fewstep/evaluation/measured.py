"""What is kept of the clips of a set once they are measured, the scorers that need no more than that, and their work in pieces.

Of every clip it is one row of features for each network, and its own scores. Parts that were measured by several processes, or
before and after a kill, are merged: any division of the work gives the same scores.

    OUT/measured-HASH/set0.1of2.safetensors     what the second of two processes has measured of the first set so far
    cache/clips-HASH.safetensors                real clips, which the next model is compared with, too

The piece with number p belongs to process p modulo their number, as torchrun numbers them (RANK, WORLD_SIZE); they need no
connection, only one file system. A part is written every half minute, and read by the process that goes on.
"""

from __future__ import annotations

import json
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.environment import Ranks
from fewstep.errors import UserError
from fewstep.evaluation.feature_set import FeatureSet
from fewstep.evaluation.score import Clip, ClipSet, Record, Scorer
from fewstep.files import remove, write_tensors
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.text import parse_json

WRITE_S = 30.0  # seconds between two writes of what is measured


@dataclass(frozen=True)
class Measured:
    """What one scorer keeps of some clips."""

    features: Mapping[str, FeatureSet] = field(default_factory=dict[str, FeatureSet])  # by the name of the network
    per_clip: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])  # by number of the clip

    def merge(self, other: Measured) -> Measured:
        """Both together, of clips that are in one of them only."""
        names = dict.fromkeys((*self.features, *other.features))
        none = FeatureSet()
        features = {name: self.features.get(name, none).merge(other.features.get(name, none)) for name in names}
        return Measured(features, {**self.per_clip, **other.per_clip})

    def columns(self) -> dict[str, list[float]]:
        """The scores of single clips by name, in the order of the clips' numbers; nan for a clip without one."""
        rows = [self.per_clip[number] for number in sorted(self.per_clip)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}


@dataclass(frozen=True)
class Part:
    """What all scorers keep of some clips of a set, and which clips these are."""

    numbers: frozenset[int] = frozenset()
    shapes: frozenset[tuple[int, ...]] = frozenset()  # frames, height, width
    by_scorer: Mapping[str, Measured] = field(default_factory=dict[str, Measured])

    def merge(self, other: Part) -> Part:
        """Both together. Raises UserError if a clip is in both."""
        if twice := self.numbers & other.numbers:
            raise UserError(f"{len(twice)} clips were measured twice, number {min(twice)} for instance")
        names = dict.fromkeys((*self.by_scorer, *other.by_scorer))
        none = Measured()
        merged = {name: self.by_scorer.get(name, none).merge(other.by_scorer.get(name, none)) for name in names}
        return Part(self.numbers | other.numbers, self.shapes | other.shapes, merged)

    def write(self, path: Path) -> None:
        """One file, which `read` takes back bit by bit."""
        tensors = {
            f"{scorer}/{network}/{key}": tensor
            for scorer, one_scorer in self.by_scorer.items()
            for network, features in one_scorer.features.items()
            for key, tensor in features.state_dict().items()
        }
        per_clip = {scorer: {str(n): row for n, row in one.per_clip.items()} for scorer, one in self.by_scorer.items()}
        about = {"numbers": sorted(self.numbers), "shapes": sorted(self.shapes), "per_clip": per_clip}
        write_tensors(path, tensors or {"none": torch.zeros(1)}, {"about": json.dumps(about)})

    @classmethod
    def read(cls, path: Path) -> Part | None:
        """None where there is no file, or a damaged one, whose clips are to be measured again."""
        states: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        try:
            tensors, metadata = read_safetensors(path, "")
            about = parse_json(metadata.get("about", ""), str(path), "")
            for name, tensor in tensors.items():
                if name.count("/") == 2:
                    scorer, network, key = name.split("/")
                    states.setdefault(scorer, {}).setdefault(network, {})[key] = tensor
            by_scorer = {
                scorer: Measured(
                    {network: FeatureSet.of_state(state) for network, state in states.get(scorer, {}).items()},
                    {int(number): row for number, row in rows.items()},
                )
                for scorer, rows in about["per_clip"].items()
            }
            return cls(frozenset(about["numbers"]), frozenset(map(tuple, about["shapes"])), by_scorer)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return None


class Divisible(Scorer):
    """A scorer that keeps little of each clip: its work is divided over processes, and goes on where it was after a kill."""

    @abstractmethod
    def measured(self, samples: ClipSet, numbers: Sequence[int]) -> Measured:
        """What is kept of the clips with these numbers of the set."""

    @abstractmethod
    def summary(self, measured: Measured, samples: ClipSet, reference: Any) -> Record:
        """The scores of the whole set."""

    def real_clips(self, real: Path | str) -> ClipSet | None:
        """The real clips, which are measured like the others; None where the scorer needs none."""
        return None

    def reference_of(self, measured: Measured, real: Path | str) -> Any:
        """The statistics of the real clips of `real_clips`."""
        raise AssertionError("only for scorers with real_clips")

    def reference(self, real: Path | str | None, cache: Path | None = None) -> Any:
        samples = None if real is None else self.real_clips(real)
        if real is None or samples is None:
            return None
        return self.reference_of(self.measured(samples, range(len(samples.clips))), real)

    def score(self, samples: ClipSet, reference: Any) -> Record:
        return self.summary(self.measured(samples, range(len(samples.clips))), samples, reference)


# ---- in pieces -------------------------------------------------------------------------------------------------------


class Watch(Sequence[Clip]):
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
        last_write, is_new = time.monotonic(), False
        for numbers in self._pieces(len(job)):
            todo = [number for number in numbers if number not in part.numbers and number not in others]
            if not todo:
                continue
            part, is_new = part.merge(_part_of(job, todo)), True
            if time.monotonic() - last_write >= WRITE_S:
                part.write(own)
                last_write, is_new = time.monotonic(), False
        if is_new and (self.ranks.size > 1 or own.is_file()):
            part.write(own)
        whole = part
        for other in self._others(job):
            whole = whole.merge(other)
        return whole if len(whole.numbers) == len(job) else None

    def measure_once(self, job: Job) -> Part | None:
        """The same, or what was measured of the whole before: it is kept in one file."""
        path = self.folder / f"{job.name}.safetensors"
        part = Part.read(path)
        if part is not None:
            return part
        part = self.measure(job)
        if part is None:
            return Part.read(path)  # which another process may just have written
        part.write(path)
        for piece in self.folder.glob(f"{job.name}.*of*.safetensors"):
            remove(piece)
        return part

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


def _part_of(job: Job, numbers: Sequence[int]) -> Part:
    shapes, fresh = set[tuple[int, ...]](), set(numbers)

    def look(number: int, clip: Clip) -> None:
        shapes.add(clip.shape[:3])
        if number in fresh:
            fresh.remove(number)
            job.keep(number, clip)

    samples = replace(job.samples, clips=Watch(job.samples.clips, look))
    by_scorer = {name: scorer.measured(samples, numbers) for name, scorer in job.scorers.items()}
    return Part(frozenset(numbers), frozenset(shapes), by_scorer)
