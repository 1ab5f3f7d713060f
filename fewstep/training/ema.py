"""The moving average of the student, in fp32, counted in student updates whatever other turns lie between.

constant  beta
power     beta_n = (1 - 1/(n + 1))^(gamma + 1), gamma from the relative width s: Karras et al. 2024, arXiv:2312.02696, eq. 123
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.parallel import local


@dataclass(frozen=True)
class Ema:
    profile: Literal["constant", "power", "none"] = "constant"
    beta: float = 0.999  # constant: share of the old average kept at each student update
    width: float = 0.1  # power: standard deviation of the average's weights, relative to the run so far. Predict2.5 0.1

    def problems(self) -> Iterable[tuple[str, str]]:
        if not 0 <= self.beta < 1:
            yield "beta", f"must be 0 up to but not 1, not {self.beta}"
        if not 0 < self.width < 0.289:
            yield "width", f"must be above 0 and below 0.289 (the width of a plain mean), not {self.width}"

    def beta_at(self, updates: int) -> float:
        """What is kept of the old average at student update number `updates`, the first being 0."""
        if self.profile == "power":
            return (1 - 1 / (updates + 1)) ** (gamma_of(self.width) + 1)
        # A constant beta forgets the start no faster than the run is long: (n + 1) / (n + 10), as in Karras' EDM ramp-up.
        return min(self.beta, (updates + 1) / (updates + 10)) if self.profile == "constant" else 0.0


def gamma_of(width: float) -> float:
    """gamma of the power function with relative width s: the largest root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2."""
    return float(np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2]).real.max())


@torch.no_grad()
def update(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], beta: float) -> None:
    """average <- beta average + (1 - beta) weights, in place; sharded tensors stay on their shards."""
    old = [local(average[name]) for name in weights]
    new = [local(weight) for weight in weights.values()]
    torch._foreach_lerp_(old, new, 1 - beta)
