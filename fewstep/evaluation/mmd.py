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
    return mmd_of_subsets(a, b, [torch.arange(len(a))])[0]


def mmd_of_subsets(a: Samples, b: Samples, subsets: Sequence[Tensor]) -> list[float]:
    """`mmd` of each of these subsets of `a`, given as indices of rows, against all of `b`.

    Each entry of the kernel is computed once, whatever the number of subsets, and none is kept: memory is a few blocks.
    """
    a, b = as_pair(a, b, ("a", "b"))
    masks = torch.zeros(len(subsets), len(a), dtype=a.dtype, device=a.device)
    for row, subset in zip(masks, subsets, strict=True):
        row[subset] = 1
    within, across = torch.zeros_like(masks[:, 0]), torch.zeros_like(masks[:, 0])
    step = max(1, _ELEMENTS // max(len(a), len(b)))
    for first in range(0, len(a), step):
        rows, picks = a[first : first + step], masks[:, first : first + step]
        kernel = _kernel(rows, a)
        kernel.diagonal(first).zero_()  # of a row with itself
        within += (picks @ kernel * masks).sum(dim=1)
        across += picks @ _kernel(rows, b).sum(dim=1)
    num_a, num_b = masks.sum(dim=1), len(b)
    within_b = sum(float(_kernel(rows, b).sum()) for rows in b.split(step)) - float(_kernel_of_self(b))
    scores = within / (num_a * (num_a - 1)) + within_b / (num_b * (num_b - 1)) - 2 * across / (num_a * num_b)
    return scores.tolist()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)


def _kernel_of_self(rows: Tensor) -> Tensor:
    return (rows.square().sum(dim=1) / rows.shape[1] + 1).pow(3).sum()
