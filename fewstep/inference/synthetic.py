"""Data that a network makes before training begins: samples of an exact mixture, and noise/answer pairs of any teacher.

They live here and not in data/, because they ask a network. Pairs on disk, in the folder layout of the seeds, are made by the
same sampler calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.diffusion import Rng, samplers, times
from fewstep.diffusion.rollout import start
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.contract import AnyNetwork

_CHUNK = 8192  # rows asked at once


@dataclass(frozen=True)
class InMemory:
    """A data set that is one batch."""

    samples: Batch

    def __len__(self) -> int:
        return self.samples.size()

    def batch(self, index: Tensor) -> Batch:
        return self.samples.rows(index)


@kind("mixture", group="data")
@dataclass(frozen=True)
class MixtureSamples:
    """Exact samples of a Gaussian mixture, with their classes where it has any."""

    mixture: MixtureSpec = MixtureSpec()
    num: int = 65536
    seed: int = 1

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.mixture.labels else {"x0"})

    def open(self) -> InMemory:
        mixture, rng = self.mixture.build(), Rng(self.seed, 0, torch.arange(self.num))
        if mixture.labels is None:
            return InMemory(Batch(x0=mixture.sample(rng)))
        classes = mixture.labels.unique()
        label = classes[rng.integers(len(classes))]
        none = Condition(label=torch.full_like(label, -1))
        return InMemory(Batch(x0=mixture.sample(rng, label), cond=Condition(label=label), negative=none))


@kind("teacher_pairs", group="data")
@dataclass(frozen=True)
class TeacherPairs:
    """Noise, the teacher's answer to it, and the states of its ODE at `path_times` on the way."""

    teacher: AnyNetwork
    shape: tuple[int, ...] = (2,)  # of one sample
    num: int = 16384
    seed: int = 1
    sampler: Literal["euler", "heun", "dpmpp_2m", "unipc", "res_2ab"] = "heun"
    num_calls: int = 64  # length of the solver's grid
    path_times: tuple[float, ...] = ()  # states to keep, in the time of the teacher's path; () keeps none

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"x0", "noise"} | ({"path", "path_times"} if self.path_times else set()))

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.num_calls < 2 * max(len(self.path_times), 1):
            yield "num_calls", f"is {self.num_calls}: too few to keep {len(self.path_times)} states and solve between them"

    @torch.no_grad()
    def open(self) -> InMemory:
        teacher = self.teacher.build()
        grid = times.on_flow(self.num_calls, teacher.path)
        solver, parts = getattr(samplers, self.sampler), []
        for rows in torch.arange(self.num).split(_CHUNK):
            noise = Rng(self.seed, 0, rows).normal(self.shape)
            x = start(teacher.path, noise, float(grid[0]))
            if not self.path_times:
                parts.append(Batch(x0=solver(teacher, x, grid, Condition()), noise=noise))
                continue
            at = torch.tensor(self.path_times, dtype=torch.float64)
            made = samplers.trajectory(solver, teacher, x, grid, Condition(), at)
            parts.append(
                Batch(x0=made.x0, noise=noise, path=made.states, path_times=made.times.expand(len(rows), -1).contiguous())
            )
        return InMemory(_concatenated(parts))


def _concatenated(parts: list[Batch]) -> Batch:
    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Batch(
        x0=cat([part.x0 for part in parts]),
        noise=cat([part.noise for part in parts]),
        path=cat([part.path for part in parts]),
        path_times=cat([part.path_times for part in parts]),
    )
