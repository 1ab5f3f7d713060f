"""Consistency distillation of a causal teacher: a few-step causal student without pairs.

    L = || f(x_t, t | c) - f'(x_r, r | c) ||^2         c: the clean chunks of the clip before it, as in teacher forcing
    x_r = one step of the teacher's guided ODE from x_t, r the neighbour of t on a grid, a pair (t, r) for each chunk
    f' = the moving average of the student, without a graph; where r is 0, the end of the teacher's step

Song et al. 2023, arXiv:2303.01469, on the packed pass of causal_finetune; the initialisation of Self-Forcing of Causal-rCM
(arXiv:2606.25473). The teacher has to be causal: the ODE of a bidirectional teacher takes a chunk to an end that depends on
later chunks, which the student does not see, so that it would learn their mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, guided, on_path
from fewstep.diffusion.by_chunk import ByChunk, CausalDenoiser
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.rollout import Renoise
from fewstep.methods.consistency import Grid
from fewstep.methods.contract import ByChunks, Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.forcing import in_context, per_frame
from fewstep.methods.student import problems_of_times


@kind("causal_consistency", group="method")
@dataclass(frozen=True)
class CausalConsistency(ByChunks):
    t_list: tuple[float, ...] = (1.0, 0.9375, 0.8333333333333334, 0.625)  # of the student, in the path's time, without the 0
    grid: Grid = Grid()  # of the pairs (t, r); Causal-Forcing 48 steps
    guidance: float = 1.0  # w of the teacher; 1 is off. Causal-Forcing 3
    context_noise: float = 0.0  # noise level of the context, in training and in generation, in the path's time
    first_t_list: tuple[float, ...] | None = None  # times of the first chunk in generation; None: t_list
    reduction: Reduction = "mean"
    path: AnyPath | None = None  # None: the network's own
    renoise: Renoise = "fresh"
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames

    roles = ("student", "teacher")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.guidance != 1.0 else {"x0"})

    @property
    def causal_roles(self) -> Mapping[str, bool]:
        return {"student": True, "teacher": True}

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        assert batch.x0 is not None
        x0, network = batch.x0, cast(CausalDenoiser, nets.student)
        path, chunks = self.path or network.path, network.chunks(batch.x0.shape[2])
        student = on_path(network, path)
        t, r = (per_frame(time.to(x0.device), chunks) for time in self.grid.draw(rng, path, turn.step, (len(chunks),)))
        x_t = path.add_noise(x0, rng.normal_like(x0), t)
        cond = in_context(batch.cond, x0, self.context_noise, path, network.path, rng)
        negative = batch.negative
        if negative is not None:
            negative = replace(negative, context=cond.context, context_t=cond.context_t)
        with torch.no_grad():
            step = guided(on_path(nets.teacher, path), negative, self.guidance)(x_t, t, cond)
            x_r = path.add_noise(step.x0, step.eps, r)  # an Euler step in the noise-to-signal ratio: DDIM
            with nets.averaged():  # before the student's own call: its graph must not see other weights
                answer = student(x_r, r, cond)
            target = torch.where((r == 0)[:, None, :, None, None], step.x0, answer.x0)
        error = (student(x_t, t, cond).x0 - target) ** 2
        yield Terms.of(consistency=reduced(error, free_mask(batch.cond, error), self.reduction))

    def sampler(self, path: Path) -> StudentSampler:
        by_chunk = ByChunk(self.first_t_list, self.context_noise)
        return StudentSampler(self.t_list, self.path or path, self.renoise, by_chunk=by_chunk)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames)
        yield from ((f"grid.{key}", text) for key, text in self.grid.problems())
        yield from ByChunk(self.first_t_list, self.context_noise).problems()
