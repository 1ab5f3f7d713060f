"""Weights of eight or four bits: the nearest values of a grid, as codes with scales or as plain tensors.

    int8     w = s k, k in -128 .. 127;  s = max(max w / 127, -min w / 128), one for each row
    int4     w = s k, k in -8 .. 7;      s = max(max w / 7, -min w / 8), one for each 32 weights of a row that 32 divides
    float8   w = s e, e a float8_e4m3fn; s = max |w| / 448, one for each row

Rounding changes nothing that lies on the grid already, so the weights of a student that was trained on it can be written as
plain tensors and quantised again elsewhere. torchao's IntxWeightOnlyConfig with SYMMETRIC_NO_CLIPPING_ERR and its
Float8WeightOnlyConfig have these grids. Its Int8WeightOnlyConfig does not: s = max |w| / 127.5 changes the weights every time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Grid = Literal["int8", "int4", "float8"]
GROUP = 32
ENDS = {"int8": (-128, 127), "int4": (-8, 7), "float8": (-448, 448)}


def codes_of(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes (rows, groups, n) of one byte, and scales (rows, groups, 1) in fp32, of a weight (rows, columns)."""
    columns = weight.shape[1]
    size = GROUP if grid == "int4" and columns % GROUP == 0 else columns
    parts = weight.detach().float().unflatten(1, (-1, size))
    low, high = parts.aminmax(dim=-1, keepdim=True)
    least, most = ENDS[grid]
    scale = torch.maximum(high / most, low / least).clamp(min=torch.finfo(torch.float32).smallest_normal)  # of a row of zeros
    steps = parts / scale
    if grid == "float8":
        return steps.clamp(least, most).to(torch.float8_e4m3fn), scale
    return steps.round().clamp(least, most).to(torch.int8), scale


def dense(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (rows, columns) that codes and scales stand for."""
    return codes.to(dtype).mul_(scale).flatten(1)


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest weight of the grid, in fp32."""
    return dense(*codes_of(weight, grid))


def linear_weights(module: nn.Module) -> list[Tensor]:
    """What of `module` is rounded: the weights of its Linear layers, each once."""
    return list({id(layer.weight): layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)}.values())


@torch.no_grad()
def round_linear(module: nn.Module, grid: Grid) -> None:
    """Rounds the weights of all Linear layers of `module`, in place."""
    for weight in linear_weights(module):
        weight.copy_(on_grid(weight, grid))
