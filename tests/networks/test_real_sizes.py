"""Every published network, built without weights: its number of parameters is the published one.

Where the number is from: the safetensors metadata of the published checkpoints as third parties quote it (exact numbers), or
the model card (rounded ones, met to the digits given).
"""

from typing import Any

import pytest
import torch

from fewstep.networks import experts, wan

EXACT = {
    "Wan 2.1 T2V 1.3B": (wan.T2V_1_3B, 1_418_996_800),
    "Wan 2.1 T2V 14B": (wan.T2V_14B, 14_288_491_584),
    "Wan 2.2 TI2V 5B": (wan.TI2V_5B, 4_999_787_712),
    "Wan 2.2 T2V A14B": (experts.A14B, 2 * 14_288_491_584),
    "Wan 2.2 I2V A14B": (experts.I2V_A14B, 2 * 14_288_901_184),
}
ROUNDED = {
    "Wan 2.1 I2V 14B": (wan.I2V_14B, 16.4),
    "Wan 2.1 FLF2V 14B": (wan.FLF2V_14B, 16.4),
}


def parameters(spec: Any) -> int:
    with torch.device("meta"):
        network = spec.build()
    assert {parameter.device.type for parameter in network.module.parameters()} == {"meta"}
    return sum(parameter.numel() for parameter in network.module.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    spec, published = EXACT[name]
    assert parameters(spec) == published


@pytest.mark.parametrize("name", ROUNDED)
def test_the_number_of_parameters_is_the_published_one_in_its_digits(name: str) -> None:
    spec, billions = ROUNDED[name]
    assert round(parameters(spec) / 1e9, 1) == billions
