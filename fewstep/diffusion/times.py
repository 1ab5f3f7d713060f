"""Times: grids to sample on, and distributions to train on.

A grid is a 1-D float64 tensor of the path's own times, descending, without the final 0: its length is the number of network
calls. A distribution is a frozen dataclass with `draw(rng, path, shape)`, which returns times of the path; it is written
in the units its paper uses and matched to the path by noise-to-signal ratio, so that each works on every path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Protocol

import torch
from torch import Tensor

from fewstep.config import OneOf, kind
from fewstep.diffusion.path import EDM, Path, RectifiedFlow, floats
from fewstep.diffusion.rng import Rng
from fewstep.errors import UserError

# --- grids ------------------------------------------------------------------------------------------------------------


def explicit(times: Iterable[float] | Tensor, path: Path | None = None) -> Tensor:
    """The times as a grid. Raises UserError unless they are descending, positive and within the path."""
    values = floats(times) if isinstance(times, Tensor) else list(times)
    grid = torch.as_tensor(times if isinstance(times, Tensor) else values, dtype=torch.float64)
    descends = grid.ndim == 1 and all(later < earlier for earlier, later in pairwise(values))
    if not descends or not values or not values[-1] > 0:
        raise UserError(f"times must be descending and above 0 (the final 0 is left out), but are {values}")
    if path is not None and values[0] > path.t_max * (1 + 1e-6):  # float32(pi/2) is above pi/2
        raise UserError(f"the first time {values[0]} is beyond the path's t_max of {path.t_max}")
    return grid


def karras(num: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5, in sigma, the time of EDM. Transfer1's "35 steps" are karras(36): 35, a clean denoise."""
    place = torch.arange(num, dtype=torch.float64) / max(num - 1, 1)
    return (sigma_max ** (1 / rho) + place * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def shifted(num: int, shift: float = 1.0) -> Tensor:
    """s u / (1 + (s - 1) u) for u = 1 .. 1/num, in the time of RectifiedFlow. shifted(4, 5) is 1, .9375, .8333, .625."""
    u = torch.arange(num, 0, -1, dtype=torch.float64) / num
    return shift * u / (1 + (shift - 1) * u)


def even(num: int, t_max: float) -> Tensor:
    """t_max (1 .. 1/num), evenly spaced in the path's own time."""
    return t_max * torch.arange(num, 0, -1, dtype=torch.float64) / num


def converted(times: Tensor, source: Path, target: Path) -> Tensor:
    """The times of `target` with the noise-to-signal ratios that `times` have on `source`; refuses ratios beyond its end."""
    a, s, _, _ = source.coefficients(times)
    end_a, end_s, _, _ = target.coefficients(torch.tensor(target.t_max, dtype=torch.float64))
    ratio, end = float((s / a).max()), float(end_s / end_a)
    if ratio > end * (1 + 1e-6):
        raise UserError(f"a time with noise-to-signal ratio {ratio:.6g} lies beyond the end of {target}, which is {end:.6g}")
    return explicit(_from(source, times, target), target)


def on_flow(num: int, path: Path, shift: float = 1.0) -> Tensor:
    """A grid for any path: `shifted` in flow time, from the path's own t_max down."""
    a, s, _, _ = path.coefficients(torch.tensor([path.t_max]))
    end = FLOW.time_of(s / a)
    u = end / (shift + (1 - shift) * end) * torch.arange(num, 0, -1, dtype=torch.float64) / num  # the shift maps this to `end`
    times = _from(FLOW, shift * u / (1 + (shift - 1) * u), path)
    times[0] = path.t_max
    return times


# --- distributions ----------------------------------------------------------------------------------------------------


class Times(Protocol):
    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape) times of `path`, float64: shape () for one per sample, (T,) for one per frame."""
        ...


AnyTimes = Annotated[Times, OneOf("times")]  # a field that holds one of the distributions below
FLOW = RectifiedFlow()


def _from(source: Path, t: Tensor, path: Path) -> Tensor:
    a, s, _, _ = source.coefficients(t)
    return path.time_of(s / a)


@kind("uniform", group="times")
@dataclass(frozen=True)
class Uniform:
    """t uniform in the path's own time, between two fractions of t_max."""

    low: float = 0.0
    high: float = 1.0

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        return (self.low + (self.high - self.low) * rng.uniform(shape)) * path.t_max


@kind("log_normal", group="times")
@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std), sigma the noise-to-signal ratio; then times `scale`."""

    mean: float = -1.2  # EDM; Predict1 0.0
    std: float = 1.2  # EDM; Predict1 1.0
    scale: float = 1.0  # sqrt(latent frames) where "adjust_video_noise" is on: 4 for Predict1 and Transfer1

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        return path.time_of(self.scale * torch.exp(self.mean + self.std * rng.normal(shape, torch.float64)))


@kind("logit_normal", group="times")
@dataclass(frozen=True)
class LogitNormal:
    """logit u ~ N(mean, std), u the time of RectifiedFlow (Esser et al. 2024, arXiv:2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        return _from(FLOW, torch.sigmoid(self.mean + self.std * rng.normal(shape, torch.float64)), path)


@kind("shifted", group="times")
@dataclass(frozen=True)
class Shifted:
    """u uniform, then s u / (1 + (s - 1) u) in the time of RectifiedFlow: Predict2.5 draws critic and student times so."""

    shift: float = 5.0
    low: float = 0.0  # of u, before the shift
    high: float = 1.0

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        u = self.low + (self.high - self.low) * rng.uniform(shape)
        return _from(FLOW, self.shift * u / (1 + (self.shift - 1) * u), path)


@kind("karras_index", group="times")
@dataclass(frozen=True)
class KarrasIndex:
    """A uniform integer index into a Karras grid, as Transfer1's DMD2 draws sigma; then times `scale`."""

    num: int = 1000
    low: int = 20  # first index that can be drawn, from the noisy end: 2 %
    high: int = 980  # last one: 98 %
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    scale: float = 1.0  # sqrt(latent frames): 4 for Transfer1

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        index = self.low + rng.integers(self.high - self.low + 1, shape)
        grid = karras(self.num, self.sigma_max, self.sigma_min).to(index.device)
        return _from(EDM(t_max=math.inf), self.scale * grid[index], path)


@kind("listed", group="times")
@dataclass(frozen=True)
class Listed:
    """One of `times`, in the path's own time, each as likely."""

    times: tuple[float, ...] = ()

    def draw(self, rng: Rng, path: Path, shape: Sequence[int] = ()) -> Tensor:
        index = rng.integers(len(self.times), shape)
        return explicit(self.times, path).to(index.device)[index]

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.times:
            yield "times", "needs at least one time"
