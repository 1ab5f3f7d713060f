"""The maximum mean discrepancy with the cubic kernel of KID (Binkowski et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.evaluation.samples import Samples, as_pair

_ELEMENTS = 1 << 20  # of the kernel block held at a time: 8 MB


def mmd(a: Samples, b: Samples) -> float:
    """The unbiased squared MMD of two sets of features (n, d) and (m, d), kernel (x.y / d + 1)^3, over all pairs.

    Unbiased at every n, hence the better score for few clips, and below 0 about half the time between equal distributions.
    Not invariant to scale or shift: standardise both sets by the reference. n and m may differ (torchmetrics assumes they do
    not). KID is usually quoted as the mean of this over subsets of 1000, times 1000; over all pairs it has the same mean and
    less noise.
    """
    return mmd_of_subsets(a, b, [(torch.arange(len(a)), torch.arange(len(b)))])[0]


def mmd_of_subsets(a: Samples, b: Samples, subsets: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """`mmd` of each of these subsets (rows of `a`, rows of `b`), for spreads.

    Each entry of the kernel is computed once, whatever the number of subsets, and none is kept: memory is a few blocks.
    """
    a, b = as_pair(a, b, ("a", "b"))
    of_a, of_b = (_masks(rows, [pair[side] for pair in subsets]) for side, rows in enumerate((a, b)))
    step = max(1, _ELEMENTS // max(len(a), len(b)))
    across = torch.zeros_like(of_a[:, 0])
    for first in range(0, len(a), step):
        across += (of_a[:, first : first + step] @ _kernel(a[first : first + step], b) * of_b).sum(dim=1)
    num_a, num_b = of_a.sum(dim=1), of_b.sum(dim=1)
    return (_within(a, of_a, step) + _within(b, of_b, step) - 2 * across / (num_a * num_b)).tolist()


def _masks(rows: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """1 for each row of a subset (subset, row), 0 for the others."""
    masks = torch.zeros(len(subsets), len(rows), dtype=rows.dtype, device=rows.device)
    for mask, subset in zip(masks, subsets, strict=True):
        mask[subset] = 1
    return masks


def _within(rows: Tensor, masks: Tensor, step: int) -> Tensor:
    """The mean of the kernel over all pairs of different rows of each subset."""
    total = torch.zeros_like(masks[:, 0])
    for first in range(0, len(rows), step):
        kernel = _kernel(rows[first : first + step], rows)
        kernel.diagonal(first).zero_()  # of a row with itself
        total += (masks[:, first : first + step] @ kernel * masks).sum(dim=1)
    num = masks.sum(dim=1)
    return total / (num * (num - 1))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)
