"""Reward-weighted DMD: DMD2 in which samples of high reward have larger gradients.

    grad = exp((r(x) - baseline) / beta) w (x0_critic - x0_teacher)          Lu et al. 2025 (Reward Forcing), arXiv:2512.04678

The reward need not be differentiable: only its value is used. Where the student can represent the teacher's distribution,
critic and teacher agree at the end, and a factor on their difference changes the training but not its result. Where it cannot
- one call, a small network, few iterations - it covers a part of that distribution, and the weight decides which part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import OneOf, kind, preset
from fewstep.diffusion import Path
from fewstep.errors import UserError
from fewstep.methods.dmd2 import DMD2


class Reward(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="reward")."""

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        """(B,) numbers, higher is better; called without gradient."""
        ...


AnyReward = Annotated[Reward, OneOf("reward")]


@kind("motion", group="reward")
@dataclass(frozen=True)
class Motion:
    """Amount of motion: the mean absolute change of a clip's latents from frame to frame."""

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        if x0.ndim != 5 or x0.shape[2] < 2:
            raise UserError(f"reward 'motion' needs clips of two latent frames or more, B C T H W, not {tuple(x0.shape)}")
        return (x0[:, :, 1:] - x0[:, :, :-1]).abs().mean((1, 2, 3, 4))


@kind("toward", group="reward")
@dataclass(frozen=True)
class Toward:
    """Extent of a sample in a direction of its channels: the mean of direction . channels over its positions."""

    direction: tuple[float, ...] = (1.0,)

    def __call__(self, x0: Tensor, cond: Condition) -> Tensor:
        if x0.shape[1] != len(self.direction):
            raise UserError(f"reward.direction has {len(self.direction)} entries for data of {x0.shape[1]} channels")
        weights = torch.tensor(self.direction, dtype=x0.dtype, device=x0.device)
        return x0.flatten(2).mean(2) @ weights if x0.ndim > 2 else x0 @ weights


@kind("reward", group="sample_weight")
@dataclass(frozen=True)
class RewardWeight:
    reward: AnyReward = Motion()
    beta: float = 0.5  # in units of the reward: a sample better by beta counts e times as much
    baseline: float = 0.0  # reward whose weight is 1; near the mean reward of the teacher's samples
    max_weight: float = 10.0
    needs_ratio: ClassVar[bool] = False

    def __call__(self, sample: Tensor, cond: Condition, t: Tensor, path: Path, logits: Tensor | None) -> Tensor:
        reward = self.reward(sample, cond)
        return torch.exp((reward - self.baseline) / self.beta).clamp(max=self.max_weight)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.beta <= 0:
            yield "beta", f"must be above 0, not {self.beta}: to prefer low rewards, negate the reward"
        if self.max_weight <= 0:
            yield "max_weight", f"must be above 0, not {self.max_weight}"


@preset("reward_dmd", group="method")
def reward_dmd() -> DMD2:
    """Reward-weighted DMD: DMD2 in which samples of high reward have larger gradients."""
    return DMD2(sample_weight=RewardWeight())
