"""Phased DMD: each call of the student learns its own interval of noise, one phase after the other.

Phase k leads from t_(k-1) to t_k, the last one to clean data. The distributions are matched at t_k, not at 0: the student's x0
is noised to t_k and from there upwards only,                       Fan et al. 2025, arXiv:2510.27684

    x_k = a_k x0 + s_k e            x_t = (a/a_k) x_k + sigma eps            sigma^2 = s^2 - (a s_k / a_k)^2,  t > t_k

so that the first calls determine the layout alone and leave detail to the later ones. The critic must learn the score of *this*
x_t from x_k, without an x0: score = E[-eps / sigma], that is

    eps* = s eps / sigma            x0* = x_k / a_k - a s_k^2 / (a_k^2 sigma) eps

both of which grow like 1/sigma at t_k; the error is multiplied by (sigma / s)^2, which is 1 far above t_k.

A network with an expert per interval (network kind experts, its boundary between two times of t_list) keeps in one phase what
it learnt in the last; a single network for all noise levels may lose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, guided, on_path, rollout, times
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.prediction import coefficients_for
from fewstep.diffusion.rollout import start
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import Normalizer, surrogate
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.student import problems_of_times
from fewstep.methods.turns import Warmup, is_student_turn, problems_of_frequency


@kind("phased_dmd", group="method")
@dataclass(frozen=True)
class PhasedDMD:
    t_list: tuple[float, ...] = (1.0, 0.8333333333333334)  # where the phases begin; the last one ends at 0
    steps_per_phase: int = 1000  # iterations; the last phase goes on to the end of the run
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared, drawn into each interval
    guidance: float = 1.0  # w = 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    normalizer: Normalizer = Normalizer()
    reduction: Reduction = "half_mean"
    critic: Critic = Critic()
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup: Warmup = Warmup()  # at the beginning of each phase

    roles = ("student", "teacher", "critic")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"} if self.guidance == 1.0 else {"x0", "negative"})  # x0 for its shape alone

    def turn(self, step: int) -> Turn:
        phase = min(step // self.steps_per_phase, len(self.t_list) - 1)
        is_student = is_student_turn(step - phase * self.steps_per_phase, self.student_update_freq, self.warmup)
        name = "student" if is_student else "critic"
        return Turn(name, (name,), phase + 1)

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        assert batch.x0 is not None
        path = self.path or nets.student.path
        is_student = turn.name == "student"
        x = start(path, rng.normal_like(batch.x0), self.t_list[0])
        sample = rollout(
            on_path(nets.student, path), x, self.t_list, batch.cond, rng=rng, num_calls=turn.phase, with_grad=is_student
        ).x0
        end = (*self.t_list, 0.0)[turn.phase]
        if is_student:
            yield self._student_terms(path, nets, sample, end, batch, rng)
        else:
            yield from self._critic_terms(path, nets, sample, end, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.path or path, "fresh")

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames)
        yield from problems_of_frequency(self.student_update_freq)
        if self.steps_per_phase < 1:
            yield "steps_per_phase", f"must be at least 1, not {self.steps_per_phase}"

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, end: float, batch: Batch, rng: Rng) -> Terms:
        mask = free_mask(batch.cond, sample)
        teacher = guided(on_path(nets.teacher, path), batch.negative, self.guidance, interval=self.guidance_interval)
        with torch.no_grad():
            state = renoised(sample, end, time_above(end, self.times, path, rng).to(sample.device), path, rng)
            fake = on_path(nets.critic, path)(state.x_t, state.t, batch.cond).x0
            real = teacher(state.x_t, state.t, batch.cond).x0
            gradient = self.normalizer(fake - real, sample, real, mask)
        return Terms.of(vsd=surrogate(sample, gradient, mask, self.reduction), watch={"vsd_gradient": gradient.abs().mean()})

    def _critic_terms(self, path: Path, nets: Nets, sample: Tensor, end: float, batch: Batch, rng: Rng) -> Iterator[Terms]:
        law = self.critic.times or self.times
        for _ in range(self.critic.draws):
            state = renoised(sample, end, time_above(end, law, path, rng).to(sample.device), path, rng)
            answer = on_path(nets.critic, path)(state.x_t, state.t, batch.cond)
            _, s, da, ds = coefficients_for(path, state.t, sample)
            target = {"x0": state.x0, "eps": state.eps, "velocity": da * state.x0 + ds * state.eps}[self.critic.space]
            error = (state.sigma * answer.read(self.critic.space) - target) ** 2 / s**2
            loss = reduced(error, free_mask(batch.cond, error), self.critic.reduction)
            yield Terms.of(critic=(loss, 1 / self.critic.draws))


def time_above(end: float, law: times.Times, path: Path, rng: Rng) -> Tensor:
    """Times above `end`, drawn from `law`: their angles atan(s / a) are compressed into the interval that is left."""
    a, s, _, _ = path.coefficients(law.draw(rng, path))
    low_a, low_s, _, _ = path.coefficients(torch.tensor(end, dtype=torch.float64))
    top_a, top_s, _, _ = path.coefficients(torch.tensor(path.t_max, dtype=torch.float64))
    low = math.atan2(float(low_s), float(low_a))
    top = math.atan2(float(top_s), float(top_a))
    angle = low + (top - low) * torch.atan2(s, a) / top
    ratio = torch.where(angle >= math.pi / 2, math.inf, torch.tan(angle))
    return path.time_of(ratio)


@dataclass(frozen=True)
class Renoised:
    """A state above t_k and the critic's targets there, multiplied by sigma so that they are finite at t_k too."""

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
