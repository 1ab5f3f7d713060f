"""LADD: a few-step student by an adversary alone, which sees noised samples through the teacher's features.

    student   softplus(-D(teacher features of a x_student + s eps))        Sauer et al. 2024, arXiv:2403.12015
    head      the same features of noised student samples against noised real data, with approximate R1

No scores are compared and no critic is trained: the teacher is a feature network. What is learnt is the distribution of the
data set, which may as well hold the teacher's own samples (the paper's choice).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, features, on_path, times
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.rollout import Renoise
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.methods.gan import Gan
from fewstep.methods.given import problems_of, with_given
from fewstep.methods.student import check_times, generate


@kind("ladd", group="method")
@dataclass(frozen=True)
class LADD:
    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)
    renoise: Renoise = "fresh"
    path: AnyPath | None = None  # None: the student's own
    student_update_freq: int = 2  # FastGen's Wan recipe; its class default 5
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the head looks: much of it for layout, little for detail
    exit_step: Literal["random", "last"] = "random"
    student_input: Literal["rollout", "data"] = "rollout"  # data: noised real data at one of the student's times, as in FastGen
    given: tuple[float, ...] = ()  # shares of samples shown 0, 1, .. clean first frames; Predict2.5 0.6, 0.2, 0.2
    gan: Gan = Gan(weight=1.0, r1_weight=0.1, r1_std=0.1)

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher", "head")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"})  # real data, at their own conditions

    def turn(self, step: int) -> Turn:
        student = step % self.student_update_freq == 0
        return Turn("student", ("student",)) if student else Turn("head", ("head",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_given(batch, self.given, rng)
        assert batch.x0 is not None
        path, is_student = self.path or nets.student.path, turn.name == "student"
        sample = generate(
            on_path(nets.student, path),
            batch,
            rng,
            self.t_list,
            renoise=self.renoise,
            exit_step=self.exit_step,
            student_input=self.student_input,
            with_grad=is_student,
        )
        t, eps = self.times.draw(rng, path).to(sample.device), rng.normal_like(sample)
        teacher = on_path(nets.teacher, path)
        with torch.set_grad_enabled(is_student):
            fake = features(teacher, path.add_noise(sample, eps, t), t, batch.cond, nets.head.taps)
        if is_student:
            logits = nets.head(fake)
            yield Terms.of(gan=(self.gan.fools(logits), self.gan.weight), watch={"logit_student": logits.detach().mean()})
        else:
            yield self.gan.head_terms(nets.head, teacher, fake, batch.x0, eps, t, self.times, path, batch.cond, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.path or path, self.renoise)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from check_times(self.t_list)
        yield from problems_of(self.given)
        if self.student_update_freq < 2:
            yield "student_update_freq", f"must be at least 2, or the head is never trained; it is {self.student_update_freq}"
        if self.gan.features != "teacher":
            yield "gan.features", "must be 'teacher': LADD has no critic"
