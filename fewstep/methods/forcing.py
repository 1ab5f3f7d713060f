"""What a causal student attends to in training: the clip itself at noise levels of its own, or a context beside it.

diffusion forcing   every chunk has its own noise level and attends to the noisy chunks before it   Chen et al. 2024,
                    arXiv:2407.01392
teacher forcing     a chunk attends to clean chunks of the data, as in generation to finished ones: one pass over
                    [context | noisy clip] under a block mask, equal to a pass for each chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import Path, Rng

Forcing = Literal["teacher", "diffusion"]


def per_frame(values: Tensor, chunks: Sequence[range]) -> Tensor:
    """(B, T) from one value for each chunk, (B, chunks)."""
    lengths = torch.tensor([len(chunk) for chunk in chunks], device=values.device)
    return values.repeat_interleave(lengths, 1)


def in_context(cond: Condition, x0: Tensor, noise: float, path: Path, own: Path, rng: Rng) -> Condition:
    """`cond` with the clip x0 as context, at noise level `noise` of `path`; `own` is the network's path."""
    t = torch.full((x0.shape[0],), noise, dtype=torch.float64, device=x0.device)
    a, s, _, _ = path.coefficients(t)
    own_t = own.time_of(s / a)
    eps = rng.normal_like(x0) if noise else torch.zeros_like(x0)
    context = own.add_noise(x0, eps, own_t)
    return replace(cond, context=context.to(x0), context_t=own_t)
