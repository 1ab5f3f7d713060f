"""The features of a set of clips, and the scores between two such sets.

A set arrives clip by clip, from one process or from several, and is merged by the numbers of its clips: any division of the
work gives the same set. Of each clip it keeps the mean of its rows (one row for a video network, one for each frame for a
frame network); of all rows, the moments of ten groups of clips, from which Frechet distances of everything and of random halves
follow. So memory is one row a clip, whatever the length of the clips.

    frechet         the squared Frechet distance over all rows, as the literature has it: biased upwards by about c / n
    frechet_bias    that bias, estimated: what halves of both sets have more than the whole; subtract it, or compare at equal n
    mmd             unbiased, cubic kernel, over clips: the better score for few clips
    precision, recall, density, coverage                k = 5 (fewer for less than 12 clips), as many real clips as others
    vendi           effective number of different clips
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.bootstrap import REAL, half_sampled, halves
from fewstep.evaluation.diversity import vendi
from fewstep.evaluation.frechet import Moments, frechet_score
from fewstep.evaluation.mmd import mmd_of_subsets
from fewstep.evaluation.neighbours import num_zero_balls, of_subsets
from fewstep.evaluation.score import Value

GROUPS = 10  # of clips, by number; halves of a set are five of them
HALVINGS = 5  # random divisions of the groups; each gives two halves
LEAST = 4  # clips of a set that can be compared with another


class FeatureSet:
    """Features of clips that arrive in any order; see the top of the file."""

    def __init__(self) -> None:
        self._clips: dict[int, Tensor] = {}  # number of the clip: mean of its rows, float32
        self._groups = [Moments() for _ in range(GROUPS)]

    def update(self, rows: Tensor, numbers: Sequence[int]) -> None:
        """Adds rows (B, k, d) of the clips with these numbers in their set."""
        bad = ~rows.isfinite().flatten(1).all(dim=1)
        if bad.any():
            raise UserError(f"the features of clip {numbers[int(bad.nonzero()[0])]} are not finite: look at that clip")
        for clip, number in zip(rows, numbers, strict=True):
            self._clips[number] = clip.double().mean(dim=0).float()
            self._groups[number % GROUPS].update(clip)

    def merge(self, other: FeatureSet) -> FeatureSet:
        """Both sets together; neither is changed. Raises UserError if a clip is in both."""
        twice = self._clips.keys() & other._clips.keys()
        if twice:
            raise UserError(f"{len(twice)} clips are in both parts, number {min(twice)} for instance")
        out = FeatureSet()
        out._clips = {**self._clips, **other._clips}
        out._groups = [own.merge(theirs) for own, theirs in zip(self._groups, other._groups, strict=True)]
        return out

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def clips(self) -> Tensor:
        """One row for each clip (n, d), in the order of their numbers."""
        return torch.stack([self._clips[number] for number in sorted(self._clips)])

    def moments(self, groups: Sequence[int] = range(GROUPS)) -> Moments:
        """Mean and covariance of all rows, or of those of some groups of clips."""
        out = Moments()
        for group in groups:
            out = out.merge(self._groups[group])
        return out

    def halves(self) -> tuple[FeatureSet, FeatureSet]:
        """The clips of every other group, and the rest."""
        parts = FeatureSet(), FeatureSet()
        for number, row in self._clips.items():
            parts[number % 2]._clips[number] = row
        for number, group in enumerate(self._groups):
            parts[number % 2]._groups[number] = group
        return parts

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `of_state` takes back; safetensors can hold them."""
        state = {"numbers": torch.tensor(sorted(self._clips)), "clips": self.clips}
        for number, group in enumerate(self._groups):
            state |= {f"group{number}.{name}": tensor for name, tensor in group.state_dict().items()}
        return state

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> FeatureSet:
        """The set whose `state_dict` this was."""
        out = cls()
        out._clips = dict(zip(state["numbers"].tolist(), state["clips"], strict=True))
        for number, group in enumerate(out._groups):
            group.load_state_dict({name: state[f"group{number}.{name}"] for name in ("count", "mean", "scatter")})
        return out


