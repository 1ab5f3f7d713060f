"""The tangent of a consistency function along the teacher's ODE, in TrigFlow (Lu & Song 2024, arXiv:2410.11081).

With x_t = cos t x0 / sd + sin t eps, velocity F and f = x0 / sd = cos t x_t - sin t F, a consistency function is constant along
dx/dt, the ODE of the teacher (or, from data, cos t eps - sin t x0 / sd):

    cos t df/dt = -cos^2 t (F - dx/dt) - cos t sin t (x_t + dF/dt)                                     ib., eq. 6

The second part is warmed up by a factor r from 0 to 1; then the whole is normalised, g / (|g| + constant).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Denoiser, Prediction, Rng, TrigFlow, guided, on_path, times
from fewstep.diffusion.derivative import Agreement, AnyDerivative, Function, Jvp, disagreement
from fewstep.diffusion.path import spread
from fewstep.methods.contract import Nets, Reduction, Terms, free_mask, reduced


@dataclass(frozen=True)
class Tangent:
    warmup_iters: int = 10_000  # student turns until r = 1; sCM 10,000
    scales: Literal["all", "state"] = "all"  # r scales x_t + dF/dt; in rCM's code x_t alone, and cos t of the first part ..
    #                                          .. becomes sqrt(1 - r^2 sin^2 t). The same at r = 1
    norm: Literal["rms", "l2"] = "rms"  # of g over one sample: sCM in FastGen divides by its rms, rCM by its l2 norm
    constant: float = 0.1  # 0: no normalisation

    def __call__(self, parts: TangentParts, mask: Tensor | None, step: int) -> Tensor:
        """g of each sample, 0 where a frame is conditioned on; `step` counts from 0."""
        r = min(1.0, step / self.warmup_iters) if self.warmup_iters else 1.0
        cos, sin, gap = parts.cos, parts.sin, parts.velocity - parts.ode
        if self.scales == "all":
            g = -(cos**2) * gap - r * (cos * sin * parts.x_t + parts.change)
        else:
            g = -cos * torch.sqrt(1 - (r * sin) ** 2) * gap - (r * cos * sin * parts.x_t + parts.change)
        g = g if mask is None else g * mask
        axes = tuple(range(1, g.ndim))
        count = torch.ones_like(g) if mask is None else mask.expand_as(g)
        norm = g.square().sum(axes, keepdim=True)
        norm = (norm / count.sum(axes, keepdim=True).clamp(min=1) if self.norm == "rms" else norm).sqrt()
        return g / (norm + self.constant) if self.constant else g

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.warmup_iters < 0:
            yield "warmup_iters", f"must be at least 0, not {self.warmup_iters}"
        if self.constant < 0:
            yield "constant", f"must be at least 0 (0: no normalisation), not {self.constant}"


@dataclass(frozen=True)
class TangentParts:
    """What the tangent is computed from, each of the shape of x_t but cos and sin; float64, without a graph."""

    x_t: Tensor
    velocity: Tensor  # F of the student
    ode: Tensor  # dx/dt of the teacher or of the data
    change: Tensor  # cos t sin t dF/dt, along (dx/dt, 1)
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class TangentTerm:
    """The loss of sCM on data: F moves along its tangent g, |F - (F + g) without a graph|^2."""

    source: Literal["teacher", "data"] = "teacher"  # of the ODE: distillation (sCD) or training from data (sCT)
    path: TrigFlow = TrigFlow()
    times: times.AnyTimes = times.LogNormal(mean=-1.0, std=1.4)  # of tan t; rCM 0.7 and 1.6 on video
    guidance: float = 1.0  # w of the teacher, 1 is off; rCM 5.0
    tangent: Tangent = Tangent()
    derivative: AnyDerivative = Jvp()
    reduction: Reduction = "mean"  # rCM: sum
    weight: float = 1.0  # rCM: 100

    def __call__(self, step: int, nets: Nets, batch: Batch, rng: Rng) -> Terms:
        """The term of a student turn; `step` counts student turns from 0."""
        cond, student, truth = batch.cond, on_path(nets.student, self.path), self._truth(batch, rng)
        parts = self._parts(student, truth, cond, self._ode(truth, nets, batch))
        mask = free_mask(cond, truth.x_t)
        g = self.tangent(parts, mask, step)
        velocity = student(truth.x_t, truth.t, cond).velocity
        target = velocity.detach() + g.to(velocity.dtype)
        loss = reduced((velocity - target) ** 2, mask, self.reduction)
        return Terms.of(scm=(loss, self.weight), watch={"tangent": parts.change.abs().mean()})

    def _truth(self, batch: Batch, rng: Rng) -> Prediction:
        """The data, noised."""
        assert batch.x0 is not None
        t = self.times.draw(rng, self.path).to(batch.x0.device)
        return Prediction.exact(batch.x0, rng.normal_like(batch.x0), t, self.path)

    @torch.no_grad()
    def _ode(self, truth: Prediction, nets: Nets, batch: Batch) -> Tensor:
        """dx/dt at x_t."""
        if self.source == "data":
            return truth.velocity
        teacher = guided(on_path(nets.teacher, self.path), batch.negative, self.guidance)
        return teacher(truth.x_t, truth.t, batch.cond).velocity

    def _parts(self, student: Denoiser, truth: Prediction, cond: Condition, ode: Tensor) -> TangentParts:
        x_t, t = truth.x_t, truth.t
        change = self.derivative.along(*_along_ode(student, truth, cond, ode), None)
        with torch.no_grad():
            answer = student(x_t, t, cond).velocity
        cos, sin = spread(t.cos(), x_t), spread(t.sin(), x_t)
        return TangentParts(x_t.double(), answer.double(), ode.double(), change.double(), cos, sin)

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        """How far the derivative of the student in this loss is from one by differences."""
        truth = self._truth(batch, rng)
        way = _along_ode(on_path(nets.student, self.path), truth, batch.cond, self._ode(truth, nets, batch))
        return Agreement(self.derivative, disagreement(self.derivative, *way))

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.source == "data" and self.guidance != 1.0:
            yield "guidance", "has no effect without a teacher: set source=teacher, or guidance=1"
        if self.weight <= 0:
            yield "weight", f"must be above 0, not {self.weight}"


def _along_ode(
    student: Denoiser, truth: Prediction, cond: Condition, ode: Tensor
) -> tuple[Function, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The student's velocity, where to take its derivative, and the direction (dx/dt, 1) in (x_t, t).

    The direction is scaled by cos t sin t, which keeps the derivative finite near both ends of the path.
    """
    x_t, t = truth.x_t, truth.t
    scale = t.cos() * t.sin()

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return student(x, time, cond).velocity

    return velocity, (x_t, t), (spread(scale, x_t).to(x_t.dtype) * ode.to(x_t.dtype), scale)
