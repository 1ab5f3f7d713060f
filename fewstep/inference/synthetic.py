"""Data that a network makes before training begins: samples of an exact mixture, and noise/answer pairs of any teacher.

They live here and not in data/, because they ask a network. Pairs on disk, in the folder layouts of Cosmos and FastGen, are
made by the same sampler calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.contract import AnyNetwork, Network

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

    def open(self) -> SolvedPairs:
        return SolvedPairs(self, self.teacher.build())


class SolvedPairs:
    """Pairs of a teacher, in blocks that are solved when one of their samples is first read.

    A dry run reads one batch to learn its shapes, and so does the memory plan: they solve one block, not all.
    """

    def __init__(self, spec: TeacherPairs, teacher: Network):
        self.spec = spec
        self.teacher = teacher
        self.solved: set[int] = set()
        self.samples = Batch()  # all of them; those of blocks that are not solved hold anything
        self.lock = Lock()  # batches are read ahead by threads

    def __len__(self) -> int:
        return self.spec.num

    def batch(self, index: Tensor) -> Batch:
        with self.lock:
            for block in sorted({int(number) for number in index // _CHUNK} - self.solved):
                self._solve(block)
        return self.samples.rows(index)

    @torch.no_grad()
    def _solve(self, block: int) -> None:
        spec, start = self.spec, block * _CHUNK
        rows = torch.arange(start, min(start + _CHUNK, spec.num))
        noise = Rng(spec.seed, 0, rows).normal(spec.shape)
        pairs = spec.sampler.trajectory(self.teacher, noise, Condition(), at=spec.path_times)
        self.samples = Batch(
            x0=self._with(self.samples.x0, rows, pairs.x0),
            noise=self._with(self.samples.noise, rows, noise),
            path=self._with(self.samples.path, rows, pairs.states) if spec.path_times else None,
            path_times=self._with(self.samples.path_times, rows, pairs.times.expand(len(rows), -1))
            if spec.path_times
            else None,
        )
        self.solved.add(block)

    def _with(self, samples: Tensor | None, rows: Tensor, part: Tensor) -> Tensor:
        samples = part.new_empty(self.spec.num, *part.shape[1:]) if samples is None else samples
        samples[rows] = part
        return samples
