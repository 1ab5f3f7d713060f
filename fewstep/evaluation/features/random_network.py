"""A three-dimensional convolutional network with random weights: a witness that was trained on nothing.

Random convolutions with rectification keep much of what distinguishes clips, and nobody can have tuned them to a model. Frames
are scaled to 64 x 64; the input is RGB with its first and second differences in time. Weights come from numpy's Philox with
a fixed seed, so that they are the same on every machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fewstep.config import kind
from fewstep.evaluation.features.contract import Extractor, device, resized, unset

SIDE = 64
WIDTHS = (16, 32, 64)
_DIFFERENCES = 3.0  # differences of neighbouring frames are about a third of the colours' own deviation


@kind("random_network", group="features")
@dataclass(frozen=True)
class RandomNetwork(Extractor):
    """A convolutional network with random weights, trained on nothing."""

    seed: int = 20260

    label = "random convolutions"

    @property
    def fingerprint(self) -> str:
        return f"v1-{SIDE}px-seed{self.seed}"

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        net, rows = _network(self.seed), list[Tensor]()
        with torch.inference_mode():
            for clip in clips:
                frames = torch.from_numpy(resized(clip, SIDE, SIDE)).to(device())
                rows.append(net(_with_differences(frames.float() / 255 - 0.5)).cpu())
        return torch.stack(rows)[:, None].clone()


def _with_differences(rgb: Tensor) -> Tensor:
    """(1, 9, T, H, W): colours, and their first and second differences in time, 0 where there are none."""
    out = torch.zeros(*rgb.shape[:3], 9, device=rgb.device)
    out[..., :3] = rgb
    out[1:, ..., 3:6] = _DIFFERENCES * (rgb[1:] - rgb[:-1])
    if len(rgb) > 2:
        out[1:-1, ..., 6:] = _DIFFERENCES * (rgb[2:] - 2 * rgb[1:-1] + rgb[:-2])
    return out.permute(3, 0, 1, 2)[None]


class _Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.Generator(np.random.Philox(key=seed))
        strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
        self.convs = nn.ModuleList(
            nn.Conv3d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in zip((9, *WIDTHS), WIDTHS, strides)
        )
        for conv in self.convs:
            assert isinstance(conv, nn.Conv3d) and conv.bias is not None
            fan_in = conv.weight[0].numel()
            conv.weight.data = torch.from_numpy(rng.standard_normal(conv.weight.shape) * (2 / fan_in) ** 0.5).float()
            conv.bias.data = torch.from_numpy(0.1 * rng.standard_normal(conv.bias.shape)).float()

    def forward(self, x: Tensor) -> Tensor:
        """(d,): means over space and time of every layer, and the deviations over time of the spatial means."""
        parts: list[Tensor] = []
        for conv in self.convs:
            x = functional.relu(conv(x))
            over_space = x[0].mean(dim=(2, 3))
            parts += [over_space.mean(dim=1), over_space.std(dim=1, unbiased=False)]
        return torch.cat(parts[2:])


@functools.cache
def _network(seed: int) -> _Network:
    return unset(lambda: _Network(seed)).eval().requires_grad_(False).to(device())
