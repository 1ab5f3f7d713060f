"""DMD2: make the student's distribution the teacher's, by the difference of two scores.

    grad = w (x0_critic - x0_teacher) at a noised student sample      Yin et al. 2023, arXiv:2311.18828, eq. 7
    w    = 1 / mean |x_student - x0_teacher|, one per sample          ib., eq. 8
    critic: denoising on the student's samples, several turns for each of the student's
    several steps: the student is trained on its own roll-out, gradient in its last call (backward simulation)
    a head on the features of teacher or critic tells student samples from real data
                                                                      Yin et al. 2024, arXiv:2405.14867, section 4

The DMD2 loss is no measure of progress: its gradient is what matters, and its value is about the same at the start and at the
end. Look at samples, at distances, and at the health monitors. Published dialects are in dmd2_dialects.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch, join
from fewstep.config import kind
from fewstep.diffusion import Denoiser, Path, Prediction, Rng, StudentSampler, features, guided, on_path, times
from fewstep.diffusion.path import AnyPath, spread
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.rollout import Renoise
from fewstep.errors import UserError
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.gan import Gan
from fewstep.methods.given import problems_of, with_given
from fewstep.methods.student import check_times, generate


@kind("dmd2", group="method")
@dataclass(frozen=True)
class DMD2:
    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)  # the student's, without the final 0: shifted(4, 5)
    renoise: Renoise = "fresh"  # "same" for Predict2.5
    path: AnyPath | None = None  # the path of all times here; None: the student's own
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup_steps: int = 0  # first turns, all given to `warmup_role`; the student's turns stay 0, freq, 2 freq, ..
    warmup_role: Literal["student", "critic", "regression"] = "critic"  # student: Predict2.5; regression: that term alone
    guidance: float = 1.0  # w = 1 is off. Cosmos writes g = w - 1: Transfer1 g 5 is 6.0 here, Predict2.5 g 3 is 4.0
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    guidance_times: times.AnyTimes | None = None  # decoupled DMD: the noise of the guidance part; None: that of the scores
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    critic_times: times.AnyTimes | None = None  # noise the critic learns at; None: as `times`
    critic_space: Kind = "velocity"  # where the critic's error is measured: "eps" Transfer1, "x0" FastGen
    critic_draws: int = 1  # noise levels at which a critic turn uses one student sample
    reduction: Reduction = "half_mean"  # of the student's term; "mean_all" for Predict2.5
    critic_reduction: Reduction = "mean"
    normalizer_min: float = 1e-5  # w is 1 / max(mean|x - x0_teacher|, this). Predict2.5
    normalizer_add: float = 0.0  # .. and this is added to the mean. FastGen 1e-6
    normalizer_over: Literal["free", "all"] = "free"  # all: given frames count in that mean, as zeros. Transfer1, FastGen
    exit_step: Literal["random", "last"] = "random"  # which of the student's calls is trained; the same on all ranks
    student_input: Literal["rollout", "data"] = "rollout"  # data: real data at one of the student's times, as FastGen
    given: tuple[float, ...] = ()  # shares of samples shown 0, 1, .. clean first frames; Predict2.5 0.6, 0.2, 0.2
    gan: Gan | None = None  # none: no adversarial term, no head, no real data
    regression_weight: float = 0.0  # of the mean square of the student's sample less x0
    regression_on: Literal["pairs", "data"] = "pairs"  # pairs: from the noise of x0; data: from any, Transfer1's recon_loss

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher", "critic") if self.gan is None else ("student", "teacher", "critic", "head")

    @property
    def needs(self) -> frozenset[str]:
        # Without GAN and regression real data is not needed: the student starts from noise, and x0 gives the shape.
        negative = {"negative"} if self.guidance != 1.0 else set[str]()
        return frozenset({"x0"} | negative | ({"noise"} if self._starts_from_pairs else set()))

    def turn(self, step: int) -> Turn:
        if step < self.warmup_steps:
            name = self.warmup_role
        else:
            name = "student" if step % self.student_update_freq == 0 else "critic"
        trains = {"critic": ("critic",) if self.gan is None else ("critic", "head")}
        return Turn(name, trains.get(name, ("student",)))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch, path = with_given(batch, self.given, rng), self.path or nets.student.path
        sample = self._generate(on_path(nets.student, path), batch, rng, with_grad="student" in turn.trains)
        if turn.name == "student":
            yield self._student_terms(path, nets, sample, batch, rng)
        elif turn.name == "regression":
            yield Terms.of(regression=(self._regression(sample, batch), self.regression_weight))
        else:
            for _ in range(self.critic_draws):
                yield from self._critic_terms(path, nets, sample, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.path or path, self.renoise)

    # --- the student's sample -----------------------------------------------------------------------------------------

    def _generate(self, student: Denoiser, batch: Batch, rng: Rng, with_grad: bool) -> Tensor:
        return generate(
            student,
            batch,
            rng,
            self.t_list,
            renoise=self.renoise,
            exit_step=self.exit_step,
            student_input=self.student_input,
            from_pairs=self._starts_from_pairs,
            with_grad=with_grad,
        )

    # --- the student's turn -------------------------------------------------------------------------------------------

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = self.times.draw(rng, path).to(sample.device)
        mask = free_mask(batch.cond, sample)
        # Only a head's term needs the way from the sample through teacher or critic: without one, keep no graph of it.
        with torch.set_grad_enabled(self.gan is not None):
            x_t = path.add_noise(sample, rng.normal_like(sample), t)
        critic = self._ask("critic", on_path(nets.critic, path), nets, x_t, t, batch)
        teacher = self._ask("teacher", self._teacher(path, nets, batch), nets, x_t, t, batch)
        gan, logits = self.gan, None
        if gan is not None:  # the features are those of the very call that gave the score
            logits = nets.head((teacher if gan.features == "teacher" else critic).features)
        with torch.no_grad():
            x0 = teacher.x0
            gradient = self._normalised(critic.x0 - x0, sample, x0, mask)
            if self.guidance_times is not None and self.guidance != 1.0:
                gradient = gradient + self._guidance_gradient(path, nets, sample, batch, mask, rng)
            weight = self._sample_weight(sample, t, path, logits, batch)
            if weight is not None:
                gradient = spread(weight, gradient).to(gradient.dtype) * gradient
        found: dict[str, Tensor | tuple[Tensor, float]] = {"vsd": surrogate(sample, gradient, mask, self.reduction)}
        if gan is not None and logits is not None:
            found["gan"] = (gan.fools(logits), gan.weight)
        if self.regression_weight:
            found["regression"] = (self._regression(sample, batch), self.regression_weight)
        watch = {"vsd_gradient": gradient.abs().mean()}
        return Terms.of(watch=watch if weight is None else watch | {"sample_weight": weight.mean()}, **found)

    def _sample_weight(self, sample: Tensor, t: Tensor, path: Path, logits: Tensor | None, batch: Batch) -> Tensor | None:
        """(B,) factors on the gradient; None is 1. What f-distill and reward-weighted DMD change."""
        return None

    def _ask(self, role: str, denoiser: Denoiser, nets: Nets, x_t: Tensor, t: Tensor, batch: Batch) -> Prediction:
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

    def _guidance_gradient(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, mask: Tensor | None, rng: Rng) -> Tensor:
        """Decoupled DMD (Liu et al. 2025, arXiv:2511.22677): w (critic - guided) is (critic - cond) - (w - 1)(cond - uncond);
        the second part at noise of its own. Each part is normalised at its own noise, this one by the guided answer."""
        assert self.guidance_times is not None
        if batch.negative is None:
            raise UserError(f"guidance w = {self.guidance} needs a negative condition, but the batch has none (w = 1 is off)")
        t = self.guidance_times.draw(rng, path).to(sample.device)
        x_t = path.add_noise(sample, rng.normal_like(sample), t)
        both = on_path(nets.teacher, path)(torch.cat([x_t, x_t]), torch.cat([t, t]), join(batch.cond, batch.negative))
        cond, uncond = both.x0.chunk(2)
        more = torch.full_like(t, self.guidance - 1.0)
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            more = torch.where((t >= low) & (t <= high), more, 0.0)
        push = spread(more, cond).to(cond.dtype) * (cond - uncond)
        return self._normalised(-push, sample, cond + push, mask)

    def _normalised(self, difference: Tensor, sample: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        floor, add, over = self.normalizer_min, self.normalizer_add, self.normalizer_over
        return normalised(difference, sample, teacher, mask, floor, add, over)

    def _regression(self, sample: Tensor, batch: Batch) -> Tensor:
        assert batch.x0 is not None
        return reduced((sample - batch.x0) ** 2, free_mask(batch.cond, sample), "mean")

    @property
    def _sees_data(self) -> bool:
        return self.student_input == "data" and len(self.t_list) > 1

    @property
    def _starts_from_pairs(self) -> bool:
        return self.regression_weight > 0 and self.regression_on == "pairs"

    # --- the critic's turn --------------------------------------------------------------------------------------------

    def _critic_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Iterator[Terms]:
        law, gan, share = self.critic_times or self.times, self.gan, 1 / self.critic_draws
        t, eps = law.draw(rng, path).to(sample.device), rng.normal_like(sample)
        truth = Prediction.exact(sample, eps, t, path)
        critic, teacher = on_path(nets.critic, path), None if gan is None else on_path(nets.teacher, path)
        taps = nets.head.taps if gan is not None and gan.features == "critic" else ()
        answer = critic(truth.x_t, t, batch.cond, taps=taps)
        error = (answer.read(self.critic_space) - truth.read(self.critic_space)) ** 2
        loss = reduced(error, free_mask(batch.cond, error), self.critic_reduction)
        if gan is None or teacher is None:
            yield scaled(Terms.of(critic=loss), share)
            return
        assert batch.x0 is not None
        if gan.features == "critic":  # one graph: the head's gradient goes on into the trunk
            yield scaled(
                gan.head_terms(nets.head, critic, answer.features, batch.x0, eps, t, law, path, batch.cond, rng, critic=loss),
                share,
            )
            return
        x_t = truth.x_t
        del answer, truth, error  # the critic's graph is gone before the head's begins
        yield scaled(Terms.of(critic=loss), share)
        del loss
        with torch.no_grad():
            fake = features(teacher, x_t, t, batch.cond, nets.head.taps)
        yield scaled(gan.head_terms(nets.head, teacher, fake, batch.x0, eps, t, law, path, batch.cond, rng), share)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from check_times(self.t_list)
        yield from problems_of(self.given)
        if self.student_update_freq < 1:
            yield "student_update_freq", f"must be at least 1 (1: every turn is the student's), not {self.student_update_freq}"
        elif self.student_update_freq == 1:
            yield "warn:student_update_freq", "is 1: the critic is never trained after the warm-up"
        if self.critic_draws < 1:
            yield "critic_draws", f"must be at least 1, not {self.critic_draws}"
        if self.warmup_role == "regression" and self.warmup_steps and not self.regression_weight:
            yield "regression_weight", "is 0, but warmup_role=regression trains on that term alone"
        if self._starts_from_pairs and self.renoise == "fresh" and len(self.t_list) > 1:
            yield (
                "regression_on",
                (
                    "is 'pairs', but with renoise=fresh the roll-out is no function of its first noise: "
                    "choose renoise=same or ode, or one step, or regression_on=data"
                ),
            )
        if self._starts_from_pairs and self._sees_data:
            yield "student_input", "is 'data', so that the noise of a pair is never seen: choose regression_on=data"
        if self.guidance_times is not None and self.guidance == 1.0:
            yield "warn:guidance_times", "has no effect with guidance=1.0, which is off"


def scaled(terms: Terms, share: float) -> Terms:
    """The same terms, each with `share` of its weight."""
    return Terms(terms.values, {name: weight * share for name, weight in terms.weights.items()}, terms.watch)


def normalised(
    difference: Tensor,
    sample: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    floor: float = 1e-5,
    add: float = 0.0,
    over: Literal["free", "all"] = "free",
) -> Tensor:
    """difference / mean|sample - teacher|, one mean per sample; 0 where a frame is given."""
    axes = tuple(range(1, sample.ndim))
    free = torch.ones_like(sample) if mask is None else mask.expand_as(sample)
    # Transfer1 writes w = sigma / mean|eps - eps_teacher| before a difference of scores -eps / sigma: the same gradient.
    count = (free if over == "free" else torch.ones_like(free)).sum(axes, keepdim=True).clamp(min=1)
    distance = ((sample - teacher).abs() * free).sum(axes, keepdim=True) / count
    return difference * free / (distance.clamp(min=floor) + add)


def surrogate(sample: Tensor, gradient: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """A loss whose gradient is `gradient` / N with reduction "half_mean", N the number of elements that count."""
    return reduced((sample - (sample - gradient).detach()) ** 2, mask, reduction)


def vsd(sample: Tensor, critic: Tensor, teacher: Tensor, mask: Tensor | None, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """The variational score distillation loss of `sample`, and the gradient it stands for."""
    with torch.no_grad():
        gradient = normalised(critic - teacher, sample, teacher, mask)
    return surrogate(sample, gradient, mask, reduction), gradient