class Scale(NamedTuple):
    """What is subtracted from each feature, and what it is divided by."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, real: FeatureSet) -> Scale:
        """That makes the real clips zero on average with a deviation of 1; a feature that hardly changes keeps its unit.

        Hardly: a thousandth of what features do. Otherwise clips in which it does change are farther away than all else.
        """
        rows = real.clips.double()
        deviation = rows.std(dim=0)
        least = max(1e-6, 1e-3 * float(deviation.median()))
        return cls(rows.mean(dim=0), torch.where(deviation > least, deviation, torch.ones_like(deviation)))

    @classmethod
    def none(cls, num: int) -> Scale:
        return cls(torch.zeros(num, dtype=torch.float64), torch.ones(num, dtype=torch.float64))


class Comparison(NamedTuple):
    """Scores between two sets of features by name, and what makes them less than they seem."""

    scores: dict[str, Value]
    notes: list[str]


def compare(samples: FeatureSet, real: FeatureSet, scale: Scale, *, draws: int = 20, seed: int = 0) -> Comparison:
    """Every score of the features `samples` against `real`, each with its spread over clips."""
    if min(len(samples), len(real)) < LEAST:
        raise UserError(f"{min(len(samples), len(real))} clips are too few to compare sets: at least {LEAST}, better hundreds")
    rows, others = scaled(samples, scale), scaled(real, scale)
    scores, notes = _frechet(samples, real, scale, seed)
    parts = zip(halves(len(rows), draws, seed), halves(len(others), draws, REAL), strict=True)
    whole, *some = mmd_of_subsets(rows, others, [(torch.arange(len(rows)), torch.arange(len(others))), *parts])
    scores["mmd"] = Value.of_draws(whole, some, len(rows))
    scores |= _neighbours(rows, others, draws, seed)
    if copies := num_zero_balls(rows, _num_neighbours(len(rows))):
        notes.append(f"{copies} clips have exact copies: precision and recall mean nothing")
    if bool((rows.norm(dim=1) > 0).all()):
        scores["vendi"] = half_sampled(vendi, rows, draws=10, seed=seed)
    return Comparison(scores, notes)


def scaled(part: FeatureSet, scale: Scale) -> Tensor:
    """The features of each clip (n, d), float64, about the mean of `scale` and in its deviations."""
    return (part.clips.double() - scale.mean) / scale.deviation


def _frechet(samples: FeatureSet, real: FeatureSet, scale: Scale, seed: int) -> tuple[dict[str, Value], list[str]]:
    """The distance of all rows; its spread, from leaving out each group of clips of both sets; its bias, from halves."""
    full = frechet_score(samples.moments().scaled(*scale), real.moments().scaled(*scale))
    generator = np.random.default_rng(seed)
    of_halves = list[float]()
    for _ in range(HALVINGS):
        order, other = generator.permutation(GROUPS), generator.permutation(GROUPS)
        for half in (slice(GROUPS // 2), slice(GROUPS // 2, None)):
            mine = samples.moments(order[half].tolist()).scaled(*scale)
            theirs = real.moments(other[half].tolist()).scaled(*scale)
            if min(mine.count, theirs.count) < 2:
                continue
            of_halves.append(frechet_score(mine, theirs).value)
    if len(of_halves) < 2:
        return {"frechet": Value(full.value, math.nan, len(samples))}, [_undetermined(min(full.num_a, full.num_b), full.dims)]
    bias = float(np.mean(of_halves)) - full.value
    rest = [[group for group in range(GROUPS) if group != left] for left in range(GROUPS)]
    without = [frechet_score(samples.moments(few).scaled(*scale), real.moments(few).scaled(*scale)).value for few in rest]
    # The jackknife over groups; as draws its values deviate by the standard error: (G - 1) / sqrt(G) times as far.
    draws = full.value + (GROUPS - 1) / math.sqrt(GROUPS) * (np.array(without) - np.mean(without))
    scores = {
        "frechet": Value.of_draws(full.value, draws.tolist(), len(samples)),
        "frechet_bias": Value(bias, float(np.std(of_halves, ddof=1)) / math.sqrt(len(of_halves)), len(samples)),
    }
    return scores, [] if full.is_determined else [_undetermined(min(full.num_a, full.num_b), full.dims)]


def _undetermined(num: int, dims: int) -> str:
    return f"the Frechet distance is undetermined: {num} rows are not more than its {dims} features; read mmd"


def _num_neighbours(num: int) -> int:
    return min(5, num - 1)


def _neighbours(rows: Tensor, others: Tensor, draws: int, seed: int) -> dict[str, Value]:
    """Precision, recall, density and coverage of equal numbers of clips, with spreads over random halves of both."""
    num = min(len(rows), len(others))
    rows, others = rows[:num], others[:num]
    k = _num_neighbours(num)
    everything, subsets = torch.arange(num), list[tuple[Tensor, Tensor]]()
    if num >= 2 * (k + 1):
        picks = halves(num, 2 * draws, seed)
        subsets = list(zip(picks[::2], picks[1::2], strict=True))
    whole, *some = of_subsets(others, rows, [(everything, everything), *subsets], k)
    columns: list[list[float]] = np.array(some).reshape(-1, len(whole)).T.tolist()
    return {name: Value.of_draws(value, column, num) for name, value, column in zip(whole._fields, whole, columns, strict=True)}
