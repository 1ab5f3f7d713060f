"""A flow map: one student for any number of steps, better with more (AnyFlow, Gu et al. 2026, arXiv:2605.13724).

    stage 1   average velocities along the teacher's ODE, from data               average_velocity.py
    stage 2   also DMD2's term on the student's own roll-out of a random number of jumps, from the weights of stage 1

In stage 2 a roll-out of N jumps is made in three: one to a random one of its times, that jump itself, and one to the end, all
with gradient, so that the student learns what N jumps would do at the cost of three. Every sample draws its own N and place:
with one for a batch, a few hundred iterations would see each N only a few dozen times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Denoiser, Path, Rng, StudentSampler, guided, on_path, times
from fewstep.diffusion.derivative import Agreement, Difference
from fewstep.diffusion.path import spread
from fewstep.diffusion.sampling import student_times
from fewstep.methods.average_velocity import FLOW, AverageVelocity, ending
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import Normalizer, surrogate
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.meanflow import map_sampler
from fewstep.methods.turns import Warmup, is_student_turn, problems_of_frequency

SHIFT = 5.0


@dataclass(frozen=True)
class OnPolicy:
    """Stage 2: distribution matching on the student's own jumps. Its guidance is that of the average velocities."""

    num_jumps: tuple[int, ...] = (2, 4, 8, 16, 50)  # N of a roll-out, each as likely; AnyFlow
    velocity_weight: float = 0.5  # of stage 1's term, which goes on
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    normalizer: Normalizer = Normalizer()
    reduction: Reduction = "half_mean"
    critic: Critic = Critic()
    student_update_freq: int = 2  # a student turn, then a critic turn

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_frequency(self.student_update_freq)
        if not self.num_jumps or min(self.num_jumps) < 1:
            yield "num_jumps", f"needs numbers of jumps from 1 up, not {list(self.num_jumps)}"


@kind("flow_map", group="method")
@dataclass(frozen=True)
class FlowMap:
    velocity: AverageVelocity = AverageVelocity(
        times=times.Shifted(shift=SHIFT), share_whole=0.25, derivative=Difference(step=5e-3)
    )
    on_policy: OnPolicy | None = None  # none: stage 1
    num_steps: int = 4  # jumps of the student's sampler; `generate --num-steps` may choose another number
    shift: float = SHIFT  # of their times
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames

    @property
    def roles(self) -> tuple[str, ...]:
        if self.on_policy is not None:
            return ("student", "teacher", "critic")
        return ("student", "teacher") if self.velocity.source == "teacher" else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return self.velocity.needs

    def turn(self, step: int) -> Turn:
        if self.on_policy is None or is_student_turn(step, self.on_policy.student_update_freq, Warmup()):
            return Turn("student", ("student",))
        return Turn("critic", ("critic",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        matching = self.on_policy
        if matching is None:
            yield self.velocity(nets, batch, rng)
        elif turn.name == "student":
            yield self.velocity(nets, batch, rng).scaled(matching.velocity_weight)
            yield self._matching_terms(matching, nets, batch, rng)
        else:
            with torch.no_grad():
                sample = self._sample(matching, nets, batch, rng)
            yield from matching.critic.losses(FLOW, nets, sample, batch, rng, matching.times)

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        return self.velocity.agreement(nets, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return map_sampler(self.num_steps, self.shift)

    def _matching_terms(self, matching: OnPolicy, nets: Nets, batch: Batch, rng: Rng) -> Terms:
        sample = self._sample(matching, nets, batch, rng)
        mask = free_mask(batch.cond, sample)
        teacher = guided(on_path(nets.teacher, FLOW), batch.negative, self.velocity.guidance)
        with torch.no_grad():
            t = matching.times.draw(rng, FLOW).to(sample.device)
            x_t = FLOW.add_noise(sample, rng.normal_like(sample), t)
            real, fake = (network(x_t, t, batch.cond).x0 for network in (teacher, on_path(nets.critic, FLOW)))
            gradient = matching.normalizer(fake - real, sample, real, mask)
        return Terms.of(
            watch={"vsd_gradient": gradient.abs().mean()}, vsd=surrogate(sample, gradient, mask, matching.reduction)
        )

    def _sample(self, matching: OnPolicy, nets: Nets, batch: Batch, rng: Rng) -> Tensor:
        """The end of a roll-out of N jumps, of which one is made alone and those before and after it as one each.

        Where the first or the last is made alone, nothing is before or after it: the network is called all the same, for a jump
        of no length, so that every process calls it as often.
        """
        assert batch.x0 is not None
        before, after = (time.to(batch.x0.device) for time in lone_jumps(matching.num_jumps, self.shift, rng))
        stops = (torch.ones_like(before), before, after, torch.zeros_like(after))
        x = rng.normal_like(batch.x0)
        for start, end in pairwise(stops):
            x = jump(on_path(nets.student, FLOW), x, start, end, batch)
        mask = free_mask(batch.cond, x)
        return x if mask is None else torch.where(mask.bool(), x, batch.x0)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_shares(self.first_frames)
        if self.num_steps < 1:
            yield "num_steps", f"must be at least 1, not {self.num_steps}"


def lone_jumps(num_jumps: Sequence[int], shift: float, rng: Rng) -> tuple[Tensor, Tensor]:
    """A random N of num_jumps for each row, and of its N jumps a random one: the times from which and to which it goes."""
    grids = [torch.tensor((*student_times(num, FLOW, shift), 0.0), dtype=torch.float64) for num in num_jumps]
    padded = torch.nn.utils.rnn.pad_sequence(grids, batch_first=True).to(rng.device)
    nums, choice = torch.tensor(num_jumps, device=rng.device), rng.integers(len(grids))
    place = (rng.uniform() * nums[choice]).long()
    return padded[choice, place], padded[choice, place + 1]


def jump(student: Denoiser, x: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
    """x_r = x_t - (t - r) u(x_t, t, r); t and r: of each row."""
    return x - spread(t - r, x).to(x.dtype) * ending(student, x, t, r, batch.cond)
