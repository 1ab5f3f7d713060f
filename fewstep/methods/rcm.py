"""rCM: a consistency model in continuous time, regularised by the score (Zheng et al. 2025, arXiv:2510.08431).

    student: tangent term on data (tangent.py)  +  DMD2's term on the student's own roll-out (dmd2.py)
    critic:  denoises the student's samples

The first term, a forward divergence, covers the modes of the data; the second, a reverse one, sharpens each sample. The
conventions of the published code: sums over a sample, 100 times the tangent term, fresh noise between two calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, TrigFlow, times
from fewstep.diffusion.derivative import Agreement
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.first_frames import with_first_frames
from fewstep.methods.student import StudentSample
from fewstep.methods.tangent import Tangent, TangentTerm

VIDEO = times.LogNormal(mean=0.7, std=1.6)


@kind("rcm", group="method")
@dataclass(frozen=True)
class RCM:
    consistency: TangentTerm = TangentTerm(
        times=VIDEO, tangent=Tangent(warmup_iters=1000, scales="state", norm="l2"), reduction="sum", weight=100.0
    )
    dmd: DMD2 = DMD2(
        student=StudentSample((math.pi / 2, 1.5, 1.4, 1.0)),
        path=TrigFlow(),
        times=VIDEO,
        critic=Critic(reduction="sum"),
        reduction="sum",
        student_update_freq=5,
    )

    @property
    def roles(self) -> tuple[str, ...]:
        return self.dmd.roles

    @property
    def needs(self) -> frozenset[str]:
        return self.dmd.needs | frozenset({"x0", "negative"} if self.consistency.guidance != 1.0 else {"x0"})

    def turn(self, step: int) -> Turn:
        """As DMD2; `step` counts student turns."""
        return replace(self.dmd.turn(step), step=step // self.dmd.student_update_freq)

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        if turn.name == "student":  # before the roll-out, so that two large graphs never exist at the same time
            yield self.consistency(turn.step, nets, with_first_frames(batch, self.dmd.first_frames, rng), rng)
        yield from self.dmd.losses(turn, nets, batch, rng)

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        return self.consistency.agreement(nets, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return self.dmd.sampler(path)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.dmd.guidance != self.consistency.guidance and self.consistency.source == "teacher":
            yield (
                "warn:consistency.guidance",
                f"is {self.consistency.guidance:g}, and dmd.guidance {self.dmd.guidance:g}: both should follow one teacher",
            )
