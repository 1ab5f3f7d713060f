"""A network that tells real clips from those of a tokenizer: its logits, one for each place and time.

Convolutions over colours and their differences in time, as in the perceptual network, but with fresh weights that are trained
beside the tokenizer. Spectral norms (Miyato et al. 2018, arXiv:1802.05957) keep each layer's slope
at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from fewstep.toyworld.perceptual import VIEWS, in_time

STRIDES = ((1, 2, 2), (1, 1, 1), (2, 2, 2), (2, 1, 1))  # t, h, w
SLOPE = 0.2  # below 0


class _Patches(nn.Module):
    def __init__(self, channels: Sequence[int]):
        super().__init__()
        sizes = zip((VIEWS, *channels[:-1]), channels, STRIDES, strict=True)
        self.convs = nn.ModuleList(spectral_norm(nn.Conv3d(a, b, 3, stride, padding=1)) for a, b, stride in sizes)
        self.logit = spectral_norm(nn.Conv3d(channels[-1], 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = in_time(pixels)
        for conv in self.convs:
            x = functional.leaky_relu(conv(x), SLOPE)
        return self.logit(x)


@dataclass(frozen=True)
class ClipCritic:
    module: nn.Module

    def judge(self, pixels: Tensor) -> Tensor:
        """Logits (B 1 t h w) of pixels (B 3 T H W in -1..1), high where they look real."""
        return self.module(pixels)


@dataclass(frozen=True)
class ClipCriticSpec:
    """Tells a tokenizer's clips from real ones, trained beside it: convolutions in space and time."""

    channels: tuple[int, int, int, int] = (32, 64, 96, 96)

    def build(self) -> ClipCritic:
        return ClipCritic(_Patches(self.channels))
