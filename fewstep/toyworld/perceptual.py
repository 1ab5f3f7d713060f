"""The perceptual network of the tokenizer's training: its activations on decoded clips should match those on real ones.

A stack of 3D convolutions over colours and their first and second differences in time, as `python -m
fewstep.toyworld.train_features --seed 1 --out FILE` writes it. The network that scores must be another one, or the score would
measure what was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.text import fault_of

STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))  # t, h, w, of the feature network of the toy world
DIFFERENCES = 3.0  # times those of neighbouring frames, which are a third of the colours' own deviation
VIEWS = 9  # channels of in_time


def in_time(pixels: Tensor) -> Tensor:
    """Colours (B 3 T H W in -1..1) with their first and second differences in time: B 9 T H W."""
    colours = pixels / 2
    first = functional.pad(colours.diff(dim=2), (0, 0, 0, 0, 1, 0))
    second = functional.pad(colours.diff(n=2, dim=2), (0, 0, 0, 0, 1, 1))
    return torch.cat([colours, DIFFERENCES * first, DIFFERENCES * second], 1)


class _Convolutions(nn.Module):
    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv3d(weight.shape[1], weight.shape[0], 3, stride, padding=1)
            for weight, stride in zip(weights, STRIDES, strict=True)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = in_time(pixels)
        activations: list[Tensor] = []
        for conv in self.convs:
            x = functional.silu(conv(x))
            activations.append(x)
        return activations


@dataclass(frozen=True)
class PerceptualNetwork:
    module: nn.Module

    def activations(self, pixels: Tensor) -> list[Tensor]:
        """The activations of each layer on pixels (B 3 T H W in -1..1)."""
        return self.module(pixels)


@dataclass(frozen=True)
class PerceptualSpec:
    """The feature network of a file that train_features wrote."""

    weights: str

    def build(self) -> PerceptualNetwork:
        if not Path(self.weights).is_file():
            raise UserError(
                f"no perceptual network at {self.weights}. Train it with: python -m fewstep.toyworld.train_features --seed 1 "
                f"--out {self.weights}"
            )
        whole, _ = read_safetensors(self.weights, "Train it again")
        tensors: dict[str, Any] = {name: tensor.float() for name, tensor in whole.items() if name.startswith("convs.")}
        if len(tensors) != 2 * len(STRIDES):
            raise UserError(f"{self.weights}: {len(tensors) // 2} convolutions, where a perceptual network has {len(STRIDES)}")
        with fault_of(self.weights, "Train it again"):
            module = _Convolutions([tensors[f"convs.{i}.weight"] for i in range(len(STRIDES))])
            module.load_state_dict(tensors)
        return PerceptualNetwork(module)
