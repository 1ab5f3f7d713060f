"""DMD2: make the student's distribution the teacher's, by the difference of two scores.

    grad = w (x0_critic - x0_teacher) at a noised student sample      Yin et al. 2023, arXiv:2311.18828, eq. 7
    w    = 1 / mean |x_student - x0_teacher|, one per sample          ib., eq. 8
    critic: denoising on the student's samples, several turns for each turn of the student (critic.py)
    several steps: the student is trained on its own roll-out, gradient in its last call (student.py)
    GAN: a head on the features of teacher or critic tells student samples from real data (gan.py)
                                                                      Yin et al. 2024, arXiv:2405.14867, section 4

The value of the DMD2 loss does not measure progress: only its gradient matters, and the value is about the same at the start
and at the end. Judge by samples, distances and the health monitors. Published dialects are in dmd2_dialects.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch, join
from fewstep.config import kind
from fewstep.diffusion import Denoiser, Path, Prediction, Rng, StudentSampler, guided, on_path, times
from fewstep.diffusion.path import AnyPath, spread
from fewstep.errors import UserError
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.critic import Critic
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.gan import Gan
from fewstep.methods.sample_weight import AnySampleWeight
from fewstep.methods.student import StudentSample
from fewstep.methods.turns import Warmup, is_student_turn, problems_of_frequency


@dataclass(frozen=True)
class Normalizer:
    """Divides a difference of two x0 by mean |sample - teacher|, one mean per sample; 0 where a frame is conditioned on."""

    min: float = 1e-5  # lower bound of the mean. Predict2.5
    add: float = 0.0  # added to the mean. FastGen 1e-6
    over: Literal["free", "all"] = "free"  # all: conditioning frames count in the mean, as zeros. Transfer1, FastGen

    def __call__(self, difference: Tensor, sample: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        axes = tuple(range(1, sample.ndim))
        distances = (sample - teacher).abs()
        # Transfer1 writes w = sigma / mean|eps - eps_teacher| before a difference of scores -eps / sigma: the same gradient.
        if mask is None:
            distance = distances.sum(axes, keepdim=True) / math.prod(sample.shape[1:])
        else:
            free = mask.expand_as(sample)
            area = free if self.over == "free" else torch.ones_like(free)
            distance = (distances * free).sum(axes, keepdim=True) / area.sum(axes, keepdim=True).clamp(min=1)
            difference = difference * free
        return difference / (distance.clamp(min=self.min) + self.add)


@dataclass(frozen=True)
class Regression:
    """The mean square of the student's sample less x0."""

    weight: float = 0.25  # Yin et al. 2023, there of a perceptual distance
    source: Literal["pairs", "data"] = "pairs"  # pairs: from the noise of x0; data: from any noise, Transfer1's recon_loss
    warmup_steps: int = 0  # first turns of the run, which train the student on this term alone

    def loss(self, sample: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """The term and its weight."""
        assert batch.x0 is not None
        return reduced((sample - batch.x0) ** 2, free_mask(batch.cond, sample), "mean"), self.weight

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield "weight", f"is {self.weight}: the term would have no effect; leave it out (regression=none)"


@kind("dmd2", group="method")
@dataclass(frozen=True)
class DMD2:
    student: StudentSample = StudentSample()
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean ones; Predict2.5 0.6, 0.2, 0.2
    frame_noise: times.LogNormal | None = None  # level of noise on given frames, in sigma; none: they are clean
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    guidance: float = 1.0  # w = 1 is off. Cosmos writes g = w - 1: Transfer1 g 5 is 6.0 here, Predict2.5 g 3 is 4.0
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    guidance_times: times.AnyTimes | None = None  # decoupled DMD: the noise of the guidance part; None: that of the scores
    normalizer: Normalizer = Normalizer()
    sample_weight: AnySampleWeight | None = None  # factor on each sample's gradient (f-distill, rewards); none: 1
    reduction: Reduction = "half_mean"  # of the student's term; "mean_all" for Predict2.5
    critic: Critic = Critic()
    gan: Gan | None = None  # none: no adversarial term, no head, no real data
    regression: Regression | None = None  # none: no term on the student's sample less x0
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup: Warmup = Warmup()

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher", "critic") if self.gan is None else ("student", "teacher", "critic", "head")

    @property
    def needs(self) -> frozenset[str]:
        # Without GAN and regression real data is not needed: the student starts from noise, and x0 gives the shape.
        negative = {"negative"} if self.guidance != 1.0 else set[str]()
        return frozenset({"x0"} | negative | ({"noise"} if self._uses_pairs else set()))

    def turn(self, step: int) -> Turn:
        if self.regression is not None and step < self.regression.warmup_steps:
            return Turn("regression", ("student",))
        if is_student_turn(step, self.student_update_freq, self.warmup):
            return Turn("student", ("student",))
        return Turn("critic", ("critic",) if self.gan is None else ("critic", "head"))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng, self.frame_noise, self.path or nets.student.path)
        path = self.path or nets.student.path
        sample = self.student.draw(
            on_path(nets.student, path),
            batch,
            rng,
            with_grad="student" in turn.trains,
            noise=batch.noise if self._uses_pairs else None,
        )
        if turn.name == "student":
            yield self._student_terms(path, nets, sample, batch, rng)
        elif self.regression is not None and turn.name == "regression":
            yield Terms.of(regression=self.regression.loss(sample, batch))
        else:
            yield from self.critic.losses(path, nets, sample, batch, rng, self.times, self.gan)

    def sampler(self, path: Path) -> StudentSampler:
        return self.student.sampler(self.path or path)

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = self.times.draw(rng, path).to(sample.device)
        mask = free_mask(batch.cond, sample)
        # Only a head's term needs the way from the sample through teacher or critic: without one, keep no graph of it.
        with torch.set_grad_enabled(self.gan is not None):
            x_t = path.add_noise(sample, rng.normal_like(sample), t)
        critic = self._prediction("critic", on_path(nets.critic, path), nets, x_t, t, batch)
        teacher = self._prediction("teacher", self._teacher(path, nets, batch), nets, x_t, t, batch)
        logits: Tensor | None = None
        terms: dict[str, Tensor | tuple[Tensor, float]] = {}
        if self.gan is not None:  # the features are those of the very call that gave the score
            logits = nets.head((teacher if self.gan.features == "teacher" else critic).features)
            terms["gan"] = (self.gan.student_loss(logits), self.gan.weight)
        if self.regression is not None:
            terms["regression"] = self.regression.loss(sample, batch)
        watch: dict[str, Tensor] = {}
        with torch.no_grad():
            goal = teacher.x0
            gradient = self.normalizer(critic.x0 - goal, sample, goal, mask)  # eq. 7, 8
            if self.guidance_times is not None and self.guidance != 1.0:
                gradient = gradient + self._guidance_gradient(self.guidance_times, path, nets, sample, batch, mask, rng)
            if self.sample_weight is not None:
                weight = self.sample_weight(sample, batch.cond, t, path, logits)
                gradient = spread(weight, gradient).to(gradient.dtype) * gradient
                watch["sample_weight"] = weight.mean()
            watch["vsd_gradient"] = gradient.abs().mean()
        return Terms.of(watch=watch, vsd=surrogate(sample, gradient, mask, self.reduction), **terms)

    def _prediction(self, role: str, denoiser: Denoiser, nets: Nets, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
        if self.gan is None or self.gan.features != role:
            with torch.no_grad():
                return denoiser(x_t.detach(), t, batch.cond)
        return denoiser(x_t, t, batch.cond, taps=nets.head.taps)

    def _teacher(self, path: Path, nets: Nets, batch: Batch) -> Denoiser:
        teacher = on_path(nets.teacher, path)
        if self.guidance_times is not None:
            return teacher
        tapped = self.gan is not None and self.gan.features == "teacher"
        return guided(teacher, batch.negative, self.guidance, interval=self.guidance_interval, negative_grad=not tapped)

    def _guidance_gradient(
        self, law: times.Times, path: Path, nets: Nets, sample: Tensor, batch: Batch, mask: Tensor | None, rng: Rng
    ) -> Tensor:
        """Decoupled DMD (Liu et al. 2025, arXiv:2511.22677): w (critic - guided) is (critic - cond) - (w - 1)(cond - uncond),
        the second part at noise of its own. Each part is normalised at its own noise, this one by the guided prediction."""
        if batch.negative is None:
            raise UserError(f"guidance w = {self.guidance} needs a negative condition, but the batch has none (w = 1 is off)")
        t = law.draw(rng, path).to(sample.device)
        x_t = path.add_noise(sample, rng.normal_like(sample), t)
        both = on_path(nets.teacher, path)(torch.cat([x_t, x_t]), torch.cat([t, t]), join(batch.cond, batch.negative))
        cond, uncond = both.x0.chunk(2)
        scale = torch.full_like(t, self.guidance - 1.0)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            scale = torch.where((t >= low) & (t <= high), scale, 0.0)
        push = spread(scale, cond).to(cond.dtype) * (cond - uncond)
        return self.normalizer(-push, sample, cond + push, mask)

    @property
    def _uses_pairs(self) -> bool:
        return self.regression is not None and self.regression.source == "pairs"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_shares(self.first_frames, self.frame_noise)
        yield from problems_of_frequency(self.student_update_freq)
        if self._uses_pairs and self.student.renoise == "fresh" and len(self.student.t_list) > 1:
            remedy = "choose student.renoise=same or ode, a student of one step, or regression.source=data"
            yield (
                "regression.source",
                f"is 'pairs', but with fresh noise between calls a roll-out is no function of its first: {remedy}",
            )
        if self._uses_pairs and self.student.uses_data:
            yield "student.input", "is 'data', so that the noise of a pair is not used: choose regression.source=data"
        if self.guidance_times is not None and self.guidance == 1.0:
            yield "warn:guidance_times", "has no effect with guidance=1.0, which is off"
        if self.sample_weight is not None and self.sample_weight.needs_ratio and (self.gan is None or self.gan.form == "hinge"):
            reason = "sample_weight reads the density ratio of data and student, the exponential of such a head's logit"
            yield "gan", f"must have form=softplus (or bce): {reason}"


def surrogate(sample: Tensor, gradient: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """A loss whose gradient is `gradient` / N with reduction "half_mean", N the number of elements that count."""
    return reduced((sample - (sample - gradient).detach()) ** 2, mask, reduction)
