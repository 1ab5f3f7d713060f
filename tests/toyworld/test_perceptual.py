"""The perceptual network: the feature network it was trained as, differentiable in the pixels, and clear about a wrong file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.toyworld import features
from fewstep.toyworld.perceptual import PerceptualSpec


def test_its_last_layer_is_the_feature_network_before_it_is_standardised() -> None:
    net, perceptual = features.shipped(), PerceptualSpec(str(features.SHIPPED)).build()
    clips = torch.randint(0, 256, (3, 17, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    last = perceptual.activations(clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)[-1].mean((2, 3, 4))
    torch.testing.assert_close(last, features.features(clips) * net.std + net.mean, rtol=0, atol=1e-5)


def test_what_it_sees_can_be_differentiated() -> None:
    perceptual = PerceptualSpec(str(features.SHIPPED)).build()
    perceptual.module.double().requires_grad_(False)
    pixels = torch.rand(1, 3, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    toward = torch.randn_like(pixels)
    pixels.requires_grad_(True)
    (slope,) = torch.autograd.grad(sum(layer.square().sum() for layer in perceptual.activations(pixels)), pixels)
    step = 1e-6
    ends = [
        sum(float(layer.square().sum()) for layer in perceptual.activations(pixels.detach() + s * toward))
        for s in (step, -step)
    ]
    assert abs((ends[0] - ends[1]) / (2 * step) - float((slope * toward).sum())) < 1e-6 * abs(float((slope * toward).sum()))


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_features --seed 1 --out .*none\.safetensors"):
        PerceptualSpec(str(tmp_path / "none.safetensors")).build()
    save_file({"convs.0.weight": torch.zeros(4, 9, 3, 3, 3), "convs.0.bias": torch.zeros(4)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors: 1 convolutions, where a perceptual network has 4"):
        PerceptualSpec(str(tmp_path / "one.safetensors")).build()
