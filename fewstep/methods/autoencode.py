"""Autoencode: what makes the toy world's tokenizer. Pixels are to survive encoding, a little noise, and decoding.

loss = mean over pixels of w (|e| + 2 e^2), e = D(E(x) + noise) - x, and `prior` times the mean square of the latents. Weights
w = 1 + motion |x - mean over time of x| (greatest of the three colours): what moves is a small share of a picture, and all that
a world model is about. Noise of a fixed width with a pull of the latents to zero is a variational autoencoder whose posterior
has that width (Kingma and Welling 2014, arXiv:1312.6114), without the second head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng
from fewstep.methods.contract import Nets, Terms, Turn


@kind("autoencode", group="method")
@dataclass(frozen=True)
class Autoencode:
    noise: float = 0.1  # standard deviation of the noise on the latents while training
    prior: float = 1e-3  # weight of the latents' mean square
    motion: float = 8.0  # how much more a pixel counts that differs from its own mean over time

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        assert batch.x0 is not None
        tokenizer: Any = nets.student  # a tokenizer, which is more and less than a Denoiser
        pixels = batch.x0
        noise = self.noise * rng.normal_like(pixels.new_empty(tokenizer.latent_shape(pixels)))
        made, latents = tokenizer.reconstruct(pixels, noise)
        error = made - pixels
        weight = 1 + self.motion * (pixels - pixels.mean(2, keepdim=True)).abs().amax(1, keepdim=True)
        rebuilt = (weight * (error.abs() + 2 * error**2)).mean()
        yield Terms.of(
            rebuilt=rebuilt,
            prior=(latents.square().mean(), self.prior),
            watch={"psnr_db": psnr_db(error.detach()), "latent_std": latents.detach().std()},
        )

    def sampler(self, path: Path) -> None:
        return None  # its result is no student of anything

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("noise", "prior", "motion"):
            if getattr(self, name) < 0:
                yield name, f"must be 0 or more, not {getattr(self, name)}"


def psnr_db(error: Tensor) -> Tensor:
    """Peak signal to noise of pixels in -1..1, over the whole batch."""
    return 10 * torch.log10(4 / error.square().mean().clamp(min=1e-12))
