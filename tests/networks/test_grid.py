"""Grids of weights against their definition in float64, and against torchao where it is installed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.networks.grid import ENDS, Grid, codes_of, on_grid

GRIDS: tuple[Grid, ...] = ("int8", "int4", "float8")


def values_of(grid: Grid) -> Tensor:
    """Every value of a grid at scale 1."""
    if grid != "float8":
        return torch.arange(ENDS[grid][0], ENDS[grid][1] + 1, dtype=torch.float64)
    signs = [
        (-1.0) ** s * (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7)
        for s in (0, 1)
        for e in range(16)
        for m in range(8)
    ]
    return torch.tensor([v for v in signs if abs(v) <= 448], dtype=torch.float64).unique()  # 480 would be e = m = all ones: NaN


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest of all values, in float64; of a row or group of zeros, zeros."""
    size = 32 if grid == "int4" and weight.shape[1] % 32 == 0 else weight.shape[1]
    parts = weight.detach().double().reshape(len(weight), -1, size)
    values = values_of(grid)
    scale = torch.maximum(parts.amax(-1, keepdim=True) / values.max(), parts.amin(-1, keepdim=True) / values.min())
    steps = torch.where(scale > 0, parts / scale, 0)
    return (values[(steps[..., None] - values).abs().argmin(-1)] * scale).reshape(weight.shape)


def some_weight(columns: int) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(48, columns) * torch.logspace(-6, 3, 48)[:, None]
    weight[3] = 0
    weight[4, 1:] = 0
    return weight


@pytest.mark.parametrize("columns", [96, 33])
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_are_the_nearest_of_the_grid_and_stay_when_they_are_rounded_again(grid: Grid, columns: int) -> None:
    weight = some_weight(columns)
    once = on_grid(weight, grid)
    torch.testing.assert_close(once.double(), nearest(weight, grid), rtol=3e-7, atol=0)
    torch.testing.assert_close(on_grid(once, grid), once, rtol=3e-7, atol=0)
    assert codes_of(weight, grid)[0].element_size() == 1


@pytest.mark.filterwarnings("ignore")  # torchao's
@pytest.mark.parametrize("grid", GRIDS)
def test_torchao_quantises_to_the_same_weights(grid: Grid) -> None:
    """With its public configurations, from weights as trained and from weights that are on the grid already."""
    quantization: Any = pytest.importorskip("torchao.quantization")
    int4: Any = vars(torch)["int4"]  # torch's stubs do not know it
    exact = {"mapping_type": quantization.MappingType.SYMMETRIC_NO_CLIPPING_ERR}
    config = {
        "int8": lambda: quantization.IntxWeightOnlyConfig(torch.int8, quantization.PerAxis(0), **exact),
        "int4": lambda: quantization.IntxWeightOnlyConfig(int4, quantization.PerGroup(32), **exact),
        "float8": quantization.Float8WeightOnlyConfig,
    }[grid]()
    weight = some_weight(96)
    weight[3] = 1  # torchao's float8 makes NaN of a row of zeros
    for begin in (weight, on_grid(weight, grid)):
        layer = nn.Linear(96, 48, bias=False)
        layer.weight.data = begin.clone()
        quantization.quantize_(layer, config)
        assert torch.equal(layer.weight.dequantize(), on_grid(weight, grid))
