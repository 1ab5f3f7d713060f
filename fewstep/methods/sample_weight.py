"""A factor on each sample's gradient in DMD2: what f-distill and reward-weighted DMD are."""

from __future__ import annotations

from typing import Annotated, ClassVar, Protocol

from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import OneOf
from fewstep.diffusion import Path


class SampleWeight(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="sample_weight")."""

    needs_ratio: ClassVar[bool]  # whether it reads `logits`, of a head trained so that exp(logit) is a density ratio

    def __call__(self, sample: Tensor, cond: Condition, t: Tensor, path: Path, logits: Tensor | None) -> Tensor:
        """(B,) factors; called without gradient.

        `logits`, (B, number of logits), are the head's on the student's `sample` noised to `t`; None without a GAN.
        """
        ...


AnySampleWeight = Annotated[SampleWeight, OneOf("sample_weight")]
