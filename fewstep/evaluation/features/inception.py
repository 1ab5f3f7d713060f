"""Inception-v3 as FID uses it (Szegedy et al. 2016; Heusel et al. 2017): --features inception=FILE gives FID.

FILE holds the weights ported from TensorFlow, `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid or
`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity; torchvision's own are those of another training. Nothing is
downloaded, and a file that is a program (TorchScript) is refused. All frames of a clip are scaled to 299 x 299 (bilinear, no
antialiasing) and to -1..1, as pytorch-fid does; features are the 2048 of the last pooling. Frames of a clip depend on each
other: intervals are over clips. FID of fewer frames than its 2048 features is marked as undetermined.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fewstep.config import kind
from fewstep.evaluation.features.contract import Extractor, device, hash_of, load, unset, weights

ADVICE = "Give the weights that FID is defined by: pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
_CHUNK = 16  # frames at once


@kind("inception", group="features")
@dataclass(frozen=True)
class Inception(Extractor):
    """Inception-v3 on every frame, for FID; weights from a file: --features inception=FILE."""

    weights: Path = Path("pt_inception-2015-12-05-6726825d.pth")

    label = "Inception-v3"
    is_standardised = False
    frechet = "fid"
    blind_to = "order of frames"

    @property
    def fingerprint(self) -> str:
        return _network(self.weights)[1]

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        network, _ = _network(self.weights)
        rows: list[Tensor] = []
        with torch.inference_mode():
            for clip in clips:
                frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
                rows.append(torch.cat([network(scaled(some.to(device()))).cpu() for some in frames.split(_CHUNK)]))
        return torch.stack(rows).clone()


def scaled(frames: Tensor) -> Tensor:
    """Frames (B, 3, H, W) of 0..255 at 299 x 299 in -1..1."""
    return 2 * functional.interpolate(frames.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1


@functools.cache
def _network(path: Path) -> tuple[InceptionV3, str]:
    network = unset(InceptionV3)
    load(network, weights(path, ADVICE), path, ADVICE)
    fingerprint = hash_of(network.state_dict(), "299 bilinear")
    return network.to(device()), fingerprint


class _Conv(nn.Module):
    """A convolution without bias, batch normalisation and rectification; names as in torchvision."""

    def __init__(self, c_in: int, c_out: int, size: int | tuple[int, int], stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = ((height - 1) // 2, (width - 1) // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    """TensorFlow's mean over 3 x 3, which does not count the padding."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _through(x: Tensor, convs: Sequence[nn.Module]) -> Tensor:
    for conv in convs:
        x = conv(x)
    return x


class _A(nn.Module):
    def __init__(self, c_in: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(c_in, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(c_in, 48, 1), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(c_in, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(c_in, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = _through(x, (self.branch5x5_1, self.branch5x5_2))
        double = _through(x, (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean_pool(x))], dim=1)


class _B(nn.Module):
    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(c_in, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(c_in, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = _through(x, (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], dim=1)


class _C(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = _Conv(768, c, 1), _Conv(c, c, (1, 7)), _Conv(c, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(768, c, 1), _Conv(c, c, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(c, c, (1, 7)), _Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = _Conv(c, 192, (1, 7))
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = _through(x, (self.branch7x7_1, self.branch7x7_2, self.branch7x7_3))
        first, second, third = self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3
        double = _through(x, (first, second, third, self.branch7x7dbl_4, self.branch7x7dbl_5))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], dim=1)


class _D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(768, 192, 1), _Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(768, 192, 1), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = _through(x, (self.branch3x3_1, self.branch3x3_2))
        seven = _through(x, (self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4))
        return torch.cat([three, seven, functional.max_pool2d(x, 3, 2)], dim=1)


class _E(nn.Module):
    def __init__(self, c_in: int, has_max_pool: bool) -> None:
        super().__init__()
        self._has_max_pool = has_max_pool  # the last block of the weights ported from TensorFlow
        self.branch1x1 = _Conv(c_in, 320, 1)
        self.branch3x3_1 = _Conv(c_in, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(c_in, 448, 1), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = functional.max_pool2d(x, 3, 1, 1) if self._has_max_pool else _mean_pool(x)
        return torch.cat([*parts, self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """Frames (B, 3, 299, 299) in -1..1 to the 2048 features of the last pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, 2), _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _C(128), _C(160), _C(160), _C(192)
        self.Mixed_7a = _D()
        self.Mixed_7b, self.Mixed_7c = _E(1280, False), _E(2048, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = functional.max_pool2d(x, 3, 2)
        x = _through(x, (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c))
        x = _through(x, (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c))
        return x.mean(dim=(2, 3))
