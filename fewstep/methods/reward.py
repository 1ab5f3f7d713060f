"""Reward-weighted DMD: DMD2 whose gradient counts more where the student's sample is liked.

    grad = exp((r(x) - baseline) / beta) w (x0_critic - x0_teacher)          Lu et al. 2025 (Reward Forcing), arXiv:2512.04678

The reward need not be differentiable: it is only read. Where the student can be all that the teacher is, critic and teacher
agree at the end and a factor on their difference changes nothing but the way there. Where it cannot be - one call, a small
network, few iterations - it chooses which part of the teacher's distribution it covers, and this weight chooses for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import OneOf, kind
from fewstep.diffusion import Path
from fewstep.errors import UserError
from fewstep.methods.dmd2 import DMD2


class Reward(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="reward")."""

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        """(B,) numbers, more is better; called without gradient."""
        ...


AnyReward = Annotated[Reward, OneOf("reward")]


@kind("motion", group="reward")
@dataclass(frozen=True)
class Motion:
    """How much a clip moves: the mean absolute change of its latents from frame to frame."""

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        if x0.ndim != 5 or x0.shape[2] < 2:
            raise UserError(f"reward 'motion' needs clips of two latent frames or more, B C T H W, not {tuple(x0.shape)}")
        return (x0[:, :, 1:] - x0[:, :, :-1]).abs().mean((1, 2, 3, 4))


@kind("toward", group="reward")
@dataclass(frozen=True)
class Toward:
    """How far the sample lies in a direction: the mean over its places of direction . channels."""

    direction: tuple[float, ...] = (1.0,)

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        if x0.shape[1] != len(self.direction):
            raise UserError(f"reward.direction has {len(self.direction)} entries for data of {x0.shape[1]} channels")
        weights = torch.tensor(self.direction, dtype=x0.dtype, device=x0.device)
        return x0.flatten(2).mean(2) @ weights if x0.ndim > 2 else x0 @ weights


@kind("reward_dmd", group="method")
@dataclass(frozen=True)
class RewardDMD(DMD2):
    reward: AnyReward = Motion()
    beta: float = 0.5  # in units of the reward: a sample better by beta counts e times as much
    baseline: float = 0.0  # reward whose weight is 1; near the mean reward of the teacher's samples
    max_weight: float = 10.0

    def _sample_weight(self, sample: Tensor, t: Tensor, path: Path, logits: Tensor | None, batch: Batch) -> Tensor | None:
        liked = self.reward(sample.detach(), batch.cond)
        return torch.exp((liked - self.baseline) / self.beta).clamp(max=self.max_weight)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.beta <= 0:
            yield "beta", f"must be above 0, not {self.beta}: to turn a reward round, give its negative"
        if self.max_weight <= 0:
            yield "max_weight", f"must be above 0, not {self.max_weight}"
