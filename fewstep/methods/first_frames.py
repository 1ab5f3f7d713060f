"""Conditioning on first frames: how many of each sample's first latent frames the networks receive during training.

Predict2.5 draws 0, 1 or 2 of them for each sample and generates the rest. The number is drawn anew at each step, so that a clip
is trained on with every number. Cosmos 1 receives them with noise of a random level, which is no input of it: frames that a
student generated itself are never quite clean, either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from fewstep.batch import Batch, Condition, first_frames
from fewstep.diffusion import EDM, Path, Rng
from fewstep.diffusion.precondition import with_noise
from fewstep.diffusion.times import LogNormal


def with_first_frames(
    batch: Batch, shares: tuple[float, ...], rng: Rng, noise: LogNormal | None = None, path: Path | None = None
) -> Batch:
    """The batch with first frames of x0 in its conditions: shares[k] of the samples get k of them; () changes nothing.

    noise: the level of noise on what the networks receive of them, which is drawn for each sample; None: they are clean. `path`
    is then the networks': the spread of its data decides the scale.
    """
    if not shares:
        return batch
    x0 = batch.x0
    assert x0 is not None
    edges = torch.tensor(shares, dtype=torch.float64, device=x0.device).cumsum(0)[:-1]
    num = (rng.uniform().to(x0.device)[:, None] >= edges).sum(1)
    mask = first_frames(num, x0.shape[2]).to(x0.dtype)
    noisy = None
    if noise is not None:
        spread_of_data = path.sigma_data if isinstance(path, EDM) else 1.0
        sigma = noise.draw(rng, EDM(t_max=math.inf)).to(x0.device)
        noisy = with_noise(x0, sigma, rng.normal_like(x0), spread_of_data)

    def conditioned(cond: Condition) -> Condition:
        return replace(cond, frames=x0, noisy_frames=noisy, frame_mask=mask)

    negative = None if batch.negative is None else conditioned(batch.negative)
    return replace(batch, cond=conditioned(batch.cond), negative=negative)


def problems_of_shares(shares: tuple[float, ...], noise: LogNormal | None = None) -> Iterable[tuple[str, str]]:
    if noise is not None and not shares:
        yield (
            "warn:frame_noise",
            "has no effect: no first frames are given; set first_frames, the shares of samples with 0, 1, ..",
        )
    if shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        yield "first_frames", f"are the shares of samples with 0, 1, .. first frames and must sum to 1, not {list(shares)}"
