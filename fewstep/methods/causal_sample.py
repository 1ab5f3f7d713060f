"""The sample of a causal student on which Self-Forcing and CausVid train it.

Self-Forcing (Huang et al. 2025, arXiv:2506.08009): the student generates the clip chunk after chunk, from its own finished
chunks in a cache, by the loop that generates with it. Each chunk stops at an exit step; only that call carries gradients, and
none pass through the cache, so that memory does not grow with the chunks before it.
CausVid (Yin et al. 2024, arXiv:2412.07772), `input=data`: one call on real data, each chunk noised to a level of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Denoiser, Path, Rng, StudentSampler, rollout
from fewstep.diffusion.by_chunk import ByChunk, CausalDenoiser, chunk_by_chunk
from fewstep.diffusion.rollout import start
from fewstep.errors import UserError
from fewstep.methods.contract import free_mask
from fewstep.methods.forcing import per_frame
from fewstep.methods.student import StudentSample


@dataclass(frozen=True)
class CausalSample(StudentSample):
    first_t_list: tuple[float, ...] | None = None  # times of the first chunk, which may take more steps; None: t_list
    context_noise: float = 0.0  # noise level at which finished chunks enter the cache, in the path's time
    exits: Literal["clip", "chunk"] = "clip"  # one random exit step for all chunks, or one for each; the same on all ranks
    start_gradient_frame: int = 0  # first latent frame whose chunk carries gradients
    num_frames: int | None = None  # longer roll-outs: latent frames to roll; a random window of the data's length is trained

    def draw(self, student: Denoiser, batch: Batch, rng: Rng, *, with_grad: bool, noise: Tensor | None = None) -> Tensor:
        assert batch.x0 is not None
        network = cast(CausalDenoiser, student)
        sample = (
            self._from_data(network, batch, rng, with_grad)
            if self.uses_data
            else self._from_noise(network, batch, rng, with_grad, noise)
        )
        mask = free_mask(batch.cond, sample)
        return sample if mask is None or not with_grad else torch.where(mask.bool(), sample, sample.detach())

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, path, self.renoise, by_chunk=self._by_chunk)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from (("first_t_list" if key == "first_times" else key, text) for key, text in self._by_chunk.problems())
        if self.start_gradient_frame < 0:
            yield "start_gradient_frame", f"is a latent frame, from 0 on, not {self.start_gradient_frame}"
        if self.uses_data and self.num_frames is not None:
            yield "num_frames", "rolls the student's own clips, and does not go with input=data"

    @property
    def _by_chunk(self) -> ByChunk:
        return ByChunk(self.first_t_list, self.context_noise)

    def _from_noise(self, student: CausalDenoiser, batch: Batch, rng: Rng, with_grad: bool, noise: Tensor | None) -> Tensor:
        assert batch.x0 is not None
        chunks, window = self._window(student, batch, rng)
        if noise is None:
            shape = (batch.x0.shape[1], window.stop, *batch.x0.shape[3:])
            noise = rng.normal(shape, batch.x0.dtype).to(batch.x0.device)
        draws = 1 if self.exits == "clip" else len(chunks)
        skips = [self.calls_left(rng, with_grad) for _ in range(draws)] * (len(chunks) // draws)

        def solve(number: int, frames: range, denoiser: Denoiser, own: Condition) -> Tensor:
            times = self._by_chunk.times(number, self.t_list)
            return rollout(
                denoiser,
                start(denoiser.path, noise[:, :, frames.start : frames.stop], times[0]),
                times,
                own,
                renoise=self.renoise,
                rng=rng,
                num_calls=max(1, len(times) - skips[number]),
                with_grad=with_grad and frames.start >= self.start_gradient_frame and frames.stop > window.start,
            ).x0

        parts = chunk_by_chunk(lambda frames: student, student, noise, batch.cond, solve, self._by_chunk, rng, chunks=chunks)
        return torch.cat(list(parts), 2)[:, :, window.start :]

    def _from_data(self, student: CausalDenoiser, batch: Batch, rng: Rng, with_grad: bool) -> Tensor:
        """The prediction for real data, each chunk noised to one of the student's times or left clean."""
        assert batch.x0 is not None
        chunks = student.chunks(batch.x0.shape[2])
        levels = torch.tensor([*self.t_list, 0.0], dtype=torch.float64, device=batch.x0.device)
        t = levels[per_frame(rng.integers(len(levels), (len(chunks),)).to(levels.device), chunks)]
        with torch.set_grad_enabled(with_grad):
            return student(student.path.add_noise(batch.x0, rng.normal_like(batch.x0), t), t, batch.cond).x0

    def _window(self, student: CausalDenoiser, batch: Batch, rng: Rng) -> tuple[tuple[range, ...], range]:
        """The chunks to roll, and the frames that are trained: all, or as many as the data has, from a random chunk of a
        longer clip on."""
        assert batch.x0 is not None
        frames = batch.x0.shape[2]
        if self.num_frames is None or self.num_frames == frames:
            return student.chunks(frames), range(frames)
        cond = batch.cond
        if cond.frame_mask is not None or cond.beside is not None or cond.control:
            raise UserError("student.num_frames: rolls beyond the data, so conditions must not have frames of their own")
        chunks = student.chunks(self.num_frames)
        ends = {chunk.stop for chunk in chunks}
        windows = [range(chunk.start, chunk.start + frames) for chunk in chunks if chunk.start + frames in ends]
        if not windows:
            raise UserError(f"student.num_frames={self.num_frames}: holds no {frames} latent frames that are whole chunks")
        window = windows[rng.shared.integer(len(windows))]
        return tuple(chunk for chunk in chunks if chunk.start < window.stop), window
