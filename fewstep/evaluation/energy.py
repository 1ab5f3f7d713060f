"""The energy distance (Szekely & Rizzo 2013), the score of the analytic recipes: it needs no features and no kernel width."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.evaluation.samples import Samples, as_pair

_ELEMENTS = 1 << 17  # of the distance block held at a time: 1 MB, which stays in the cache of a core
_FEW = 4  # columns up to which a loop over them is faster than torch.cdist (three times, for two)


def energy_distance(x: Samples, y: Samples) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| between samples (n, d) and (m, d), Euclidean norm, unbiased.

    The convention: this is the *squared* form (scipy.stats.energy_distance returns its root), and a U-statistic: pairs of a
    sample with itself are left out, so the mean is exact at every n and equal laws give values around 0, some below it. It
    is 0 only for equal laws and scales like a length. Distances are computed in float64, those between float32 tensors in
    float32, which is three times as fast; sums are float64. 0.05 s for 4000 x 4000 float32 points of the plane on one core.
    """
    is_single = all(isinstance(values, Tensor) and values.dtype == torch.float32 for values in (x, y))
    x, y = as_pair(x, y, ("x", "y"))
    if is_single:
        x, y = x.float(), y.float()
    num_x, num_y = len(x), len(y)
    across = _sum(x, y) / (num_x * num_y)
    return 2 * across - _sum_within(x) / (num_x * (num_x - 1)) - _sum_within(y) / (num_y * (num_y - 1))


def _sum(a: Tensor, b: Tensor) -> float:
    """The sum of all distances, in blocks; of a row to itself it is exactly 0, which matrix-product distances are not."""
    step = max(1, _ELEMENTS // len(b))
    return sum(float(_distances(some, b).sum(dim=1).double().sum()) for some in a.split(step))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] > _FEW:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    squares = torch.zeros(len(a), len(b), dtype=a.dtype, device=a.device)
    for x, y in zip(a.T, b.T, strict=True):
        difference = x[:, None] - y
        squares.addcmul_(difference, difference)
    return squares.sqrt_()


def _sum_within(a: Tensor) -> float:
    """`_sum(a, a)` at half its cost: the distance of two blocks counts twice."""
    blocks = a.split(max(1, len(a) // 8))
    total = 0.0
    for number, block in enumerate(blocks):
        total += _sum(block, block)
        rest = a[number * len(blocks[0]) + len(block) :]
        if len(rest):
            total += 2 * _sum(block, rest)
    return total
