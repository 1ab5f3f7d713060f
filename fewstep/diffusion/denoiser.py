"""The contract of a network as diffusion and methods use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion.path import Path, spread, working_dtype
from fewstep.diffusion.prediction import Prediction, coefficients_for


class Cache(Protocol):
    """The state a causal network keeps of finished frames: created by `new_cache`, passed on and dropped by a rollout."""

    def store(self) -> Cache:
        """The same cache, for the call on a finished chunk: it keeps that chunk's frames."""
        ...


class FeaturesOnly(tuple[int, ...]):
    """Taps of a call of which only the features are used: the network skips the blocks behind the last tap.

    Its velocity has no meaning then. A network that treats these taps as any others runs all blocks and is only slower.
    """


class Denoiser(Protocol):
    @property
    def path(self) -> Path: ...

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        """The prediction at x_t; `taps` are numbers of blocks whose outputs come back as features."""
        ...


class Around:
    """A denoiser around another one, `inner`, on its path."""

    inner: Denoiser

    @property
    def path(self) -> Path:
        return self.inner.path


def on_path(denoiser: Denoiser, path: Path) -> Denoiser:
    """The same network on another path: the time is matched by noise-to-signal ratio, the state is rescaled.

    Where the network's own path ends before that ratio (EDM at sigma 80, while a flow goes to infinity), the network is
    evaluated at its own t_max and its x0 is used.
    """
    return denoiser if denoiser.path == path else _OnPath(denoiser, path)


def features(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of the blocks in `taps`, without running the blocks behind the last of them."""
    return denoiser(x_t, t, cond, taps=FeaturesOnly(taps)).features


@dataclass(frozen=True)
class _OnPath:
    inner: Any  # Denoiser; of a causal one the three methods below are called, which others refuse
    path: Path

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        return self.inner.chunks(num_frames)

    def before(self, start: int) -> Sequence[int]:
        return self.inner.before(start)

    def new_cache(self, like: Tensor) -> Cache:
        return self.inner.new_cache(like)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x_t = x_t.to(working_dtype(x_t))
        a, s, _, _ = self.path.coefficients(t)
        inner_t = self.inner.path.time_of(s / a)
        inner_a, inner_s, _, _ = self.inner.path.coefficients(inner_t)
        scale = torch.hypot(inner_a, inner_s) / torch.hypot(a, s)
        if cond.end is not None:
            end_a, end_s, _, _ = self.path.coefficients(cond.end)
            cond = replace(cond, end=self.inner.path.time_of(end_s / end_a))
        inner = self.inner(spread(scale, x_t).to(x_t.dtype) * x_t, inner_t, cond, taps=taps, cache=cache)
        x0 = inner.x0
        a, s, da, ds = coefficients_for(self.path, t, x0)
        # Divide by the larger coefficient only: below ratio 1 by a (inside inner.eps), above it by s.
        eps = torch.where(s < a, inner.eps, (x_t - a * x0) / torch.where(s < a, 1.0, s))
        return Prediction(x_t, t, self.path, da * x0 + ds * eps, inner.features)
