"""The tokenizer's losses by hand, their noise, whitening against numpy, and a decoder that leaves every latent as it was."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.diffusion import Rng
from fewstep.toyworld.autoencode import Autoencode, Networks, departure, psnr_db


class Off:
    """Makes pixels that are off by 0.5, from latents that are all 3: each channel has covariance 0 where 1 is asked."""

    def __init__(self) -> None:
        self.error = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)
        self.noise = torch.zeros(())

    def latent_shape(self, pixels):
        return (len(pixels), 50, 10, 5, 5)

    def reconstruct(self, pixels, noise=None):
        self.noise = noise
        return pixels + self.error, torch.full(self.latent_shape(pixels), 3.0, dtype=torch.float64)


def test_the_loss_is_that_of_the_formula() -> None:
    pixels = torch.zeros(2, 3, 4, 1, 1, dtype=torch.float64)
    pixels[:, 1, 0] = 1.0  # its mean over time is 1/4: it differs by 3/4 in one frame and by 1/4 in three
    net, method = Off(), Autoencode(noise=0.2, whiten=0.01, motion=8.0)
    (terms,) = method.losses(Networks(net), pixels, Rng(0, 0, torch.arange(2)))  # type: ignore[arg-type]
    weight = 1 + 8 * (0.75 + 3 * 0.25) / 4
    torch.testing.assert_close(terms.total.item(), weight * (0.5 + 2 * 0.25) + 0.01 * (1 + 9), atol=1e-12, rtol=0)
    terms.total.backward()
    torch.testing.assert_close(net.error.grad.item(), weight * (1 + 4 * 0.5), atol=1e-12, rtol=0)
    assert abs(net.noise.std().item() - 0.2) < 0.01  # of 25,000 numbers: known to 0.0009
    torch.testing.assert_close(terms.watch["psnr_db"].item(), 10 * math.log10(4 / 0.25), atol=1e-9, rtol=0)


class Perceptual:
    """Two layers: the pixels, and twice their mean over the colours."""

    def activations(self, pixels):
        return [pixels, 2 * pixels.mean(1, keepdim=True)]


def test_the_change_of_a_perceptual_network_is_added() -> None:
    pixels = torch.full((2, 3, 4, 1, 1), -0.5, dtype=torch.float64)
    pixels[:, 0] = 1.0  # mean over the colours 0: the second layer is told of the error alone
    pixels[0] = 1.0  # but in the first clip, where it is 2
    net, method = Off(), Autoencode(whiten=0.0, perceptual=0.3)
    nets = Networks(net, perceptual=Perceptual())  # type: ignore[arg-type]
    (terms,) = method.losses(nets, pixels, Rng(0, 0, torch.arange(2)))
    wanted = (0.5 / ((1 + 2 / 3) / 2) + 1.0 / (2 / 2)) / 2  # off by 0.5 of 5/6 on average, and by 1 of 1
    torch.testing.assert_close(terms.total.item(), 1 * (0.5 + 2 * 0.25) + 0.3 * wanted, atol=1e-12, rtol=0)


class Judges:
    """One logit a clip: `slope` times its mean."""

    def __init__(self, slope: float) -> None:
        self.slope = torch.full((), slope, dtype=torch.float64, requires_grad=True)

    def judge(self, pixels):
        return self.slope * pixels.mean((1, 2, 3, 4))


@pytest.mark.parametrize("slope", [1e-3, 40.0])
def test_a_critic_adds_its_part_to_the_gradient_on_pixels_whatever_its_scale(slope: float) -> None:
    """All pixels are 0.5 too high, so g is the same number everywhere; the critic says "higher", so h is its negative."""
    pixels = torch.zeros(2, 3, 4, 1, 1, dtype=torch.float64)
    net, critic, method = Off(), Judges(slope), Autoencode(whiten=0.0, adversarial=0.25)
    nets = Networks(net, critic=critic)  # type: ignore[arg-type]
    turns = method.losses(nets, pixels, Rng(0, 0, torch.arange(2)))
    first = next(turns)
    torch.testing.assert_close(first.total.item(), 0.5 + 2 * 0.25, atol=1e-12, rtol=0)  # as without a critic
    first.total.backward()
    torch.testing.assert_close(net.error.grad.item(), (1 + 4 * 0.5) * (1 - 0.25), atol=1e-12, rtol=0)
    assert critic.slope.grad is None  # it learns from its own loss alone
    (second,) = turns
    real, fake = 0.0, 0.5 * slope
    wanted = max(0.0, 1 + fake) + max(0.0, 1 - real)
    torch.testing.assert_close(second.total.item(), wanted, atol=1e-12, rtol=0)
    net.error.grad = None
    second.total.backward()
    torch.testing.assert_close(critic.slope.grad.item(), 0.5, atol=1e-12, rtol=0)  # of relu(1 + slope * 0.5)
    assert net.error.grad is None  # and teaches the tokenizer nothing
    assert (second.watch["logit_real"].item(), second.watch["logit_fake"].item()) == (real, pytest.approx(fake))


def test_whitening_asks_for_channels_that_tell_different_things() -> None:
    latents = torch.randn(3, 4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    channels = latents.numpy().swapaxes(0, 1).reshape(4, -1)
    apart = np.cov(channels, bias=True) - np.eye(4)
    expected = ((apart**2).sum() + (channels.mean(1) ** 2).sum()) / 4
    torch.testing.assert_close(departure(latents).item(), expected, atol=1e-12, rtol=0)


def test_psnr_is_of_the_whole_batch() -> None:
    torch.testing.assert_close(psnr_db(torch.tensor([0.2, 0.0])).item(), 10 * math.log10(4 / 0.02), atol=1e-5, rtol=0)


def test_negative_settings_are_refused() -> None:
    names = ["noise", "whiten", "perceptual", "adversarial", "motion"]
    assert [key for key, _ in Autoencode(**dict.fromkeys(names, -1.0)).problems()] == names


@pytest.mark.parametrize("trains", ["all", "decoder"])
def test_a_decoder_trained_alone_leaves_the_latents(trains: str, tmp_path: Path) -> None:
    from fewstep.toyworld.tokenizer import TokenizerSpec

    small = TokenizerSpec(channels=(8, 8, 8), latent_channels=4, resolution=16)
    torch.manual_seed(0)
    small.build().module.vae.save_pretrained(tmp_path)  # type: ignore[union-attr,operator]
    tokenizer = TokenizerSpec(pretrained=str(tmp_path), trains=trains).build()  # type: ignore[arg-type]
    tokenizer.module.requires_grad_(True)
    pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    _, before = tokenizer.reconstruct(pixels)
    trained = [p for p in tokenizer.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    method, first, last = Autoencode(), 0.0, 0.0
    for step in range(40):
        rng = Rng(0, step, torch.arange(2))
        (terms,) = method.losses(Networks(tokenizer), pixels, rng)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        first, last = first or terms.total.item(), terms.total.item()
    _, after = tokenizer.reconstruct(pixels)
    assert last < 0.5 * first
    assert torch.equal(before, after) == (trains == "decoder")
