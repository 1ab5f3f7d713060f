"""Spreads of scores over clips. Frames of a clip are correlated, so whole clips are drawn: axis 0 of every set is the clip.

There are two ways, which fail differently. Half-sampling without replacement suits set scores (Frechet, recall, coverage):
drawing with replacement leaves fewer distinct points, which raises a Frechet distance by itself. A subset of half the clips
varies by sd^2 / (n/2) * (1 - 1/2) = sd^2 / n, exactly the variance of all n clips, so its spread needs no correction. It errs
on the wide side for a Frechet distance that is mostly bias (0.22 for a true 0.14 at n = 256, d = 24, equal laws; coverage .037
for .039). The bootstrap suits means over clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError

Clips = Tensor | np.ndarray


@dataclass(frozen=True)
class Spread:
    """A score of all clips, its standard error, and an interval."""

    value: float
    stderr: float
    low: float
    high: float
    level: float
    num: int  # clips in the smallest set
    draws: int

    def verdict(self, bound: float, better: Literal["lower", "higher"] = "lower") -> Literal["met", "missed", "undetermined"]:
        """Whether the whole interval is on the good side of `bound`, on the bad side, or on both."""
        if self.low <= bound <= self.high:
            return "undetermined"
        return "met" if (self.value < bound) == (better == "lower") else "missed"


def half_sampled(
    score: Callable[..., float], *sets: Clips, draws: int = 100, level: float = 0.95, paired: bool = False, seed: int = 0
) -> Spread:
    """The spread of `score(*sets)` over random halves of the clips, drawn without replacement.

    value is the score of all clips; the interval is value -+ z stderr, because the halves themselves are biased like any
    smaller n. `paired` takes the same clips of every set (student and teacher on the same prompts). Costs draws + 1 scores.
    """
    num = _num_clips(sets, paired, least=4)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        shared = torch.randperm(num, generator=generator)[: num // 2] if paired else None
        halves = [torch.randperm(len(s), generator=generator)[: len(s) // 2] if shared is None else shared for s in sets]
        scores.append(float(score(*(_rows(s, half) for s, half in zip(sets, halves)))))
    value, stderr = float(score(*sets)), float(np.std(scores, ddof=1))
    reach = NormalDist().inv_cdf(0.5 + level / 2) * stderr
    return Spread(value, stderr, value - reach, value + reach, level, num, draws)


def halves(num: int, draws: int, seed: int = 0) -> list[Tensor]:
    """The rows of random halves of `num` clips, as `half_sampled` draws them for one set."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num, generator=generator)[: num // 2] for _ in range(draws)]


def resampled(
    score: Callable[..., float], *sets: Clips, draws: int = 1000, level: float = 0.95, paired: bool = False, seed: int = 0
) -> Spread:
    """The bootstrap spread of `score(*sets)`: clips drawn with replacement, percentile interval.

    For means, medians and ratios over clips. Not for Frechet distances, recall or coverage: see the top of the file.
    """
    num = _num_clips(sets, paired, least=2)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        shared = torch.randint(num, (num,), generator=generator) if paired else None
        picks = [torch.randint(len(s), (len(s),), generator=generator) if shared is None else shared for s in sets]
        scores.append(float(score(*(_rows(s, pick) for s, pick in zip(sets, picks)))))
    low, high = np.quantile(scores, [0.5 - level / 2, 0.5 + level / 2])
    return Spread(float(score(*sets)), float(np.std(scores, ddof=1)), float(low), float(high), level, num, draws)


def _num_clips(sets: tuple[Clips, ...], paired: bool, least: int) -> int:
    counts = [len(s) for s in sets]
    if not counts or min(counts) < least:
        raise UserError(f"sets of {counts} clips are too few to resample; at least {least} are needed. Evaluate more clips.")
    if paired and len(set(counts)) > 1:
        raise UserError(f"paired sets must hold the same clips, but have {counts}. Generate the missing ones.")
    return min(counts)


def _rows(clips: Clips, index: Tensor) -> Clips:
    return clips[index.to(clips.device)] if isinstance(clips, Tensor) else clips[index.numpy()]
