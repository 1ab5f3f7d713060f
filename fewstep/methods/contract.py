"""The contract between an algorithm and the training loop.

A method is a frozen dataclass whose fields are its hyper-parameters. It decides which roles a turn trains and yields the loss
terms of that turn; the loop does the rest: gradients, clipping, steps, EMA, ranks, devices. A method holds no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Denoiser, Path, Rng, Sampler

Reduction = Literal["mean", "half_mean", "sum", "mean_all", "half_mean_all"]


@dataclass(frozen=True)
class Turn:
    """One iteration's part of the algorithm."""

    name: str
    trains: tuple[str, ...]  # roles whose weights this turn changes
    phase: int = 0  # of methods that train in phases, counted from 1; 0: the method has none
    step: int = 0  # number of this turn, from 0, of methods whose loss changes during training

    @property
    def label(self) -> str:
        """The name for logs and messages, with the phase if there is one."""
        return f"{self.name}, phase {self.phase}" if self.phase else self.name


@dataclass(frozen=True)
class Terms:
    """Named loss terms, each with its weight; the loop logs each and back-propagates the weighted sum."""

    values: Mapping[str, Tensor]
    weights: Mapping[str, float]
    watch: Mapping[str, Tensor]  # logged only

    @classmethod
    def of(cls, *, watch: Mapping[str, Tensor] | None = None, **terms: Tensor | tuple[Tensor, float]) -> Terms:
        """Terms.of(kd=loss) or Terms.of(vsd=loss, gan=(loss, 1e-3)): a term alone has weight 1."""
        pairs = {name: term if isinstance(term, tuple) else (term, 1.0) for name, term in terms.items()}
        return cls(
            {name: value for name, (value, _) in pairs.items()},
            {name: weight for name, (_, weight) in pairs.items()},
            watch or {},
        )

    def scaled(self, share: float) -> Terms:
        """The same terms, each with `share` of its weight."""
        return Terms(self.values, {name: weight * share for name, weight in self.weights.items()}, self.watch)

    @property
    def total(self) -> Tensor:
        weighted = [value * self.weights[name] for name, value in self.values.items()]
        return torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]


class Head(Protocol):
    """A discriminator on the outputs of some of a network's blocks."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Numbers of those blocks."""
        ...

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """(B, number of logits) from one feature for each tap; a logit above 0 means real."""
        ...


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Nets:
    """The networks of a method by role. Only the roles that the method lists are there."""

    roles: Mapping[str, Any]  # Any: a Denoiser each, but for the head
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext  # within, the student has its moving average as weights
    summed: Callable[[Tensor], Tensor] = _alone  # each value's sum over the processes, which all call it as often

    @property
    def head(self) -> Head:
        return cast(Head, self._of("head"))

    def __getattr__(self, role: str) -> Denoiser:
        return self._of(role)

    def _of(self, role: str) -> Any:
        try:
            return self.__dict__["roles"][role]
        except KeyError:
            raise AttributeError(f"no role '{role}' here; a method lists the roles it uses in `roles`") from None


class Method(Protocol):
    @property
    def roles(self) -> tuple[str, ...]:
        """Of "student", "teacher", "critic", "head": a class attribute, or a property where they depend on the fields."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """Fields of Batch that the data set must have; checked before any weight is read."""
        ...

    def turn(self, step: int) -> Turn: ...

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        """Yields the terms of one turn. The loop back-propagates each before it requests the next, so that two large graphs
        never exist at the same time."""
        ...

    def sampler(self, path: Path) -> Sampler:
        """How the student, a network on `path`, is sampled; saved with its weights."""
        ...


class ByChunks:
    """Inherited by methods whose student generates chunk after chunk, and has to be causal."""

    @property
    def causal_roles(self) -> Mapping[str, bool]:
        """For each role that this matters to, whether it has to be causal or must not be."""
        return {"student": True}


def free_mask(cond: Condition, like: Tensor) -> Tensor | None:
    """1 where a frame is generated, 0 where it is a conditioning frame, shaped to multiply `like`; None without such frames."""
    if cond.frame_mask is None:
        return None
    return (1 - cond.frame_mask.to(like.dtype))[:, None, :, None, None]


def reduced(error: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """One number from the element-wise `error`. Conditioning frames, where `mask` is 0, neither add to it nor count.

    mean       over all free elements of a sample, then over samples        (Predict2.5's critic)
    half_mean  half of that
    sum        over the free elements of a sample, then mean over samples   (rCM)
    mean_all, half_mean_all: conditioning frames add nothing, but are counted as zeros (as in Transfer1, FastGen and the
    student's term of Predict2.5); without such frames the same as mean and half_mean
    """
    axes = tuple(range(1, error.ndim))
    if reduction in ("mean_all", "half_mean_all"):
        whole = (error if mask is None else error * mask).mean()
        return whole * (0.5 if reduction == "half_mean_all" else 1.0)
    sums = (error if mask is None else error * mask).sum(axes)
    if reduction == "sum":
        return sums.mean()
    # A sample without free frames counts as 0 and must not divide by 0.
    count = math.prod(error.shape[1:]) if mask is None else mask.expand_as(error).sum(axes).clamp(min=1)
    mean = (sums / count).mean()
    return mean * 0.5 if reduction == "half_mean" else mean
