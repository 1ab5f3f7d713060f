"""Conditioning on first frames: how many of each sample's first latent frames the networks receive clean during training.

Predict2.5 draws 0, 1 or 2 of them for each sample and generates the rest. The number is drawn anew at each step, so that a clip
is trained on with every number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fewstep.batch import Batch, Condition, first_frames
from fewstep.diffusion import Rng


def with_first_frames(batch: Batch, shares: tuple[float, ...], rng: Rng) -> Batch:
    """The batch with clean first frames of x0 in its conditions: shares[k] of the samples get k of them; () changes nothing."""
    if not shares:
        return batch
    x0 = batch.x0
    assert x0 is not None
    edges = torch.tensor(shares, dtype=torch.float64, device=x0.device).cumsum(0)[:-1]
    num = (rng.uniform().to(x0.device)[:, None] >= edges).sum(1)
    mask = first_frames(num, x0.shape[2]).to(x0.dtype)

    def conditioned(cond: Condition) -> Condition:
        return replace(cond, frames=x0, frame_mask=mask)

    negative = None if batch.negative is None else conditioned(batch.negative)
    return replace(batch, cond=conditioned(batch.cond), negative=negative)


def problems_of_shares(shares: tuple[float, ...]) -> Iterable[tuple[str, str]]:
    if shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        yield "first_frames", f"are the shares of samples with 0, 1, .. first frames and must sum to 1, not {list(shares)}"
