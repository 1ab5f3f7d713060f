"""Scores of sets of clips, and the contract of what computes them.

A scorer is a frozen dataclass registered with @kind(NAME, group="scorer"); `fewstep evaluate --scorer NAME` uses it, also one
from a file of the user's own (`--config FILE.py`):

    @kind("brightness", group="scorer")
    @dataclass(frozen=True)
    class Brightness(Scorer):
        legend = (Score("brightness", "Brightness", "Mean of all pixels, 0 to 255.", "as real", is_headline=True),)

        def score(self, samples, reference):
            values = [clip.mean() for clip in samples.clips]
            return Record("mean of pixels", {"brightness": mean_over_clips(values)}, per_clip={"brightness": values})

Its legend says what each score means and which direction is better. The summary line, the report and the demo's page show a
score as the legend has it. `per_clip`, or for a score of the whole set the draws of bootstrap.half_sampled, pair two models in
`--compare`.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.config import OneOf
from fewstep.data.controls import Control
from fewstep.data.files.video import Header
from fewstep.errors import UserError

Clip = NDArray[np.uint8]  # T H W 3
Better = Literal["lower", "higher", "as real"]
Need = Literal["real", "prompts", "controls"]


@dataclass(frozen=True)
class Score:
    """The name of a score and its explanation for a reader who does not know it."""

    name: str  # its key in Record.scores
    title: str
    meaning: str  # one sentence
    better: Better
    is_headline: bool = False  # headline scores stand in the summary line and have a card in the report


class Value(NamedTuple):
    """A number with its spread and the number of clips (groups, flights) behind it."""

    value: float
    spread: float = math.nan  # standard error of a set, or the deviation between sets if that is larger; nan: not measured
    num: int = 0  # clips (groups, flights), of all sets
    per_set: tuple[float, ...] = ()  # the value of each set, if there are several
    draws: tuple[float, ...] = ()  # the score of random halves, the same clip numbers for every model: pairs differences

    @classmethod
    def of_draws(cls, value: float, draws: Sequence[float], num: int) -> Value:
        """With the deviation of the draws as its spread. Draws that were not all measured pair nothing and are left out."""
        finite = [float(draw) for draw in draws if math.isfinite(draw)]
        spread = statistics.stdev(finite) if len(finite) > 1 else math.nan
        return cls(float(value), spread, num, draws=tuple(finite) if len(finite) == len(draws) else ())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The normal interval about the value; nan where no spread was measured."""
        reach = statistics.NormalDist().inv_cdf(0.5 + level / 2) * self.spread
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Record:
    """All scores of a set of clips, by name."""

    name: str  # what measured: a feature network with its hash, a method
    scores: Mapping[str, Value]
    num_reference: int = 0  # real clips that the set was compared with
    notes: tuple[str, ...] = ()  # what makes a score less than it seems
    anchors: Mapping[str, Mapping[str, Value]] = field(default_factory=dict[str, Mapping[str, Value]])  # scores of known clips
    per_clip: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])  # in the order of the set

    def __getitem__(self, name: str) -> Value:
        return self.scores[name]

    def joined(self, other: Record) -> Record:
        """The scores of two scorers on the same clips."""
        return Record(
            f"{self.name}; {other.name}",
            {**self.scores, **other.scores},
            max(self.num_reference, other.num_reference),
            (*self.notes, *other.notes),
            {**self.anchors, **other.anchors},
            {**self.per_clip, **other.per_clip},
        )

    def flat(self, who: str = "") -> dict[str, float]:
        """NAME_who, NAME_who_spread and NAME_who_n for each score, as summary.json has them."""
        end = f"_{who}" if who else ""
        out: dict[str, float] = {}
        for name, score in self.scores.items():
            out |= {f"{name}{end}": score.value, f"{name}{end}_spread": score.spread, f"{name}{end}_n": score.num}
        return out

    def table(self) -> str:
        """One line for each score."""
        lines = [f"{name:22} {s.value:10.4f} +- {s.spread:.4f}  n {s.num}" for name, s in self.scores.items()]
        return "\n".join([f"{self.name}, {self.num_reference} reference clips", *lines, *self.notes])


