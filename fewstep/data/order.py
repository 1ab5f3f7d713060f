"""Which sample goes where: a function of (seed, position), so that the place in the data is one number and needs no saving
of workers, ranks or generators. Position p of a run is row p of an endless row of shuffled epochs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def samples_at(position: Tensor, num: int, seed: int) -> Tensor:
    """The sample number for each position; every sample comes exactly once in positions e num .. (e + 1) num - 1."""
    if num < 1:
        raise ValueError("the data set is empty")
    epochs = position // num
    out = torch.empty_like(position)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        out[inside] = _epoch(num, seed, int(epoch))[position[inside] % num]
    return out


@lru_cache(maxsize=2)
def _epoch(num: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num, generator=generator)
