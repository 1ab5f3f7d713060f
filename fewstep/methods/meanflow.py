"""MeanFlow: a student of average velocities, from a teacher or from data alone (Geng et al. 2025, arXiv:2505.13447).

    L = w |u(x_t, t, r) - (v - (t - r) du/dt) without a graph|^2      average_velocity.py

One call from noise is a sample; any number of calls is allowed, each a jump to the next time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, RectifiedFlow, Rng, StudentSampler
from fewstep.diffusion.derivative import Agreement
from fewstep.diffusion.sampling import student_times
from fewstep.methods.average_velocity import AverageVelocity
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.methods.first_frames import problems_of_shares, with_first_frames


@kind("meanflow", group="method")
@dataclass(frozen=True)
class MeanFlow:
    velocity: AverageVelocity = AverageVelocity()
    num_steps: int = 1  # jumps of the student's sampler; `generate --num-steps` may choose another number
    shift: float = 1.0  # of their times
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.velocity.source == "teacher" else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return self.velocity.needs

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        yield self.velocity(nets, with_first_frames(batch, self.first_frames, rng), rng)

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        return self.velocity.agreement(nets, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return map_sampler(self.num_steps, self.shift)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_shares(self.first_frames)
        if self.num_steps < 1:
            yield "num_steps", f"must be at least 1, not {self.num_steps}"


def map_sampler(num_steps: int, shift: float) -> StudentSampler:
    """Jumps between `num_steps` times and 0 on the rectified flow."""
    flow = RectifiedFlow()
    return StudentSampler(student_times(num_steps, flow, shift), flow, "map", shift=shift)
