"""LADD: a few-step student trained by a GAN alone, whose head reads the teacher's features of noised samples.

    student   softplus(-D(teacher features of a x_student + s eps))        Sauer et al. 2024, arXiv:2403.12015
    head      the same features of noised student samples against noised real data, with approximate R1

No scores are compared and no critic is trained: the teacher is a feature network. The student learns the distribution of the
data set, which may consist of the teacher's own samples (the paper's choice).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, features, on_path, times
from fewstep.diffusion.path import AnyPath
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.gan import Gan
from fewstep.methods.student import StudentSample


@kind("ladd", group="method")
@dataclass(frozen=True)
class LADD:
    student: StudentSample = StudentSample()
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the head reads: much judges layout, little detail
    gan: Gan = Gan(weight=1.0, r1_weight=0.1, r1_std=0.1)
    student_update_freq: int = 2  # FastGen's Wan recipe; its class default 5

    roles = ("student", "teacher", "head")
    needs = frozenset({"x0"})  # real data with their own conditions

    def turn(self, step: int) -> Turn:
        student = step % self.student_update_freq == 0
        return Turn("student", ("student",)) if student else Turn("head", ("head",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        assert batch.x0 is not None
        path = self.path or nets.student.path
        is_student = turn.name == "student"
        sample = self.student.draw(on_path(nets.student, path), batch, rng, with_grad=is_student)
        t = self.times.draw(rng, path).to(sample.device)
        eps = rng.normal_like(sample)
        teacher = on_path(nets.teacher, path)
        with torch.set_grad_enabled(is_student):
            fake = features(teacher, path.add_noise(sample, eps, t), t, batch.cond, nets.head.taps)
        if is_student:
            logits = nets.head(fake)
            watch = {"logit_student": logits.detach().mean()}
            yield Terms.of(watch=watch, gan=(self.gan.student_loss(logits), self.gan.weight))
        else:
            yield self.gan.head_terms(nets.head, teacher, fake, batch.x0, eps, t, self.times, path, batch.cond, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return self.student.sampler(self.path or path)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_shares(self.first_frames)
        if self.student_update_freq < 2:
            yield "student_update_freq", f"must be at least 2, or the head is never trained; it is {self.student_update_freq}"
        if self.gan.features != "teacher":
            yield "gan.features", "must be 'teacher': LADD has no critic"
