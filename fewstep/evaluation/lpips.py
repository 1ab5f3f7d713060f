"""LPIPS (Zhang et al. 2018, arXiv 1801.03924, version 0.1): how different two clips look, by weights that the user has.

    fewstep evaluate CLIPS --truth OTHERS --scorer clips 'lpips=[vgg16-397923af.pth,vgg.pth]' ...

One file, `torch.save(lpips.LPIPS(net="vgg").state_dict(), FILE)`, or two: the network of torchvision (such as
`vgg16-397923af.pth`) and the linear layers of the package lpips (`weights/v0.1/alex.pth`, `vgg.pth`). Which network it is
follows from the weights. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluation.features.contract import device, evenly, hash_of, load, unset, weights
from fewstep.evaluation.score import Clip

FRAMES = 16  # of a clip that are compared
ADVICE = "Give the state dict of lpips.LPIPS, or two files: the network of torchvision and the linear layers of lpips"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of frames in -1..1


class Lpips(nn.Module):
    """The distance of two frames (B, 3, H, W) in -1..1 is `forward`; its layers have the names of torchvision."""

    def __init__(self, features: Sequence[nn.Module], ends: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.lins = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self._ends = tuple(ends)

    def forward(self, first: Tensor, other: Tensor) -> Tensor:
        """One number for each pair of frames."""
        total = torch.zeros(len(first), device=first.device)
        for lin, a, b in zip(self.lins, self._looks(first), self._looks(other), strict=True):
            total = total + lin((a - b).square()).mean(dim=(1, 2, 3))
        return total

    def _looks(self, frames: Tensor) -> list[Tensor]:
        """The features after each of five layers, each pixel a vector of length 1."""
        shift, scale = (torch.tensor(values, device=frames.device)[:, None, None] for values in (_SHIFT, _SCALE))
        x, out = (frames - shift) / scale, list[Tensor]()
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self._ends:
                out.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return out


def alexnet() -> Lpips:
    """The first layers of torchvision's AlexNet."""
    relu, pool = nn.ReLU, nn.MaxPool2d
    layers = [nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(3, 2), nn.Conv2d(64, 192, 5, padding=2), relu(), pool(3, 2)]
    layers += [nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), relu()]
    return Lpips(layers, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256))


def vgg16() -> Lpips:
    """The first layers of torchvision's VGG-16."""
    layers: list[nn.Module] = []
    ends, channels, widths = list[int](), 3, (64, 128, 256, 512, 512)
    for width, num in zip(widths, (2, 2, 3, 3, 3), strict=True):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(num):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        ends.append(len(layers) - 1)
    return Lpips(layers, ends, widths)


def distance(clip: Clip, truth: Clip, files: tuple[Path, ...]) -> float:
    """The mean LPIPS of the frames of two clips of one size and length."""
    network, _ = opened(files)
    places = evenly(FRAMES, len(clip))

    def frames(some: Clip) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(some)).to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.inference_mode():
        values = [network(frames(clip[[n]]), frames(truth[[n]])) for n in places]
    return float(torch.cat(values).mean())


@functools.cache
def opened(files: tuple[Path, ...]) -> tuple[Lpips, str]:
    """The network of these files and the hash of its weights. Raises UserError for files of anything else."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= {_plain(name): tensor for name, tensor in weights(file, ADVICE).items()}
    first = tensors.get("features.0.weight")
    if first is None or first.shape[-1] not in (3, 11):
        raise UserError(f"lpips: {', '.join(map(str, files))}: hold neither AlexNet nor VGG-16. {ADVICE}")
    network = unset(vgg16 if first.shape[-1] == 3 else alexnet)
    load(network, tensors, files[0], ADVICE)
    return network.to(device()), hash_of(network.state_dict(), "lpips 0.1")


def _plain(name: str) -> str:
    """`net.slice2.3.weight` is `features.3.weight`, `lin0.model.1.weight` is `lins.0.weight`; others stay."""
    name = re.sub(r"^net\.slice\d\.", "features.", name)
    return re.sub(r"^lin(?:s\.)?(\d)\.model\.\d\.", r"lins.\1.", name)
