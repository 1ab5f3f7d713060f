"""Finetuning of a causal network on data: a many-step model that generates chunk after chunk.

    teacher forcing    a noisy chunk attends to the clean chunks of the clip before it, in one pass over [clean | noisy]
    diffusion forcing  every chunk has its own noise level and attends to the noisy chunks before it

The result is the causal teacher of causal_consistency, and a beginning for self_forcing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import alike, kind
from fewstep.diffusion import Path, Rng, TeacherSampler, on_path, times
from fewstep.diffusion.by_chunk import ByChunk, CausalDenoiser
from fewstep.diffusion.path import AnyPath
from fewstep.methods.contract import ByChunks, Nets, Reduction, Terms, Turn
from fewstep.methods.finetune import Finetune
from fewstep.methods.first_frames import with_first_frames
from fewstep.methods.forcing import Forcing, in_context, per_frame


@kind("causal_finetune", group="method")
@dataclass(frozen=True)
class CausalFinetune(ByChunks):
    forcing: Forcing = "teacher"
    context_noise: float = 0.0  # noise level of the context, in training and in generation, in the path's time
    recycle: float = 0.0  # share of samples whose context is the network's own guess of the clip instead (LongLive 2.0)
    space: Literal["velocity", "x0", "eps"] = "velocity"  # where the error is measured
    weighting: Literal["none", "edm", "min_snr"] = "none"  # as of finetune
    sigma_data: float = 1.0  # for the edm weighting
    min_snr_gamma: float = 5.0  # for min_snr
    reduction: Reduction = "mean"
    times: times.AnyTimes = times.Shifted(shift=1.0)  # one noise level for each chunk
    path: AnyPath | None = None  # None: the network's own
    drop_condition: float = 0.0  # share of samples trained on the negative condition, which makes guidance possible
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    frame_noise: times.LogNormal | None = None  # level of noise on given frames, in sigma; none: they are clean
    num_sample_steps: int | None = None  # of the resulting model's sampler, for each chunk; None: of its base, or as published

    roles = ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return self._finetune.needs

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng, self.frame_noise, self.path or nets.student.path)
        assert batch.x0 is not None
        x0, cond = batch.x0, self._finetune.condition(batch, rng)
        network = cast(CausalDenoiser, nets.student)
        student = network if self.path is None else on_path(network, self.path)
        chunks = network.chunks(x0.shape[2])
        t = per_frame(self.times.draw(rng, student.path, (len(chunks),)).to(x0.device), chunks)
        if self.forcing == "teacher":
            context = self._context(network, x0, cond, chunks, rng)
            cond = in_context(cond, context, self.context_noise, student.path, network.path, rng)
        yield self._finetune.terms(student, x0, t, cond, rng)

    def sampler(self, path: Path) -> TeacherSampler:
        return replace(self._finetune.sampler(path), by_chunk=ByChunk(context_noise=self.context_noise))

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self._finetune.problems()
        yield from ByChunk(context_noise=self.context_noise).problems()
        if not 0 <= self.recycle <= 1:
            yield "recycle", f"is a share of samples, 0 to 1, not {self.recycle}"
        if self.forcing == "diffusion" and (self.recycle or self.context_noise):
            yield "forcing", "is 'diffusion', without a context beside the clip: recycle and context_noise need forcing=teacher"

    @property
    def _finetune(self) -> Finetune:
        """The loss, which is that of whole clips."""
        return alike(Finetune, self)

    def _context(self, network: CausalDenoiser, x0: Tensor, cond: Condition, chunks: tuple[range, ...], rng: Rng) -> Tensor:
        """The clip; for a share of samples as the network makes it out of noise in one call, so that it learns to go on from
        its own mistakes."""
        if not self.recycle:
            return x0
        t = per_frame(self.times.draw(rng, network.path, (len(chunks),)).to(x0.device), chunks)
        with torch.no_grad():
            guess = network(network.path.add_noise(x0, rng.normal_like(x0), t), t, replace(cond, context=x0)).x0
        own = (rng.uniform() < self.recycle).to(x0.device)
        return torch.where(own[:, None, None, None, None], guess.to(x0), x0)
