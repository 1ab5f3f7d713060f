"""Precision, recall, density and coverage from k-nearest-neighbour balls (Kynkaanniemi et al. 2019; Naeem et al. 2020).

The ball of a sample reaches to its k-th neighbour in its own set. Precision: fakes inside some real ball. Recall: reals inside
some fake ball. Density: real balls around a fake, over k (real against real: about 1; can exceed 1). Coverage: real balls that
hold a fake. Read them together: a collapsed student has high precision and low coverage, and coverage is the more reliable sign
(recall of 256 clips drawn from 64 repeated ones is still .66).

Exact duplicates have balls of radius zero: k or more copies of a fake contain only themselves, so recall falls to 0 for that
reason alone. `num_zero_balls` counts them; a test of mode collapse must jitter its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.samples import Samples, as_pair, as_samples

_ELEMENTS = 1 << 20  # of the distance block held at a time: 8 MB


class PrecisionRecall(NamedTuple):
    """Four fractions; only density can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Samples, fake: Samples, k: int = 5) -> PrecisionRecall:
    """Precision, recall, density and coverage of `fake` (m, d) against `real` (n, d).

    All four depend on n and m: compare at equal counts, and print real against real beside them.
    """
    return of_subsets(real, fake, [(torch.arange(len(real)), torch.arange(len(fake)))], k)[0]


def of_subsets(real: Samples, fake: Samples, subsets: Sequence[tuple[Tensor, Tensor]], k: int = 5) -> list[PrecisionRecall]:
    """`precision_recall` of each of these subsets (rows of `real`, rows of `fake`), for spreads.

    Distances are computed once for all subsets, in blocks, and only the nearest `16 (k + 1)` of each row are kept.
    """
    real, fake = as_pair(real, fake, ("real", "fake"))
    subsets = [(rows.to(real.device), others.to(real.device)) for rows, others in subsets]
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    of_real = _radii(real, [rows for rows, _ in subsets], k, "real")
    of_fake = _radii(fake, [rows for _, rows in subsets], k, "fake")
    num_precise, num_balls = [0] * len(subsets), [0] * len(subsets)
    recalled = torch.zeros(of_real.shape, dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    step = max(1, _ELEMENTS // len(real))
    for first in range(0, len(fake), step):
        squares = _squares(fake[first : first + step], real)
        for number, radii in enumerate(of_fake[:, first : first + step]):
            is_chosen = radii >= 0
            mine = squares[is_chosen]
            in_real = mine <= of_real[number]
            num_precise[number] += int(in_real.any(dim=1).sum())
            num_balls[number] += int(in_real.sum())
            covered[number] |= in_real.any(dim=0)
            recalled[number] |= (mine <= radii[is_chosen, None]).any(dim=0)
    out: list[PrecisionRecall] = []
    for number, (rows, others) in enumerate(subsets):
        recall, coverage = (float(part[number][rows].double().mean()) for part in (recalled, covered))
        num = len(others)
        out.append(PrecisionRecall(num_precise[number] / num, recall, num_balls[number] / (k * num), coverage))
    return out


def num_zero_balls(samples: Samples, k: int = 5) -> int:
    """How many samples have k or more exact copies, which makes recall and precision artefacts."""
    rows = as_samples(samples, "samples")
    return int((_radii(rows - rows.mean(dim=0), [torch.arange(len(rows))], k, "samples") == 0).sum())


def _radii(rows: Tensor, subsets: Sequence[Tensor], k: int, name: str) -> Tensor:
    """The squared distance of every row of a subset to its k-th neighbour in it (subset, row); -1 for the other rows."""
    least = min(len(subset) for subset in subsets)
    if not 1 <= k < least:
        raise UserError(f"{name} has {least} rows, too few for k = {k} neighbours. Evaluate more clips or lower k.")
    num = min(len(rows), 16 * (k + 1))
    step = max(1, _ELEMENTS // len(rows))
    # In place: what each block leaves behind would keep the memory of the blocks from being used again.
    squares, places = rows.new_empty(len(rows), num), torch.empty(len(rows), num, dtype=torch.int64, device=rows.device)
    for first in range(0, len(rows), step):
        nearest = _squares(rows[first : first + step], rows).topk(num, dim=1, largest=False)
        squares[first : first + step], places[first : first + step] = nearest.values, nearest.indices
    out = torch.full((len(subsets), len(rows)), -1.0, dtype=rows.dtype, device=rows.device)
    for radii, subset in zip(out, subsets, strict=True):
        is_chosen = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        is_chosen[subset] = True
        # The row itself is the nearest of all, at distance 0; hence k + 1.
        is_kth = is_chosen[places[subset]].cumsum(dim=1) == k + 1
        radii[subset] = squares[subset].gather(1, is_kth.int().argmax(dim=1, keepdim=True))[:, 0]
        for row in subset[~is_kth.any(dim=1)]:  # hardly ever: fewer than k of its nearest are in the subset
            radii[row] = _squares(rows[row : row + 1], rows[subset]).topk(k + 1, largest=False).values[0, k]
    return out * (1 + 1e-9)  # equal distances stay equal, however they are rounded


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of all rows of `a` and `b`, by a product of matrices: 20 times as fast as exact ones.

    Rounding leaves 1e-7 of the length of a row between copies; what is within 1e-6 of it counts as 0.
    """
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    squares = torch.addmm(lengths, a, b.T, alpha=-2)
    return squares.masked_fill_(squares <= 1e-12 * lengths, 0.0)
