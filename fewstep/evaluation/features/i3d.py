"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750) as FVD uses it (Unterthiner et al. 2019): --features i3d=FILE gives FVD.

FILE holds the weights trained on Kinetics-400 as PyTorch's state dict, `i3d_pretrained_400.pt` (VideoGPT, cd-fvd) or
`rgb_imagenet.pt` (pytorch-i3d). The TorchScript file of StyleGAN-V is a program and is refused. All frames of a clip, at least
10, are scaled to 224 x 224 (bilinear, whatever their shape: VideoGPT cuts a square first) and to -1..1; features are the 400
logits. Batch normalisation divides by sqrt(var + eps): eps is 1e-5 for VideoGPT's file and 1e-3 for that of pytorch-i3d (a name
that begins with rgb_), as in the code of each. Variants of FVD differ by a tenth: name the
weights beside a number, and compare at equal numbers of clips, frames and frames per second. FVD sees content more than motion.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fewstep.config import kind
from fewstep.evaluation.features.contract import Extractor, device, hash_of, load, unset, weights

ADVICE = "Give the weights of I3D as a state dict: i3d_pretrained_400.pt or rgb_imagenet.pt"
# Channels of each block: the 1 x 1 x 1 branch, the two of the first 3 x 3 x 3 branch, of the second, and of the pooled branch.
_BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64), "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64), "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


@kind("i3d", group="features")
@dataclass(frozen=True)
class I3D(Extractor):
    """I3D on whole clips, for FVD; weights from a file: --features i3d=FILE."""

    weights: Path = Path("i3d_pretrained_400.pt")

    label = "I3D (Kinetics-400)"
    is_standardised = False
    frechet = "fvd"
    least_frames = 10
    blind_to = "small changes of motion"

    @property
    def fingerprint(self) -> str:
        return _network(self.weights)[1]

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        network, _ = _network(self.weights)
        with torch.inference_mode():
            rows = [network(scaled(torch.from_numpy(np.ascontiguousarray(clip)).to(device()))).cpu() for clip in clips]
        return torch.stack(rows).clone()


def scaled(clip: Tensor) -> Tensor:
    """A clip T H W 3 of 0..255 as (1, 3, T, 224, 224) in -1..1."""
    frames = clip.permute(0, 3, 1, 2).float() / 255
    return 2 * functional.interpolate(frames, (224, 224), mode="bilinear", align_corners=False).transpose(0, 1)[None] - 1


@functools.cache
def _network(path: Path) -> tuple[Network, str]:
    network = unset(Network)
    load(network, weights(path, ADVICE), path, ADVICE)
    eps = 1e-3 if path.name.startswith("rgb_") else 1e-5
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = eps
    fingerprint = hash_of(network.state_dict(), "224 bilinear", eps)
    return network.to(device()), fingerprint


def _same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """`x` with the zeros of TensorFlow's "SAME", of which the larger half is at the end of each axis."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return functional.max_pool3d(_same(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    """A convolution, batch normalisation and rectification; names as in pytorch-i3d."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self._kernel, self._stride = (kernel, kernel, kernel), (stride, stride, stride)
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(c_out, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv3d(_same(x, self._kernel, self._stride))))


class _Mixed(nn.Module):
    def __init__(self, c_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(c_in, widths[0], 1)
        self.b1a, self.b1b = _Unit(c_in, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(c_in, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.b3b = _Unit(c_in, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], dim=1)


class _Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, 400, 1)


class Network(nn.Module):
    """Clips (1, 3, T, 224, 224) in -1..1 to the 400 logits (1, 400), averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = _Unit(64, 64, 1), _Unit(64, 192, 3)
        channels = 192
        for name, widths in _BLOCKS.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Logits()

    def forward(self, x: Tensor) -> Tensor:
        x = _max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = _max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _BLOCKS:
            if name == "Mixed_4b":
                x = _max_pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = _max_pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        return self.logits.conv3d(functional.avg_pool3d(x, (2, 7, 7), 1)).mean(dim=(2, 3, 4))
