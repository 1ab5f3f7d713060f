"""Autoencode: what makes the toy world's tokenizer. Pixels are to survive encoding, a little noise, and decoding.

loss = mean over pixels of w (|e| + 2 e^2), e = D(E(x) + noise) - x, and `whiten` times (|C - I|^2 + |m|^2) / channels, with m
and C the mean and covariance of the latents' channels over the clips and places of a batch (of a rank's own part of it).
Weights w = 1 + motion |x - mean over time of x| (greatest of the three colours): what moves is a small share of a picture, and
all that a world model is about.

Without the pull to unit covariance an encoder says the same few things in all of its channels: the noise makes repeating worth
while, and what the decoder does not read teaches the encoder nothing.

With `look` above 0 the teacher is a perceptual network (toyworld/perceptual.py) that receives x and x + e, and `look` times the
relative change of its activations is added: the mean over its layers of |a(x + e) - a(x)| / |a(x)|, absolute values summed over
the batch. A loss on pixels alone asks for the mean of the possible clips, which is a blur (Johnson et al. 2016,
arXiv:1603.08155).

With `fool` above 0 a critic (toyworld/clip_critic.py) learns to tell D(E(x) + noise) from x, with a hinge loss, on the clips of
the very same iteration. The gradient g of the terms above on the made pixels becomes

    g + fool |g| / |h| h,        h the gradient of -mean of the critic's logits

so that `fool` means the same whatever the critic's scale (Esser et al. 2021, arXiv:2012.09841, weigh alike, by the gradients on
the last layer). A blur that is the same in every clip is little error in each, and is the first thing a critic finds.
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
from fewstep.methods.gan import Gan

HINGE = Gan(form="hinge")


@kind("autoencode", group="method")
@dataclass(frozen=True)
class Autoencode:
    noise: float = 0.1  # standard deviation of the noise on the latents while training
    whiten: float = 0.02  # weight of the latents' departure from channels of unit spread that tell different things
    look: float = 0.0  # weight of what the teacher, an eye, sees otherwise
    fool: float = 0.0  # what the critic's gradient on pixels has of the length of all others'
    motion: float = 8.0  # how much more a pixel counts that differs from its own mean over time

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", *(("teacher",) if self.look else ()), *(("critic",) if self.fool else ()))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student", "critic") if self.fool else ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        assert batch.x0 is not None
        tokenizer: Any = nets.student  # a tokenizer, which is more and less than a Denoiser
        pixels = batch.x0
        noise = self.noise * rng.normal_like(pixels.new_empty(tokenizer.latent_shape(pixels)))
        made, latents = tokenizer.reconstruct(pixels, noise)
        error = made - pixels
        weight = 1 + self.motion * (pixels - pixels.mean(2, keepdim=True)).abs().amax(1, keepdim=True)
        rebuilt = (weight * (error.abs() + 2 * error**2)).mean()
        seen = {"look": (_seen_otherwise(nets.teacher, made, pixels), self.look)} if self.look else {}
        if self.fool:
            _also_fool(nets.critic, made, self.fool)
        yield Terms.of(
            rebuilt=rebuilt,
            **seen,
            whiten=(departure(latents), self.whiten),
            watch={"psnr_db": psnr_db(error.detach()), "latent_std": latents.detach().std()},
        )
        if self.fool:
            critic: Any = nets.critic
            real, fake = critic.judge(torch.cat([pixels, made.detach()])).chunk(2)
            watch = {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
            yield Terms.of(critic=HINGE.head_loss(fake, real), watch=watch)

    def sampler(self, path: Path) -> None:
        return None  # its result is no student of anything

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("noise", "whiten", "look", "fool", "motion"):
            if getattr(self, name) < 0:
                yield name, f"must be 0 or more, not {getattr(self, name)}"


def _seen_otherwise(eye: Any, made: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = eye.look(pixels)
    apart = [(a - b).abs().sum() / b.abs().sum() for a, b in zip(eye.look(made), wanted, strict=True)]
    return torch.stack(apart).mean()


def _also_fool(critic: Any, made: Tensor, share: float) -> None:
    """Adds the critic's part to whatever gradient comes back to the made pixels; the critic's own gradients are left alone."""
    pixels = made.detach().requires_grad_(True)
    (h,) = torch.autograd.grad(HINGE.student_loss(critic.judge(pixels)), pixels)

    def with_more(g: Tensor) -> Tensor:
        return g + share * (g.square().sum() / h.square().sum().clamp(min=1e-24)).sqrt() * h

    made.register_hook(with_more)  # pyright: ignore[reportUnknownMemberType]  # torch types its hooks loosely


def departure(latents: Tensor) -> Tensor:
    """How far the channels (dim 1) are from mean 0 and covariance I, a mean over them."""
    channels = latents.transpose(0, 1).flatten(1)
    mean = channels.mean(1, keepdim=True)
    covariance = (channels - mean) @ (channels - mean).T / channels.shape[1]
    unit = torch.eye(len(channels), dtype=latents.dtype, device=latents.device)
    return ((covariance - unit).square().sum() + mean.square().sum()) / len(channels)


def psnr_db(error: Tensor) -> Tensor:
    """Peak signal to noise of pixels in -1..1, over the whole batch."""
    return 10 * torch.log10(4 / error.square().mean().clamp(min=1e-12))
