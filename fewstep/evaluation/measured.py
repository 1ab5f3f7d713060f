"""What is kept of the clips of a set once they are measured, and the scorers that need no more than that.

Of every clip it is one row of features for each network, and its own scores. Parts that were measured by several processes, or
before and after a kill, are merged: any division of the work gives the same scores.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.evaluation.feature_set import FeatureSet
from fewstep.evaluation.score import ClipSet, Record, Scorer
from fewstep.files import parse_json, write_tensors
from fewstep.untrusted.safe_tensors import read_safetensors


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
            for scorer, measured in self.by_scorer.items()
            for network, features in measured.features.items()
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

    def real_clips(self, real: Path | str, cache: Path) -> ClipSet | None:
        """The real clips, if they are to be measured like the others; None where no scorer needs them, or `cache` has them."""
        return None

    def reference_of(self, measured: Measured, real: Path | str, cache: Path) -> Any:
        """The statistics of the real clips that `real_clips` gave, which are kept in `cache`."""
        raise AssertionError("only for scorers with real_clips")

    def score(self, samples: ClipSet, reference: Any) -> Record:
        return self.summary(self.measured(samples, range(len(samples.clips))), samples, reference)
