"""The maximum mean discrepancy with the cubic kernel of KID (Binkowski et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.evaluation.samples import Samples, as_pair

_ELEMENTS = 1 << 23  # of the kernel block held at a time: 64 MB


def mmd(a: Samples, b: Samples) -> float:
    """The unbiased squared MMD of two sets of features (n, d) and (m, d), kernel (x.y / d + 1)^3, over all pairs.

    Unbiased at every n, hence the better score for few clips, and below 0 about half the time between equal distributions.
    Not invariant to scale or shift: standardise both sets by the reference. n and m may differ (torchmetrics assumes they do
    not). KID is usually quoted as the mean of this over subsets of 1000, times 1000; over all pairs it has the same mean and
    less noise.
    """
    a, b = as_pair(a, b, ("a", "b"))
    num_a, num_b = len(a), len(b)
    within_a = (_sum(a, a) - _kernel_of_self(a)) / (num_a * (num_a - 1))
    within_b = (_sum(b, b) - _kernel_of_self(b)) / (num_b * (num_b - 1))
    return within_a + within_b - 2 * _sum(a, b) / (num_a * num_b)


class SubsetMMD:
    """`mmd` of subsets of `a` against all of `b`, for spreads: the kernel is computed once, a subset is a sum over its entries.

    Holds an n x n matrix for the n rows of `a`.
    """

    def __init__(self, a: Samples, b: Samples) -> None:
        a, b = as_pair(a, b, ("a", "b"))
        self._within_a = _kernel(a, a)
        step = max(1, _ELEMENTS // len(b))
        self._across = torch.cat([_kernel(some, b).sum(dim=1) for some in a.split(step)])
        self._within_b = (_sum(b, b) - _kernel_of_self(b)) / (len(b) * (len(b) - 1))
        self._num_b = len(b)

    def of(self, rows: Tensor) -> float:
        """The squared MMD of the rows of `a` with these indices."""
        num, block = len(rows), self._within_a[rows][:, rows]
        within_a = float(block.sum() - block.diagonal().sum()) / (num * (num - 1))
        return within_a + self._within_b - 2 * float(self._across[rows].sum()) / (num * self._num_b)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)


def _sum(a: Tensor, b: Tensor) -> float:
    """The sum of the kernel over all pairs, in blocks."""
    step = max(1, _ELEMENTS // len(b))
    return sum(float(_kernel(some, b).sum()) for some in a.split(step))


def _kernel_of_self(rows: Tensor) -> float:
    return float((rows.square().sum(dim=1) / rows.shape[1] + 1).pow(3).sum())
