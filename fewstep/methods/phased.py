"""Phased DMD: each call of the student learns its own interval of noise, one phase after the other.

Phase k leads from t_(k-1) to t_k, the last one to clean data. What is matched is the distribution at t_k, not at 0: the
student's x0 is noised to t_k and from there upwards only,         Fan et al. 2025, arXiv:2510.27684

    x_k = a_k x0 + s_k e            x_t = (a/a_k) x_k + sigma eps            sigma^2 = s^2 - (a s_k / a_k)^2,  t > t_k

so that the first calls answer for layout alone and leave detail to the later ones. The critic must learn the score of *this*
x_t from x_k, without an x0: score = E[-eps / sigma], that is

    eps* = s eps / sigma            x0* = x_k / a_k - a s_k^2 / (a_k^2 sigma) eps

both of which grow like 1/sigma at t_k; the error is multiplied by (sigma / s)^2, which is 1 far above t_k.

A network with an expert per interval (network kind experts, its boundary between two times of t_list) keeps in one phase what
it learnt in the last; a single network for all noise levels may lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, on_path, rollout
from fewstep.diffusion.prediction import coefficients_for
from fewstep.diffusion.rollout import start
from fewstep.methods.contract import Nets, Terms, Turn, free_mask, reduced
from fewstep.methods.dmd2 import DMD2, surrogate
from fewstep.methods.given import with_given


@kind("phased_dmd", group="method")
@dataclass(frozen=True)
class PhasedDMD(DMD2):
    t_list: tuple[float, ...] = (1.0, 0.8333333333333334)  # where the phases begin; the last one ends at 0
    steps_per_phase: int = 1000  # iterations; the last phase goes on to the end of the run

    def turn(self, step: int) -> Turn:
        phase = min(step // self.steps_per_phase, len(self.t_list) - 1)
        turn = super().turn(step - phase * self.steps_per_phase)  # each phase has its own warm-up
        return replace(turn, name=f"{turn.name}_phase{phase + 1}")

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_given(batch, self.given, rng)
        assert batch.x0 is not None
        path, phase = self.path or nets.student.path, int(turn.name.rpartition("_phase")[2]) - 1
        is_student = "student" in turn.trains
        x = start(path, rng.normal_like(batch.x0), self.t_list[0])
        sample = rollout(
            on_path(nets.student, path), x, self.t_list, batch.cond, rng=rng, num_calls=phase + 1, with_grad=is_student
        ).x0
        end = self.t_list[phase + 1] if phase + 1 < len(self.t_list) else 0.0
        yield from (self._student if is_student else self._critic)(path, nets, sample, end, batch, rng)

    def _student(self, path: Path, nets: Nets, sample: Tensor, end: float, batch: Batch, rng: Rng) -> Iterator[Terms]:
        mask = free_mask(batch.cond, sample)
        with torch.no_grad():
            step = renoised(sample, end, self._above(end, path, rng).to(sample.device), path, rng)
            critic = on_path(nets.critic, path)(step.x_t, step.t, batch.cond).x0
            teacher = self._teacher(path, nets, batch)(step.x_t, step.t, batch.cond).x0
            gradient = self._normalised(critic - teacher, sample, teacher, mask)
        yield Terms.of(vsd=surrogate(sample, gradient, mask, self.reduction), watch={"vsd_gradient": gradient.abs().mean()})

    def _critic(self, path: Path, nets: Nets, sample: Tensor, end: float, batch: Batch, rng: Rng) -> Iterator[Terms]:
        for _ in range(self.critic_draws):
            step = renoised(sample, end, self._above(end, path, rng, of_critic=True).to(sample.device), path, rng)
            answer = on_path(nets.critic, path)(step.x_t, step.t, batch.cond)
            _, s, da, ds = coefficients_for(path, step.t, sample)
            target = {"x0": step.x0, "eps": step.eps, "velocity": da * step.x0 + ds * step.eps}[self.critic_space]
            error = (step.sigma * answer.read(self.critic_space) - target) ** 2 / s**2
            loss = reduced(error, free_mask(batch.cond, error), self.critic_reduction)
            yield Terms.of(critic=(loss, 1 / self.critic_draws))

    def _above(self, end: float, path: Path, rng: Rng, of_critic: bool = False) -> Tensor:
        """Times above `end`: the law of `times`, its angles atan(s / a) drawn together into what is left of them."""
        law = (self.critic_times or self.times) if of_critic else self.times
        a, s, _, _ = path.coefficients(law.draw(rng, path))
        low_a, low_s, _, _ = path.coefficients(torch.tensor(end, dtype=torch.float64))
        top_a, top_s, _, _ = path.coefficients(torch.tensor(path.t_max, dtype=torch.float64))
        low, top = math.atan2(float(low_s), float(low_a)), math.atan2(float(top_s), float(top_a))
        angle = low + (top - low) * torch.atan2(s, a) / top
        ratio = torch.where(angle >= math.pi / 2, math.inf, torch.tan(angle))
        return path.time_of(ratio)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.steps_per_phase < 1:
            yield "steps_per_phase", f"must be at least 1, not {self.steps_per_phase}"
        if self.renoise != "fresh":
            yield "renoise", f"must be fresh: each phase is trained on freshly noised answers of the last, not {self.renoise!r}"
        for name in ("gan", "guidance_times"):
            if getattr(self, name) is not None:
                yield name, "is no part of phased DMD here: leave it out"
        if self.regression_weight or self.student_input == "data" or self.warmup_role == "regression":
            yield "regression_weight", "and student_input=data are no part of phased DMD: it is trained on its own roll-out"


@dataclass(frozen=True)
class Renoised:
    """A state above t_k, and what the critic is to answer there, times sigma: finite at t_k too."""

    x_t: Tensor
    t: Tensor
    x0: Tensor  # sigma x0*
    eps: Tensor  # sigma eps*
    sigma: Tensor


def renoised(sample: Tensor, end: float, t: Tensor, path: Path, rng: Rng) -> Renoised:
    """`sample` noised to `end`, and from there to t: one Gaussian step each, with noise of its own."""
    at_end = torch.full_like(t, end)
    x_k = path.add_noise(sample, rng.normal_like(sample), at_end)
    a, s, _, _ = coefficients_for(path, t, x_k)
    a_k, s_k, _, _ = coefficients_for(path, at_end, x_k)
    sigma = (s**2 - (a * s_k / a_k) ** 2).clamp(min=1e-12).sqrt()
    eps = rng.normal_like(sample)
    return Renoised(a / a_k * x_k + sigma * eps, t, sigma * x_k / a_k - a * (s_k / a_k) ** 2 * eps, s * eps, sigma)
