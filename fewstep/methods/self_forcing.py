"""Self-Forcing: DMD2 on clips that a causal student generates chunk after chunk, from its own chunks.

    the loss is DMD2's, on the whole clip (dmd2.py)         Huang et al. 2025, arXiv:2506.08009
    the sample is the student's own roll-out (causal_sample.py), by the loop that generates with it

`causvid` is the same loss on noised real data (Yin et al. 2024, arXiv:2412.07772).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fewstep.batch import Batch
from fewstep.config import alike, kind, preset
from fewstep.diffusion import Path, Rng, StudentSampler, times
from fewstep.diffusion.path import AnyPath
from fewstep.methods.causal_sample import CausalSample
from fewstep.methods.contract import ByChunks, Nets, Reduction, Terms, Turn
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2, Normalizer, Regression
from fewstep.methods.gan import Gan
from fewstep.methods.sample_weight import AnySampleWeight
from fewstep.methods.turns import Warmup


@kind("self_forcing", group="method")
@dataclass(frozen=True)
class SelfForcing(ByChunks):
    student: CausalSample = CausalSample()
    score_teacher: Literal["bidirectional", "causal"] = "bidirectional"  # networks.teacher, and the critic that follows it
    path: AnyPath | None = None  # this and what follows: as of dmd2
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    frame_noise: times.LogNormal | None = None  # level of noise on given frames, in sigma; none: they are clean
    times: times.AnyTimes = times.Shifted(shift=5.0)  # noise at which the scores are compared
    guidance: float = 1.0  # w = 1 is off. FastGen and Self-Forcing 3 to 5 for Wan and Cosmos
    guidance_interval: tuple[float, float] | None = None  # guide only for times within, in the path's time
    guidance_times: times.AnyTimes | None = None  # decoupled DMD: the noise of the guidance part
    normalizer: Normalizer = Normalizer()
    sample_weight: AnySampleWeight | None = None  # factor on each sample's gradient; none: 1
    reduction: Reduction = "half_mean"  # of the student's term
    critic: Critic = Critic()
    gan: Gan | None = None  # none: no adversarial term, no head, no real data
    regression: Regression | None = None  # none: no term on the student's sample less x0
    student_update_freq: int = 5  # one student turn, then four critic turns
    warmup: Warmup = Warmup()

    @property
    def dmd2(self) -> DMD2:
        """The loss, with this method's sample."""
        return alike(DMD2, self)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.dmd2.roles

    @property
    def needs(self) -> frozenset[str]:
        return self.dmd2.needs

    @property
    def causal_roles(self) -> Mapping[str, bool]:
        scores = self.score_teacher == "causal"
        return {"student": True, "teacher": scores, "critic": scores}

    def turn(self, step: int) -> Turn:
        return self.dmd2.turn(step)

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        yield from self.dmd2.losses(turn, nets, batch, rng)

    def sampler(self, path: Path) -> StudentSampler:
        return self.dmd2.sampler(path)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self.dmd2.problems()
        if self.student.num_frames is not None and self.regression is not None:
            yield "regression", "compares with clips of the data, and does not go with student.num_frames"


@preset("causvid", group="method")
def causvid() -> SelfForcing:
    """CausVid: the distribution matching of a bidirectional teacher on noised real data, each chunk at its own level."""
    return SelfForcing(student=CausalSample(input="data"))
