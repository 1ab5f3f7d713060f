"""One prediction of a denoiser, read as x0, eps or velocity.

x_t = a x0 + s eps and velocity = a' x0 + s' eps are two equations for two unknowns, so that any one of the three, with x_t,
gives the others. The determinant a s' - s a' is 1 for RectifiedFlow and EDM, 1/sigma_d for TrigFlow and phi' for VP: never 0.
The velocity is stored, because it alone is finite and complete at both ends. At t = 0 an x0 does not determine eps, and at pure
noise an eps does not determine x0: the undetermined part is then 0, the mean of normalised data and of noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.path import Path, spread, working_dtype
from fewstep.errors import UserError

Kind = Literal["x0", "eps", "velocity"]


@dataclass(frozen=True)
class Prediction:
    x_t: Tensor
    t: Tensor  # (B,), or (B, T) for one time per frame
    path: Path
    velocity: Tensor  # dx_t/dt in the path's own time; float32 or better
    features: tuple[Tensor, ...] = ()  # outputs of the network's tapped blocks

    @classmethod
    def of(cls, kind: Kind, value: Tensor, x_t: Tensor, t: Tensor, path: Path, features: tuple[Tensor, ...] = ()) -> Prediction:
        """The prediction whose x0, eps or velocity is `value`."""
        dtype = working_dtype(value, x_t)
        x_t, value = x_t.to(dtype), value.to(dtype)
        if kind == "velocity":
            return cls(x_t, t, path, value, features)
        a, s, da, ds = coefficients_for(path, t, x_t)
        if kind == "x0":
            x0, eps = value, _divide(x_t - a * value, s)
        elif kind == "eps":
            x0, eps = _divide(x_t - s * value, a), value
        else:
            raise UserError(f"a prediction is of kind 'x0', 'eps' or 'velocity', not {kind!r}")
        return cls(x_t, t, path, da * x0 + ds * eps, features)

    @classmethod
    def exact(cls, x0: Tensor, eps: Tensor, t: Tensor, path: Path) -> Prediction:
        """The prediction of a perfect network if the data were this x0 alone: the target of denoising."""
        dtype = working_dtype(x0, eps)
        x0, eps = x0.to(dtype), eps.to(dtype)
        a, s, da, ds = coefficients_for(path, t, x0)
        return cls(a * x0 + s * eps, t, path, da * x0 + ds * eps)

    @property
    def x0(self) -> Tensor:
        a, s, da, ds = coefficients_for(self.path, self.t, self.velocity)
        return (ds * self.x_t - s * self.velocity) / (a * ds - s * da)

    @property
    def eps(self) -> Tensor:
        a, s, da, ds = coefficients_for(self.path, self.t, self.velocity)
        return (a * self.velocity - da * self.x_t) / (a * ds - s * da)

    def read(self, kind: Kind) -> Tensor:
        """x0, eps or velocity, by name."""
        return {"x0": lambda: self.x0, "eps": lambda: self.eps, "velocity": lambda: self.velocity}[kind]()


def with_clean_frames(prediction: Prediction, frames: Tensor | None, frame_mask: Tensor | None) -> Prediction:
    """The prediction with x0 replaced by `frames` where `frame_mask` (B, T) is 1."""
    if frame_mask is None or frames is None:
        return prediction
    clean = Prediction.of("x0", frames.to(prediction.velocity), prediction.x_t, prediction.t, prediction.path).velocity
    is_clean = frame_mask.bool()[:, None, :, None, None]
    return replace(prediction, velocity=torch.where(is_clean, clean, prediction.velocity))


def coefficients_for(path: Path, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, s, a', s' shaped to multiply `like` and cast to its type, from float64."""
    a, s, da, ds = (spread(c, like).to(like.dtype) for c in path.coefficients(t))
    return a, s, da, ds


def _divide(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, and 0 where the bottom is 0."""
    return torch.where(bottom == 0, 0.0, top / torch.where(bottom == 0, 1.0, bottom))
