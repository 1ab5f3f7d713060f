"""The average velocity of a flow from t down to r, u(x_t, t, r) = (x_t - x_r) / (t - r), and the identity that trains it.

    u = v - (t - r) du/dt,   du/dt along (v, 1, 0) in (x_t, t, r)              Geng et al. 2025, arXiv:2505.13447, eq. 6

At r = t it is the velocity itself. v is the teacher's, guided, or that of the data, eps - x0, guided by the student's own
velocity under the negative condition (eq. 19). AnyFlow guides the answer instead, with a derivative along the velocity that is
not guided, so that its fixed point is another below r = t. The network receives r in `cond.end`; the path is the rectified
flow, on which a jump is x_r = x_t - (t - r) u.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition, choose
from fewstep.diffusion import Denoiser, Prediction, RectifiedFlow, Rng, guided, on_path, times
from fewstep.diffusion.derivative import Agreement, AnyDerivative, Function, Jvp, disagreement
from fewstep.diffusion.path import spread
from fewstep.methods.contract import Nets, Terms, free_mask

FLOW = RectifiedFlow()


@dataclass(frozen=True)
class AverageVelocity:
    source: Literal["teacher", "data"] = "teacher"  # of v: distillation, or training from data
    times: times.AnyTimes = times.LogitNormal(mean=-0.4, std=1.0)  # two draws of it, ordered, are t and r
    share_instant: float = 0.5  # of the samples, with r = t; MeanFlow 0.75 (CIFAR-10: 0.25), AnyFlow 0.5
    share_whole: float = 0.0  # of the samples, with r = 0; AnyFlow 0.25
    guidance: float = 1.0  # w of v, 1 is off; AnyFlow 3.0
    drop_condition: float = 0.0  # share of samples trained on the negative condition, without guidance
    derivative: AnyDerivative = Jvp()
    weighting: Literal["adaptive", "anyflow"] = "adaptive"  # 1 / (error + c)^power; or as in `_anyflow_weight`
    power: float = 1.0  # of the adaptive weight; MeanFlow 0.75 on CIFAR-10
    constant: float = 1e-3  # c of the adaptive weight

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.guidance != 1.0 or self.drop_condition else {"x0"})

    def __call__(self, nets: Nets, batch: Batch, rng: Rng) -> Terms:
        """The term of a student turn."""
        truth, r = self._truth(batch, rng)
        batch, w = self._conditioned(batch, rng)
        cond, student = batch.cond, on_path(nets.student, FLOW)
        velocity = self._velocity(truth, nets, batch, w)
        change = self.derivative.along(*_along_velocity(student, truth, r, cond, velocity))
        target = velocity - spread(truth.t - r, change).to(change.dtype) * change
        answer = ending(student, truth.x_t, truth.t, r, cond)
        mask = free_mask(cond, answer)
        error = (answer - target) ** 2
        free = torch.ones_like(error) if mask is None else mask.expand_as(error)
        each = (error * free).flatten(1).sum(1) / free.flatten(1).sum(1).clamp(min=1)
        weight = self._weight(each.detach().double(), truth.t, r, nets).to(each.dtype)
        return Terms.of(average_velocity=(weight * each).mean(), watch={"error": each.detach().mean()})

    def draw(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """t and r <= t of every row."""
        first, second, share = self.times.draw(rng, FLOW), self.times.draw(rng, FLOW), rng.uniform()
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        r = torch.where(share < self.share_instant, t, r)
        return t, torch.where(share >= 1 - self.share_whole, torch.zeros_like(r), r)

    def _conditioned(self, batch: Batch, rng: Rng) -> tuple[Batch, Tensor | float]:
        """The batch, a share of its samples under the negative condition, and w of every sample."""
        if not self.drop_condition:
            return batch, self.guidance
        assert batch.negative is not None and batch.x0 is not None
        is_dropped = rng.uniform().to(batch.x0.device) < self.drop_condition
        return replace(batch, cond=choose(is_dropped, batch.negative, batch.cond)), torch.where(is_dropped, 1.0, self.guidance)

    @torch.no_grad()
    def _velocity(self, truth: Prediction, nets: Nets, batch: Batch, w: Tensor | float) -> Tensor:
        if self.source == "teacher":
            teacher = guided(on_path(nets.teacher, FLOW), batch.negative, self.guidance)
            return teacher(truth.x_t, truth.t, batch.cond).velocity
        if self.guidance == 1.0:
            return truth.velocity
        assert batch.negative is not None
        without = ending(on_path(nets.student, FLOW), truth.x_t, truth.t, truth.t, batch.negative)
        scale = spread(w, without).to(without.dtype) if isinstance(w, Tensor) else w
        return without + scale * (truth.velocity - without)

    def _truth(self, batch: Batch, rng: Rng) -> tuple[Prediction, Tensor]:
        """The data, noised to t; and r."""
        assert batch.x0 is not None
        t, r = (time.to(batch.x0.device) for time in self.draw(rng))
        return Prediction.exact(batch.x0, rng.normal_like(batch.x0), t, FLOW), r

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        """How far the derivative of the student in this loss is from one by differences."""
        truth, r = self._truth(batch, rng)
        velocity = self._velocity(truth, nets, batch, self.guidance)
        way = _along_velocity(on_path(nets.student, FLOW), truth, r, batch.cond, velocity)
        return Agreement(self.derivative, disagreement(self.derivative, *way))

    def _weight(self, error: Tensor, t: Tensor, r: Tensor, nets: Nets) -> Tensor:
        if self.weighting == "adaptive":
            return (error + self.constant) ** -self.power
        return _anyflow_weight(error, t, r, nets)

    def problems(self) -> Iterable[tuple[str, str]]:
        if not (self.share_instant >= 0 and self.share_whole >= 0 and self.share_instant + self.share_whole <= 1):
            yield "share_instant", "and share_whole are shares of samples, which sum to at most 1"
        if not 0 <= self.drop_condition < 1:
            yield "drop_condition", f"is a share of samples, 0 up to but not 1, not {self.drop_condition}"
        if self.source == "teacher" and self.guidance == 1.0 and self.weighting == "anyflow":
            yield (
                "weighting",
                "anyflow scales the losses with r < t to the mean of those with r = t, and a student that starts as its "
                "teacher has none there: set weighting=adaptive, guidance above 1, or source=data",
            )


def _along_velocity(
    student: Denoiser, truth: Prediction, r: Tensor, cond: Condition, velocity: Tensor
) -> tuple[Function, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The average velocity down to r, where to take its derivative, the direction (v, 1) in (x_t, t), and the room for t."""
    x_t, t = truth.x_t, truth.t

    def average(x: Tensor, time: Tensor) -> Tensor:
        return ending(student, x, time, r, cond)

    return average, (x_t, t), (velocity.to(x_t.dtype), torch.ones_like(t)), (t - r, 1 - t)


def _anyflow_weight(error: Tensor, t: Tensor, r: Tensor, nets: Nets) -> Tensor:
    """t sqrt(1 - t), its mean 1 over t in 0..1, where r = t; elsewhere what makes the loss the mean of those.

    The mean is over this micro-batch on all processes, so that accumulation in smaller ones trains slightly differently.
    """
    weight = t * torch.sqrt(1 - t) * 15 / 4
    loss, is_instant = weight * error, r == t
    total, count = nets.summed(torch.stack((torch.where(is_instant, loss, 0.0).sum(), is_instant.sum().to(loss))))
    scale = torch.where(count > 0, total / count.clamp(min=1) / (loss + 1e-5), 1.0)
    return torch.where(is_instant, weight, weight * scale)


def ending(student: Denoiser, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
    """u(x_t, t, r) of a student on the rectified flow."""
    return student(x_t, t, replace(cond, end=r)).velocity
