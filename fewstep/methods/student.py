"""The student's own sample, on which distribution matching trains it, and how the student is sampled afterwards.

Backward simulation: a roll-out from pure noise, with gradient in its last call   Yin et al. 2024, arXiv:2405.14867, section 4.5
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.diffusion import Denoiser, Path, Rng, StudentSampler, rollout, times
from fewstep.diffusion.rollout import Renoise, start
from fewstep.methods.contract import free_mask


@dataclass(frozen=True)
class StudentSample:
    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)  # its times, without the final 0: shifted(4, 5)
    renoise: Renoise = "fresh"  # between two calls; "same" for Predict2.5
    exit_step: Literal["random", "last"] = "random"  # which of its calls is trained; the same on all ranks
    # Clips on which the critic is trained: "random", those of all exits together (Self-Forcing, FastGen); "last", finished ones
    critic_exit: Literal["random", "last"] = "random"
    input: Literal["rollout", "data"] = "rollout"  # data: one call on real data noised to one of t_list, as FastGen

    def draw(self, student: Denoiser, batch: Batch, rng: Rng, *, with_grad: bool, noise: Tensor | None = None) -> Tensor:
        """The student's x0 after some of its calls, of the shape of `batch.x0`; conditioning frames carry no gradient.

        `noise` replaces the fresh noise that a roll-out starts from. A student of one call always starts from noise.
        """
        assert batch.x0 is not None
        if self.uses_data:
            t = times.Listed(self.t_list).draw(rng, student.path).to(batch.x0.device)
            with torch.set_grad_enabled(with_grad):
                x_t = student.path.add_noise(batch.x0, rng.normal_like(batch.x0), t)
                sample = student(x_t, t, batch.cond).x0
        else:
            num_calls = len(self.t_list) - self.calls_left(rng, with_grad)
            noise = rng.normal_like(batch.x0) if noise is None else noise
            x = start(student.path, noise, self.t_list[0])
            sample = rollout(
                student,
                x,
                self.t_list,
                batch.cond,
                renoise=self.renoise,
                rng=rng,
                num_calls=num_calls,
                with_grad=with_grad,
            ).x0
        mask = free_mask(batch.cond, sample)
        return sample if mask is None or not with_grad else torch.where(mask.bool(), sample, sample.detach())

    def calls_left(self, rng: Rng, with_grad: bool) -> int:
        """How many of the last calls are not made; with_grad: in the student's turn."""
        exits = self.exit_step if with_grad or self.exit_step == "last" else self.critic_exit
        return 0 if exits == "last" else len(self.t_list) - 1 - rng.shared.integer(len(self.t_list))

    @property
    def uses_data(self) -> bool:
        """Whether the student's input is noised real data."""
        return self.input == "data" and len(self.t_list) > 1

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, path, self.renoise)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        if self.uses_data and self.exit_step == "last":
            yield "warn:exit_step", "has no effect with input=data, which trains a call at one of t_list, drawn at random"


def problems_of_times(t_list: Sequence[float]) -> Iterable[tuple[str, str]]:
    if not t_list or list(t_list) != sorted(set(t_list), reverse=True) or min(t_list) <= 0:
        yield "t_list", f"must descend and stay above 0 (the final 0 is left out), but is {list(t_list)}"
