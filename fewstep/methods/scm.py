"""sCM: a consistency model in continuous time, distilled from a teacher or trained on data.

    F <- F + g,   g the normalised tangent of the consistency function along the ODE (tangent.py)

Lu & Song 2024, arXiv:2410.11081, sCD and sCT. The student answers x0 from any noise level; further steps noise that answer
again. The paper's learned weight of each noise level is not here: normalised tangents let every level count alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler
from fewstep.diffusion.derivative import Agreement
from fewstep.diffusion.rollout import Renoise
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.student import problems_of_times
from fewstep.methods.tangent import TangentTerm


@kind("scm", group="method")
@dataclass(frozen=True)
class SCM:
    consistency: TangentTerm = TangentTerm()
    t_list: tuple[float, ...] = (math.pi / 2,)  # at which the student is sampled, in TrigFlow's time; two steps: and 1.1
    renoise: Renoise = "fresh"
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.consistency.source == "teacher" else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.consistency.guidance != 1.0 else {"x0"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), step=step)

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        yield self.consistency(turn.step, nets, with_first_frames(batch, self.first_frames, rng), rng)

    def agreement(self, nets: Nets, batch: Batch, rng: Rng) -> Agreement:
        return self.consistency.agreement(nets, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.consistency.path, self.renoise)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames)
