"""SiD: score identity distillation, without data. The student minimises the Fisher divergence itself, not a KL divergence.

    E |phi - psi|^2 = E (phi - psi) . (phi - x)     for the exact psi      Zhou et al. 2024, arXiv:2404.04057
    L = w [ (1 - alpha) |phi - psi|^2 + (phi - psi) . (psi - x) ]          the second less alpha times the first
    w = 1 / mean |x - phi|, one per sample

phi and psi are the x0 of teacher and critic at the noised student sample x. Unlike DMD2's, the gradient goes through both of
them (their weights stay as they are), so that a student turn holds two more graphs. The critic learns as in DMD2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, guided, on_path, times
from fewstep.diffusion.path import AnyPath
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import Normalizer
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.student import StudentSample
from fewstep.methods.turns import Warmup, is_student_turn, problems_of_frequency


@kind("sid", group="method")
@dataclass(frozen=True)
class SiD:
    alpha: float = 1.0  # 0.5 .. 1.2 work in the paper, 1.0 and 1.2 best; 0 is the plain square, which a late critic biases
    student: StudentSample = StudentSample()
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    guidance: float = 1.0  # w = 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    normalizer: Normalizer = Normalizer()
    reduction: Reduction = "mean"
    critic: Critic = Critic()
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup: Warmup = Warmup()

    roles = ("student", "teacher", "critic")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"} if self.guidance == 1.0 else {"x0", "negative"})  # x0 for its shape alone

    def turn(self, step: int) -> Turn:
        name = "student" if is_student_turn(step, self.student_update_freq, self.warmup) else "critic"
        return Turn(name, (name,))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        path = self.path or nets.student.path
        is_student = turn.name == "student"
        sample = self.student.draw(on_path(nets.student, path), batch, rng, with_grad=is_student)
        if is_student:
            yield self._student_terms(path, nets, sample, batch, rng)
        else:
            yield from self.critic.losses(path, nets, sample, batch, rng, self.times)

    def sampler(self, path: Path) -> StudentSampler:
        return self.student.sampler(self.path or path)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_shares(self.first_frames)
        yield from problems_of_frequency(self.student_update_freq)

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = self.times.draw(rng, path).to(sample.device)
        x_t = path.add_noise(sample, rng.normal_like(sample), t)
        mask = free_mask(batch.cond, sample)
        teacher = guided(on_path(nets.teacher, path), batch.negative, self.guidance, interval=self.guidance_interval)
        phi = teacher(x_t, t, batch.cond).x0
        psi = on_path(nets.critic, path)(x_t, t, batch.cond).x0
        product = (phi - psi) * ((1 - self.alpha) * (phi - psi) + (psi - sample))
        weight = self.normalizer(phi.new_ones(phi.shape), sample, phi, mask).detach()
        fisher = reduced((phi - psi).detach() ** 2, mask, "mean")
        return Terms.of(sid=reduced(weight * product, mask, self.reduction), watch={"fisher": fisher})
