"""Finetune: denoising or flow matching on data, without a teacher. It trains teachers and post-trains them.

x_t = a x0 + s eps at a random time; the prediction is regressed in one of three spaces, with one of the published weightings.
Karras et al. 2022 (EDM, arXiv:2206.00364 eq. 8), Lipman et al. 2023 (flow matching, arXiv:2210.02747),
Hang et al. 2023 (min-SNR, arXiv:2303.09556), Esser et al. 2024 (arXiv:2403.03206).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fewstep.batch import Batch, Condition, choose
from fewstep.config import kind
from fewstep.diffusion import Denoiser, Path, Prediction, Rng, TeacherSampler, on_path, times
from fewstep.diffusion.path import AnyPath, spread
from fewstep.diffusion.precondition import edm_weight
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.first_frames import problems_of_shares, with_first_frames


@kind("finetune", group="method")
@dataclass(frozen=True)
class Finetune:
    space: Literal["velocity", "x0", "eps"] = "velocity"  # where the error is measured
    weighting: Literal["none", "edm", "min_snr"] = "none"  # edm: (s2 + sd2)/(s sd)2 on the x0 error, Predict1's loss
    sigma_data: float = 1.0  # for the edm weighting; Cosmos 1: 0.5
    min_snr_gamma: float = 5.0  # for min_snr
    reduction: Reduction = "mean"
    times: times.AnyTimes = times.Shifted(shift=1.0)
    path: AnyPath | None = None  # None: the network's own
    per_frame_times: bool = False  # one noise level per frame (diffusion forcing) instead of one per sample
    drop_condition: float = 0.0  # share of samples trained on the negative condition, which makes guidance possible
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames; Predict2.5 0 to 2
    frame_noise: times.LogNormal | None = None  # level of noise on given frames, in sigma; Predict1: mean -3, std 2
    num_sample_steps: int | None = None  # of the sampler of the resulting many-step model; None: of its base, or as published

    roles = ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.drop_condition else {"x0"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng, self.frame_noise, self.path or nets.student.path)
        assert batch.x0 is not None
        cond = self.condition(batch, rng)
        student = nets.student if self.path is None else on_path(nets.student, self.path)
        shape = (batch.x0.shape[2],) if self.per_frame_times else ()
        t = self.times.draw(rng, student.path, shape)
        yield self.terms(student, batch.x0, t, cond, rng)

    def terms(self, student: Denoiser, x0: Tensor, t: Tensor, cond: Condition, rng: Rng) -> Terms:
        """The loss of the student's prediction at x0 noised to t."""
        truth = Prediction.exact(x0, rng.normal_like(x0), t, student.path)
        answer = student(truth.x_t, t, cond)
        error = (answer.read(self.space) - truth.read(self.space)) ** 2
        if self.weighting != "none":
            error = error * self._weight(student.path, t, error)
        return Terms.of(denoising=reduced(error, free_mask(cond, error), self.reduction))

    def sampler(self, path: Path) -> TeacherSampler:
        """That of a many-step model: what is trained here is a teacher, or is post-trained as one.

        A run whose network comes from a pipeline takes the scheduler of that pipeline (training/run_folder.py).
        """
        return self.in_own_steps(TeacherSampler.for_path(path))

    def in_own_steps(self, sampler: TeacherSampler) -> TeacherSampler:
        """The sampler with `num_sample_steps`, if there are any."""
        return sampler if self.num_sample_steps is None else replace(sampler, num_steps=self.num_sample_steps)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weighting != "none" and self.space != "x0":
            yield "weighting", f"{self.weighting!r} weights the x0 error, but space is {self.space!r}: set space=x0"
        if not 0 <= self.drop_condition < 1:
            yield "drop_condition", f"is a share of samples, 0 up to but not 1, not {self.drop_condition}"
        yield from problems_of_shares(self.first_frames, self.frame_noise)

    def condition(self, batch: Batch, rng: Rng) -> Condition:
        """The batch's condition, for a share of samples the negative one."""
        if not self.drop_condition:
            return batch.cond
        assert batch.negative is not None
        drop = rng.uniform() < self.drop_condition
        return choose(drop, batch.negative, batch.cond)

    def _weight(self, path: Path, t: Tensor, like: Tensor) -> Tensor:
        a, s, _, _ = path.coefficients(t)
        if self.weighting == "edm":
            weight = edm_weight(s / a, self.sigma_data)
        else:
            weight = ((a / s) ** 2).clamp(max=self.min_snr_gamma)
        return spread(weight, like).to(like.dtype)
