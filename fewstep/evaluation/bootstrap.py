"""Spreads of scores over clips. Frames of a clip are correlated, so whole clips are drawn: axis 0 of every set is the clip.

Random halves are drawn without replacement: with replacement fewer distinct points are left, which raises a Frechet distance by
itself. A subset of half the clips varies by sd^2 / (n/2) * (1 - 1/2) = sd^2 / n, exactly the variance of all n clips, so its
spread needs no correction. It errs on the wide side for a Frechet distance that is mostly bias (0.22 for a true 0.14 at
n = 256, d = 24, equal laws; coverage .037 for .039).

A seed draws the same clip numbers for every model, so that the draws of two models differ by what the models differ in.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fewstep.evaluation.score import Value

Clips = Tensor | np.ndarray
REAL = 1  # seed of the halves of the real clips: others than those of the clips that are compared with them


def half_sampled(score: Callable[..., float], *sets: Clips, draws: int = 20, seed: int = 0) -> Value:
    """`score(*sets)` with its spread over random halves of the clips; its number is that of the smallest set.

    The halves are biased like any smaller n; only their deviation counts. Fewer than four clips have no spread. Costs draws + 1
    scores.
    """
    num = min(map(len, sets))
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    for _ in range(draws if num >= 4 else 0):
        picks = [torch.randperm(len(s), generator=generator)[: len(s) // 2] for s in sets]
        scores.append(float(score(*(_rows(s, pick) for s, pick in zip(sets, picks)))))
    return Value.of_draws(score(*sets), scores, num)


def halves(num: int, draws: int, seed: int = 0) -> list[Tensor]:
    """The rows of random halves of `num` clips, as `half_sampled` draws them for one set."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num, generator=generator)[: num // 2] for _ in range(draws)]


def student_quantile(dof: float, level: float = 0.95) -> float:
    """How many standard errors an interval reaches to either side where they come from `dof` degrees of freedom.

    Cornish and Fisher's expansion of Student's t: within 1 % from two degrees of freedom on.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / dof ** (n + 1) for n, term in enumerate(terms))


def _rows(clips: Clips, index: Tensor) -> Clips:
    return clips[index.to(clips.device)] if isinstance(clips, Tensor) else clips[index.numpy()]
