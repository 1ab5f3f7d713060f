"""Data that a network makes before training begins: samples of an exact mixture, and noise/answer pairs of any teacher.

They live here and not in data/, because they ask a network. Pairs on disk, in the folder layout of the seeds, are made by the
same sampler calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.diffusion import Rng, TeacherSampler
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
    sampler: TeacherSampler = TeacherSampler("heun", 64, shift=1.0)
    path_times: tuple[float, ...] = ()  # states to keep, in the time of the teacher's path; () keeps none

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"x0", "noise"} | ({"path", "path_times"} if self.path_times else set()))

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.sampler.num_steps < 2 * max(len(self.path_times), 1):
            num = self.sampler.num_steps
            yield "sampler.num_steps", f"is {num}: too few to keep {len(self.path_times)} states and solve between them"

    @torch.no_grad()
    def open(self) -> InMemory:
        teacher, parts = self.teacher.build(), list[Batch]()
        for rows in torch.arange(self.num).split(_CHUNK):
            noise = Rng(self.seed, 0, rows).normal(self.shape)
            solved = self.sampler.trajectory(teacher, noise, Condition(), at=self.path_times)
            states = (solved.states, solved.times.expand(len(rows), -1).contiguous()) if self.path_times else (None, None)
            parts.append(Batch(x0=solved.x0, noise=noise, path=states[0], path_times=states[1]))
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
