"""The losses of the toy world's tokenizer: pixels must survive encoding, a little noise, and decoding.

loss = mean over pixels of w (|e| + 2 e^2), e = D(E(x) + noise) - x, and `whiten` times (|C - I|^2 + |m|^2) / channels, with m
and C the mean and covariance of the latents' channels over the clips and places of a batch (of a rank's own part of it).
Weights w = 1 + motion |x - mean over time of x| (greatest of the three colours): moving objects are few pixels of
a picture, and what a world model is about.

Without the pull to unit covariance an encoder repeats a few numbers in all of its channels: the noise rewards repetition,
and what the decoder does not read gives the encoder no gradient.

With `perceptual` above 0 a perceptual network (perceptual.py) receives x and x + e, and `perceptual` times the relative change
of its activations is added: the mean over its layers of |a(x + e) - a(x)| / |a(x)|, absolute values summed over the batch. A
loss on pixels alone asks for the mean of the possible clips, which is a blur (Johnson et al. 2016, arXiv:1603.08155).

With `adversarial` above 0 a critic (clip_critic.py) learns to tell D(E(x) + noise) from x, with a hinge loss, on the clips of
the same iteration. The gradient g of the terms above on the decoded pixels becomes

    g + adversarial |g| / |h| h,        h the gradient of -mean of the critic's logits

so that `adversarial` means the same whatever the critic's scale (Esser et al. 2021, arXiv:2012.09841, weigh alike, by the
gradients on the last layer). A blur that is the same in every clip is a small error in each of them, but easy for a
critic to detect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion import Rng
from fewstep.methods.contract import Terms
from fewstep.methods.gan import Gan
from fewstep.toyworld.clip_critic import ClipCritic
from fewstep.toyworld.perceptual import PerceptualNetwork
from fewstep.toyworld.tokenizer import Tokenizer

HINGE = Gan(form="hinge")


@dataclass(frozen=True)
class Networks:
    """The networks of the losses."""

    tokenizer: Tokenizer
    perceptual: PerceptualNetwork | None = None  # frozen
    critic: ClipCritic | None = None  # trained beside the tokenizer


@dataclass(frozen=True)
class Autoencode:
    noise: float = 0.1  # standard deviation of the noise on the latents while training
    whiten: float = 0.02  # weight of the latents' departure from channels of unit spread that tell different things
    perceptual: float = 0.0  # weight of the relative change of a perceptual network's activations
    adversarial: float = 0.0  # length of the critic's gradient on pixels, as a share of the length of all others'
    motion: float = 8.0  # how much more a pixel counts that differs from its own mean over time

    def losses(self, networks: Networks, pixels: Tensor, rng: Rng) -> Iterator[Terms]:
        """The tokenizer's terms on pixels (B 3 T H W in -1..1), then the critic's. Back-propagate each before the next."""
        tokenizer, perceptual, critic = networks.tokenizer, networks.perceptual, networks.critic
        noise = self.noise * rng.normal_like(pixels.new_empty(tokenizer.latent_shape(pixels)))
        output, latents = tokenizer.reconstruct(pixels, noise)
        error = output - pixels
        weight = 1 + self.motion * (pixels - pixels.mean(2, keepdim=True)).abs().amax(1, keepdim=True)
        rebuilt = (weight * (error.abs() + 2 * error**2)).mean()
        terms: dict[str, Tensor | tuple[Tensor, float]] = {"rebuilt": rebuilt}
        if self.perceptual:
            assert perceptual is not None
            terms["perceptual"] = (_change(perceptual, output, pixels), self.perceptual)
        terms["whiten"] = (departure(latents), self.whiten)
        if self.adversarial:
            assert critic is not None
            _add_adversarial(critic, output, self.adversarial)
        yield Terms.of(**terms, watch={"psnr_db": psnr_db(error.detach()), "latent_std": latents.detach().std()})
        if self.adversarial:
            assert critic is not None
            real, fake = critic.judge(torch.cat([pixels, output.detach()])).chunk(2)
            watch = {"logit_real": real.detach().mean(), "logit_fake": fake.detach().mean()}
            yield Terms.of(critic=HINGE.head_loss(fake, real), watch=watch)

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("noise", "whiten", "perceptual", "adversarial", "motion"):
            if getattr(self, name) < 0:
                yield name, f"must be 0 or more, not {getattr(self, name)}"


def _change(perceptual: PerceptualNetwork, output: Tensor, pixels: Tensor) -> Tensor:
    """The relative change of the activations, mean over layers."""
    with torch.no_grad():
        targets = perceptual.activations(pixels)
    layers = zip(perceptual.activations(output), targets, strict=True)
    return torch.stack([(layer - target).abs().sum() / target.abs().sum() for layer, target in layers]).mean()


def _add_adversarial(critic: ClipCritic, output: Tensor, share: float) -> None:
    """Adds the critic's part to the gradient that comes back to the decoded pixels; its own gradients stay as they are."""
    pixels = output.detach().requires_grad_(True)
    (h,) = torch.autograd.grad(HINGE.student_loss(critic.judge(pixels)), pixels)

    def add(g: Tensor) -> Tensor:
        return g + share * (g.square().sum() / h.square().sum().clamp(min=1e-24)).sqrt() * h

    output.register_hook(add)


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
