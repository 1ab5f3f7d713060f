"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) in one convention:

    guided = uncond + w (cond - uncond)         w = 1 is off, 0 is unconditional

Cosmos writes cond + g (cond - uncond), so that w = g + 1: a recipe that quotes a Cosmos number says so on the line.
The negative differs from cond in its text or label only; frames, masks and controls stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.batch import Condition, join
from fewstep.diffusion.denoiser import Around, Cache, Denoiser
from fewstep.diffusion.path import spread
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError


def guided(
    denoiser: Denoiser,
    negative: Condition | None,
    w: float,
    *,
    interval: tuple[float, float] | None = None,
    below: tuple[float, float] | None = None,
    rescale: float = 0.0,
    negative_grad: bool = True,
) -> Denoiser:
    """A denoiser that predicts uncond + w (cond - uncond), both evaluated as one batch.

    interval: (low, high) in the path's own time; outside of it w is 1 for that row (Kynkaanniemi et al., arXiv:2404.07724).
    below: (time, w), another w for rows whose time lies below it: the low-noise expert of Wan A14B has one of its own.
    negative_grad: False evaluates cond and negative one after the other and keeps no graph of the negative: for callers that
    need gradients through the features of cond, and not through the guided prediction.
    rescale: 0 .. 1, how far the spread of the guided x0 is drawn back to that of cond (Lin et al., arXiv:2305.08891 eq. 15-16).
    """
    if w == 1.0 and below is None:
        return denoiser
    if negative is None:
        raise UserError(f"guidance w = {w} needs a negative condition, but the batch has none (w = 1 is off)")
    return _Guided(denoiser, negative, w, interval, below, rescale, negative_grad)


def with_and_without(
    denoiser: Denoiser,
    negative: Condition,
    x_t: Tensor,
    t: Tensor,
    cond: Condition,
    *,
    taps: Sequence[int] = (),
    cache: Cache | None = None,
) -> tuple[Prediction, Tensor]:
    """The prediction under cond and the velocity under the negative, from one call of the denoiser on a batch of both."""
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), join(cond, negative), taps=taps, cache=cache)
    with_text, without = both.velocity.chunk(2)
    features = tuple(part.chunk(2)[0] for part in both.features)
    return Prediction(both.x_t.chunk(2)[0], t, denoiser.path, with_text, features), without


@dataclass(frozen=True)
class _Guided(Around):
    inner: Denoiser
    negative: Condition
    w: float
    interval: tuple[float, float] | None
    below: tuple[float, float] | None
    rescale: float
    negative_grad: bool

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        if self.interval is not None and not bool(self._inside(t).any()):
            return self.inner(x_t, t, cond, taps=taps, cache=cache)  # w is 1 everywhere: no second pass
        if self.negative_grad:
            first, without = with_and_without(self.inner, self.negative, x_t, t, cond, taps=taps, cache=cache)
        else:
            first = self.inner(x_t, t, cond, taps=taps, cache=cache)
            with torch.no_grad():
                without = self.inner(x_t, t, self.negative, cache=cache).velocity
        w = torch.full_like(t, self.w, dtype=torch.float64)
        if self.below is not None:
            w = torch.where(t < self.below[0], self.below[1], w)
        if self.interval is not None:
            w = torch.where(self._inside(t), w, 1.0)
        velocity = without + spread(w, without).to(without.dtype) * (first.velocity - without)
        prediction = replace(first, velocity=velocity)
        return self._rescaled(prediction, first) if self.rescale else prediction

    def _inside(self, t: Tensor) -> Tensor:
        assert self.interval is not None
        low, high = self.interval
        return (t >= low) & (t <= high)

    def _rescaled(self, prediction: Prediction, with_text: Prediction) -> Prediction:
        x0 = prediction.x0
        axes = tuple(range(1, x0.ndim))
        scale = with_text.x0.std(axes, keepdim=True) / x0.std(axes, keepdim=True)
        x0 = x0 * (1 - self.rescale + self.rescale * scale)
        return Prediction.of("x0", x0, prediction.x_t, prediction.t, self.path, prediction.features)
