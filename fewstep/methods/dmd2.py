"""DMD2: make the student's distribution the teacher's, by the difference of two scores.

    grad = w (x0_critic - x0_teacher) at a noised student sample      Yin et al. 2023, arXiv:2311.18828, eq. 7
    w    = 1 / mean |x_student - x0_teacher|, one per sample          ib., eq. 8
    critic: denoising on the student's samples, several turns for each of the student's
    several steps: the student is trained on its own roll-out, gradient in its last call (backward simulation)
                                                                      Yin et al. 2024, arXiv:2405.14867, section 4

The DMD2 loss is no measure of progress: its gradient is what matters, and its value is about the same at the start and at the
end. Look at samples, at distances, and at the health monitors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Denoiser, Path, Prediction, Rng, StudentSampler, guided, on_path, times
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.rollout import Renoise, rollout, start
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced


@kind("dmd2", group="method")
@dataclass(frozen=True)
class DMD2:
    roles: ClassVar[tuple[str, ...]] = ("student", "teacher", "critic")

    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)  # the student's, without the final 0: shifted(4, 5)
    renoise: Renoise = "fresh"  # "same" for Predict2.5
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup_steps: int = 0  # first turns, all given to `warmup_role`; the student's turns stay 0, freq, 2 freq, ..
    warmup_role: Literal["student", "critic"] = "critic"  # critic: let it meet the student first; student: Predict2.5
    guidance: float = 1.0  # w = 1 is off. Cosmos writes g = w - 1: Transfer1 g 5 is 6.0 here, Predict2.5 g 3 is 4.0
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    critic_times: times.AnyTimes | None = None  # noise the critic learns at; None: as `times`
    critic_space: Kind = "velocity"  # where the critic's error is measured: "eps" Transfer1, "x0" FastGen
    reduction: Reduction = "half_mean"  # of the student's term; "mean" for Predict2.5
    critic_reduction: Reduction = "mean"
    exit_step: Literal["random", "last"] = "random"  # which of the student's calls is trained; the same on all ranks

    @property
    def needs(self) -> frozenset[str]:
        # Real data is not needed: the student starts from noise. x0 gives the shape (and with the GAN, the real samples).
        return frozenset({"x0"} if self.guidance == 1.0 else {"x0", "negative"})

    def turn(self, step: int) -> Turn:
        if step < self.warmup_steps:
            role = self.warmup_role
        else:
            role = "student" if step % self.student_update_freq == 0 else "critic"
        return Turn(role, (role,))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        path = self.path or nets.student.path
        sample = self._generate(on_path(nets.student, path), batch, rng, with_grad=turn.name == "student")
        if turn.name == "student":
            yield self._student_terms(path, nets, sample, batch, rng)
        else:
            yield self._critic_terms(path, nets, sample, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.path or path, self.renoise)

    def _generate(self, student: Denoiser, batch: Batch, rng: Rng, with_grad: bool) -> Tensor:
        """The student's own x0 after some of its calls, from pure noise: never noised real data passed off as it."""
        assert batch.x0 is not None
        num_calls = len(self.t_list) if self.exit_step == "last" else 1 + rng.shared.integer(len(self.t_list))
        x = start(student.path, rng.normal_like(batch.x0), self.t_list[0])
        return rollout(
            student, x, self.t_list, batch.cond, renoise=self.renoise, rng=rng, num_calls=num_calls, with_grad=with_grad
        ).x0

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = self.times.draw(rng, path).to(sample.device)
        mask = free_mask(batch.cond, sample)
        with torch.no_grad():  # no term needs the way from the sample through teacher or critic: keep no graph of them
            x_t = path.add_noise(sample, rng.normal_like(sample), t)
            critic = on_path(nets.critic, path)(x_t, t, batch.cond).x0
            teacher = self._teacher(path, nets, batch)(x_t, t, batch.cond).x0
        loss, gradient = vsd(sample, critic, teacher, mask, self.reduction)
        return Terms.of(vsd=loss, watch={"vsd_gradient": gradient.abs().mean()})

    def _teacher(self, path: Path, nets: Nets, batch: Batch) -> Denoiser:
        return guided(on_path(nets.teacher, path), batch.negative, self.guidance, interval=self.guidance_interval)

    def _critic_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = (self.critic_times or self.times).draw(rng, path).to(sample.device)
        truth = Prediction.exact(sample, rng.normal_like(sample), t, path)
        answer = on_path(nets.critic, path)(truth.x_t, t, batch.cond)
        error = (answer.read(self.critic_space) - truth.read(self.critic_space)) ** 2
        return Terms.of(critic=reduced(error, free_mask(batch.cond, error), self.critic_reduction))

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.t_list or list(self.t_list) != sorted(set(self.t_list), reverse=True) or min(self.t_list) <= 0:
            yield "t_list", f"must descend and stay above 0 (the final 0 is left out), but is {list(self.t_list)}"
        if self.student_update_freq < 1:
            yield "student_update_freq", f"must be at least 1 (1: every turn is the student's), not {self.student_update_freq}"
        elif self.student_update_freq == 1:
            yield "warn:student_update_freq", "is 1: the critic is never trained after the warm-up"


def vsd(sample: Tensor, critic: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """The variational score distillation loss of `sample`, and the gradient it stands for.

    With reduction "half_mean" d loss / d sample = gradient / N exactly, N the number of elements that count.
    """
    with torch.no_grad():
        axes = tuple(range(1, sample.ndim))
        free = torch.ones_like(sample) if mask is None else mask.expand_as(sample)
        # Transfer1 writes w = sigma / mean|eps - eps_teacher| before a difference of scores -eps / sigma: the same gradient.
        spread = ((sample - teacher).abs() * free).sum(axes, keepdim=True) / free.sum(axes, keepdim=True).clamp(min=1)
        gradient = (critic - teacher) * free / spread.clamp(min=1e-5)
        target = sample - gradient
    return reduced((sample - target) ** 2, mask, reduction), gradient
