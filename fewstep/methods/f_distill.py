"""f-distill: DMD2 for any f-divergence, by a weight on each sample's gradient.

    grad D_f(p || q) = E_q [ h(r) (score_q - score_p) dx/dtheta ],   h(r) = f''(r) r^2,   r = p(x_t) / q(x_t)
                                                                      Xu et al. 2025, arXiv:2502.15681
    r = exp(logit) of the GAN's head, which at its optimum is p / q of data and student at x_t
    E_q[r] = 1 at every noise level: r is divided by its mean over the samples of its time bin, and h by its mean

The divergence is that of data from student where the head is good, while the scores are the teacher's. rkl is h = 1: DMD2.
Means are over the samples that a process holds in one micro-batch, because a method keeps no statistics between steps (nor does
FastGen by default, with ratio_ema_rate 0). In a bin with one sample r becomes 1: keep `num_bins` well below the batch size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import kind, preset
from fewstep.diffusion import Path
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.gan import Gan

Divergence = Literal["rkl", "kl", "js", "sf", "neyman", "sh", "jf"]


@kind("f_divergence", group="sample_weight")
@dataclass(frozen=True)
class FDivergence:
    divergence: Divergence = "js"  # reverse KL, KL, Jensen-Shannon, softened reverse KL, chi^2, squared Hellinger, Jeffreys
    ratio_min: float = 0.1  # lower bound of the ratio; FastGen
    ratio_max: float = 20.0  # upper bound
    num_bins: int = 10  # of equal width over the noise levels; 0: the ratio is not normalised
    needs_ratio: ClassVar[bool] = True

    def __call__(self, sample: Tensor, cond: Condition, t: Tensor, path: Path, logits: Tensor | None) -> Tensor:
        assert logits is not None
        ratio = logits.mean(1).clamp(-10, 10).exp().clamp(self.ratio_min, self.ratio_max)
        if self.num_bins:
            ratio = ratio / bin_means(ratio, t, path, self.num_bins)
        weight = h(ratio, self.divergence)
        return weight / weight.mean()

    def problems(self) -> Iterable[tuple[str, str]]:
        if not 0 < self.ratio_min < 1 < self.ratio_max:
            yield "ratio_min", f"must lie between 0 and 1, and ratio_max above 1: not {self.ratio_min}, {self.ratio_max}"
        if self.num_bins < 0:
            yield "num_bins", f"must not be negative, but is {self.num_bins}"


@preset("f_distill", group="method")
def f_distill() -> DMD2:
    """f-distill: DMD2 for any f-divergence, by a weight on each sample's gradient."""
    return DMD2(gan=Gan(weight=1e-3), sample_weight=FDivergence())


def h(r: Tensor, divergence: Divergence) -> Tensor:
    """f''(r) r^2, up to a factor."""
    if divergence == "rkl":
        return torch.ones_like(r)
    if divergence == "kl":
        return r
    if divergence == "js":
        return 1 - 1 / (1 + r)
    if divergence == "sf":
        return 1 / (1 + r)
    if divergence == "neyman":
        return 1 / r
    return r.sqrt() if divergence == "sh" else 1 + r


def bin_means(ratio: Tensor, t: Tensor, path: Path, num_bins: int) -> Tensor:
    """For each sample the mean ratio of those in its bin; bins are of equal width in the angle atan(s / a), on any path."""
    a, s, _, _ = path.coefficients(t)
    bins = (torch.atan2(s, a) * (2 / torch.pi) * num_bins).long().clamp(0, num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=ratio.dtype, device=ratio.device)
    sums, counts = zeros.index_add(0, bins, ratio), zeros.index_add(0, bins, torch.ones_like(ratio))
    return (sums / counts.clamp(min=1))[bins]