@dataclass(frozen=True)
class Signals:
    """The files of one control, one of each clip; None where there is none."""

    control: Control
    conditioned: Sequence[Path | None]  # the signal that the clip was conditioned on
    measured: Sequence[Path | None]  # the same signal, measured on the clip itself


@dataclass(frozen=True)
class ClipSet:
    """The clips of one evaluation set, and what they were made for. All sequences have one entry for each clip."""

    clips: Sequence[Clip]  # read or generated when they are asked for; their sizes may differ
    stems: Sequence[str] = ()  # names of the samples
    prompts: Sequence[str] = ()
    controls: Mapping[str, Signals] = field(default_factory=dict[str, Signals])
    truth: Sequence[Path | None] = ()  # the clip that each one should equal, for PSNR and SSIM; (): there is none
    sources: Sequence[Path | None] = ()  # the real clip whose caption and controls each one was made for; (): not known
    rates: Sequence[float] = ()  # frames per second that occur among the clips, where they are known
    num_given: int = 0  # frames of its source that each clip begins with: the model received them


class Scorer(ABC):
    """Computes scores of sets of clips. A subclass states its legend and what it needs, and implements `score`."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # checked before any clip is read or generated
    min_clips: ClassVar[int] = 1  # of a set

    @property
    @abstractmethod
    def legend(self) -> Sequence[Score]:
        """Every score it may give. By default the first one ranks ways to sample a model."""

    def protocol(self) -> Mapping[str, Any]:
        """What else decides a number, beyond the settings of the scorer: feature networks with their hashes."""
        return {}

    def suits(self, clip: Header, captions: Sequence[str]) -> bool:
        """Whether to take this scorer if none is named, by the first clip and its caption (none, if it has none)."""
        return False

    def reference(self, real: Path | str | None, cache: Path | None = None) -> Any:
        """Statistics of the real clips in a folder, for `score`; `cache` is a folder for those that are costly to compute."""
        return None

    @abstractmethod
    def score(self, samples: ClipSet, reference: Any) -> Record:
        """The scores of one set of clips. Go through them once, in order: a large set is not kept in memory."""

    def distance(self, samples: ClipSet, reference: Any) -> float:
        """One number, lower is better, by which ways to sample a model are ranked: by default the first of the legend."""
        first = self.legend[0]
        if first.better == "as real":
            raise UserError(
                f"--calls: this scorer ranks no models, since its first score, {first.name}, is neither low nor high"
            )
        value = self.score(samples, reference)[first.name].value
        return value if first.better == "lower" else -value


AnyScorer = Annotated[Scorer, OneOf("scorer")]  # a field that holds the configuration of one scorer


def mean_over_clips(values: Sequence[float]) -> Value:
    """The mean of one number for each clip, with its standard error. Clips without one (nan) are left out."""
    finite = [float(value) for value in values if math.isfinite(value)]
    spread = statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    return Value(statistics.fmean(finite) if finite else math.nan, spread, len(finite))


def over_sets(parts: Sequence[Value]) -> Value:
    """Mean over the sets; the spread is that within a set, or the deviation between sets if that is larger.

    A set in which nothing could be measured (no flight, for gravity) is nan and is left out of the mean; the mean over no set
    is nan. A draw is that of all sets together: their clips of one number are of one prompt.
    """
    draws = [part.draws for part in parts if math.isfinite(part.value)]
    values = [part.value for part in parts if math.isfinite(part.value)]
    within = [part.spread for part in parts if math.isfinite(part.spread)]
    spreads = ([statistics.mean(within)] if within else []) + ([statistics.stdev(values)] if len(values) > 1 else [])
    return Value(
        statistics.mean(values) if values else math.nan,
        max(spreads, default=math.nan),
        sum(part.num for part in parts),
        tuple(part.value for part in parts),
        tuple(map(statistics.fmean, zip(*draws, strict=True))) if len(set(map(len, draws))) == 1 else (),
    )
