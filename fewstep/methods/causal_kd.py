"""CausalKD: KD for a causal student, each chunk of frames at a noise level of its own.

    L = || f(x_t, t) - x0_teacher ||^2     x_t[chunk] a state of the teacher's ODE at one of the student's times, or its end

The teacher's states come from a bidirectional teacher; the student computes them in one pass in which a chunk attends to no
later one. What a chunk attends to are the states of the chunks before it, at noise levels of their own (`context=noisy`: Yin et
al. 2024, arXiv:2412.07772, and FastGen), or the teacher's finished clip (`context=clean`: what it attends to in generation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, on_path
from fewstep.diffusion.by_chunk import ByChunk, CausalDenoiser
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.rollout import Renoise
from fewstep.diffusion.times import LogNormal
from fewstep.methods.contract import ByChunks, Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.forcing import in_context, per_frame
from fewstep.methods.kd import aligned
from fewstep.methods.student import problems_of_times


@kind("causal_kd", group="method")
@dataclass(frozen=True)
class CausalKD(ByChunks):
    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)  # of the student, in the path's time, without the 0
    context: Literal["noisy", "clean"] = "noisy"  # what a chunk attends to: FastGen's noisy states, or the finished clip
    context_noise: float = 0.0  # noise level of finished chunks in generation, and of a clean context in training
    first_t_list: tuple[float, ...] | None = None  # times of the first chunk in generation; None: t_list
    reduction: Reduction = "half_mean"  # FastGen
    path: AnyPath | None = None  # None: the network's own; all times here and `path_times` are in its time
    renoise: Renoise = "fresh"  # fresh noise on its x0 has the distribution of x_t; "ode" leaves the teacher's curve
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames
    frame_noise: LogNormal | None = None  # level of noise on given frames, in sigma; none: they are clean

    roles = ("student",)
    needs = frozenset({"x0", "path", "path_times"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng, self.frame_noise, self.path or nets.student.path)
        assert batch.x0 is not None
        network = cast(CausalDenoiser, nets.student)
        student = network if self.path is None else on_path(network, self.path)
        chunks = network.chunks(batch.x0.shape[2])
        x_t, t = self._states(batch, chunks, rng)
        cond = batch.cond
        if self.context == "clean":
            cond = in_context(cond, batch.x0, self.context_noise, student.path, network.path, rng)
        error = (student(x_t, t, cond).x0 - batch.x0) ** 2
        yield Terms.of(kd=reduced(error, free_mask(batch.cond, error), self.reduction))

    def sampler(self, path: Path) -> StudentSampler:
        by_chunk = ByChunk(self.first_t_list, self.context_noise)
        return StudentSampler(self.t_list, self.path or path, self.renoise, by_chunk=by_chunk)

    def times_on(self, path: Path) -> tuple[float, ...]:
        """The student's times, which are those of the stored states."""
        return self.t_list

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames, self.frame_noise)
        yield from ByChunk(self.first_t_list, self.context_noise).problems()

    def _states(self, batch: Batch, chunks: tuple[range, ...], rng: Rng) -> tuple[Tensor, Tensor]:
        """Of each chunk a state at a random one of the student's times, and those times, (B, T). A chunk that others attend
        to as it is may also be finished, at time 0."""
        assert batch.path is not None and batch.path_times is not None and batch.x0 is not None
        times = torch.tensor(self.t_list, dtype=torch.float64, device=batch.path.device)
        index = aligned(times, batch.path_times.double())  # B, steps
        num_choices = len(self.t_list) + (self.context == "noisy")
        step = per_frame(rng.integers(num_choices, (len(chunks),)).to(index.device), chunks)  # B, T
        places = torch.cat([index, torch.full_like(index[:, :1], batch.path.shape[1])], 1)
        states = torch.cat([batch.path, batch.x0[:, None].to(batch.path)], 1)
        row = torch.arange(len(step), device=index.device)[:, None]
        frame = torch.arange(step.shape[1], device=index.device)[None]
        x_t = states[row, places[row, step], :, frame].permute(0, 2, 1, 3, 4)
        return x_t, torch.cat([times, times.new_zeros(1)])[step]
