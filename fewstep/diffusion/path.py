"""Paths from data to noise: x_t = a(t) x0 + s(t) eps.

t is the path's own time and grows with noise, from 0 (clean) to `t_max` (pure noise, or as near as the family goes):

    EDM            a = 1                s = t            t is sigma, t_max 80      Karras et al. 2022, arXiv:2206.00364
    RectifiedFlow  a = 1 - t            s = t            t_max 1                   Liu et al. 2022, arXiv:2209.03003
    TrigFlow       a = cos t / sigma_d  s = sin t        t_max pi/2                Lu & Song 2024, arXiv:2410.11081
    VP             a = cos phi(t)       s = sin phi(t)   t_max 1; phi from a table Ho et al. 2020, arXiv:2006.11239

TrigFlow is written as Cosmos writes it, the state having unit variance; Lu & Song's state is sigma_d times ours.
All arithmetic on t is float64. Only the finished coefficients are cast, once, to the type of the data they multiply.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fewstep.config import OneOf, kind
from fewstep.errors import UserError

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]


class Path(Protocol):
    @property
    def t_max(self) -> float: ...

    def coefficients(self, t: Tensor) -> Coefficients:
        """a, s, da/dt, ds/dt at t: float64, of t's shape."""
        ...

    def time_of(self, ratio: Tensor) -> Tensor:
        """The t at which s/a equals `ratio` (0 .. inf), at most t_max; float64."""
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = a(t) x0 + s(t) eps; t is (B,), or (B, T) where every frame has its own noise level."""
        ...


AnyPath = Annotated[Path, OneOf("path")]  # a field that holds one of the paths


def spread(t: Tensor, like: Tensor) -> Tensor:
    """`t` of shape (B,) or (B, T) shaped so that it multiplies `like` of shape B D, B C H W or B C T H W; dtype stays."""
    if t.ndim == 0:
        return t
    if t.ndim == 1:
        return t.reshape(-1, *[1] * (like.ndim - 1))
    if t.ndim == 2 and like.ndim == 5 and t.shape[1] in (1, like.shape[2]):
        return t[:, None, :, None, None]
    raise UserError(
        f"time of shape {tuple(t.shape)} does not fit data of shape {tuple(like.shape)}: "
        "give (B,), or (B, T) with one time per frame for B C T H W latents"
    )


def floats(values: Tensor) -> list[float]:
    """The entries as Python numbers, from float64."""
    return cast(list[float], values.double().tolist())  # pyright: ignore[reportUnknownMemberType] torch's stub is vague


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precision is never computed in, only stored."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Affine(ABC):
    """The part that all paths share, from their `coefficients`."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """As `Path.coefficients`."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a, s, _, _ = self.coefficients(t)
        dtype = working_dtype(x0, eps)
        return spread(a, x0).to(dtype) * x0.to(dtype) + spread(s, x0).to(dtype) * eps.to(dtype)


@kind("edm", group="path")
@dataclass(frozen=True)
class EDM(_Affine):
    """Variance exploding in Karras' form. A network on it is preconditioned with `sigma_data` (see precondition.py)."""

    sigma_data: float = 0.5  # Cosmos 1; its latents are scaled to this spread
    t_max: float = 80.0

    def coefficients(self, t: Tensor) -> Coefficients:
        t = t.double()
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return one, t, zero, one

    def time_of(self, ratio: Tensor) -> Tensor:
        return ratio.double().clamp(max=self.t_max)


@kind("rectified_flow", group="path")
@dataclass(frozen=True)
class RectifiedFlow(_Affine):
    @property
    def t_max(self) -> float:
        return 1.0

    def coefficients(self, t: Tensor) -> Coefficients:
        t = t.double()
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def time_of(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))


@kind("trigflow", group="path")
@dataclass(frozen=True)
class TrigFlow(_Affine):
    sigma_data: float = 1.0  # Predict2.5: its latents have unit spread

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def coefficients(self, t: Tensor) -> Coefficients:
        t = t.double()
        # Pure noise holds no data at all, but cos(pi/2) is 6e-17, and float32(pi/2), which is above pi/2, has cos -4e-8.
        cos = torch.where(t >= self.t_max, 0.0, torch.cos(t))
        sin = torch.sin(t)
        return cos / self.sigma_data, sin, -sin / self.sigma_data, cos

    def time_of(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio.double() / self.sigma_data)


@kind("vp", group="path")
@dataclass(frozen=True)
class VP(_Affine):
    """The DDPM family. Table entry i (0 .. num_steps - 1) is the noise level at t = (i + 1) / num_steps.

    Between entries the angle phi = atan(s / a) is linear in t: the table is met exactly, both ends are finite (a straight line
    in log alpha-bar has an infinite ds/dt at t = 0), and the velocity is phi'(t) times the "v" of v-prediction.
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float | None = None  # None: 0.0001 for linear (DDPM), 0.00085 for scaled_linear (Stable Diffusion, SDXL)
    beta_end: float | None = None  # None: 0.02 for linear, 0.012 for scaled_linear; the cosine table has no betas to choose
    num_steps: int = 1000
    zero_terminal_snr: bool = False  # CogVideoX; Lin et al. 2023, arXiv:2305.08891, algorithm 1
    snr_shift: float = 1.0  # divides the signal-to-noise ratio before its end is set to zero: CogVideoX 2B 3, 5B 1

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def angles(self) -> Tensor:
        """phi at t = 0, 1/N, .. 1."""
        usual = (0.0001, 0.02) if self.schedule == "linear" else (0.00085, 0.012)
        start = usual[0] if self.beta_start is None else self.beta_start
        end = usual[1] if self.beta_end is None else self.beta_end
        return _angles(self.schedule, start, end, self.num_steps, self.zero_terminal_snr, self.snr_shift)

    def coefficients(self, t: Tensor) -> Coefficients:
        t, angles = t.double(), self.angles.to(t.device)
        place = (t * self.num_steps).clamp(0, self.num_steps)
        left = place.floor().long().clamp(max=self.num_steps - 1)
        slope = angles[left + 1] - angles[left]
        phi = angles[left] + (place - left) * slope
        cos = torch.where(phi >= math.pi / 2, 0.0, torch.cos(phi))
        sin, rate = torch.sin(phi), slope * self.num_steps
        return cos, sin, -sin * rate, cos * rate

    def time_of(self, ratio: Tensor) -> Tensor:
        phi, angles = torch.atan(ratio.double()), self.angles.to(ratio.device)
        right = torch.searchsorted(angles, phi.contiguous()).clamp(1, self.num_steps)
        left = right - 1
        part = (phi - angles[left]) / (angles[right] - angles[left])
        return ((left + part) / self.num_steps).clamp(0.0, self.t_max)


@lru_cache
def _angles(
    schedule: str, beta_start: float, beta_end: float, num_steps: int, zero_terminal_snr: bool, snr_shift: float
) -> Tensor:
    """phi = acos(sqrt(alpha-bar)) at t = 0, 1/N, .. 1."""
    with unset_fake_temporarily():  # it is kept: one made while memory is planned, on fakes, would hold no numbers
        return _made_angles(schedule, beta_start, beta_end, num_steps, zero_terminal_snr, snr_shift)


def _made_angles(
    schedule: str, beta_start: float, beta_end: float, num_steps: int, zero_terminal_snr: bool, snr_shift: float
) -> Tensor:
    if schedule == "cosine":  # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17, betas clipped at 0.999
        edge = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        level = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    else:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0).sqrt()
    a = a / torch.sqrt(snr_shift + (1 - snr_shift) * a**2)
    if zero_terminal_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.acos(a)])
