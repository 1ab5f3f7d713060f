"""Every published network, built without weights: its number of parameters is the published one.

Where the number is from: the safetensors metadata of the published checkpoints as third parties quote it (exact numbers), or
the model card (rounded ones, met to the digits given).
"""

from typing import Any

import pytest
import torch

from fewstep.networks import cogvideox, dit, experts, flux, qwen_image, unet, wan

EXACT = {
    "Wan 2.1 T2V 1.3B": (wan.T2V_1_3B, 1_418_996_800),
    "Wan 2.1 T2V 14B": (wan.T2V_14B, 14_288_491_584),
    "Wan 2.2 TI2V 5B": (wan.TI2V_5B, 4_999_787_712),
    "Wan 2.2 T2V A14B": (experts.A14B, 2 * 14_288_491_584),
    "Wan 2.2 I2V A14B": (experts.I2V_A14B, 2 * 14_288_901_184),
    "SDXL": (unet.SDXL, 2_567_463_684),
    "Stable Diffusion 1.5": (unet.SD_1_5, 859_520_964),
    "Stable Diffusion 2.1": (unet.SD_2_1, 865_910_724),
    "CogVideoX 5B": (cogvideox.COGVIDEOX_5B, 5_570_283_072),
    "Flux.1-dev": (flux.FLUX_DEV, 11_901_408_320),
    "Qwen-Image": (qwen_image.QWEN_IMAGE, 20_430_401_088),
}
ROUNDED = {
    "Wan 2.1 I2V 14B": (wan.I2V_14B, 16.4),
    "Wan 2.1 FLF2V 14B": (wan.FLF2V_14B, 16.4),
    "CogVideoX 2B": (cogvideox.COGVIDEOX_2B, 1.7),
    "CogVideoX 1.5 5B": (cogvideox.COGVIDEOX_1_5_5B, 5.6),
    "CogVideoX 5B I2V": (cogvideox.COGVIDEOX_5B_I2V, 5.6),
    "Flux.1-schnell": (flux.FLUX_SCHNELL, 11.9),
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


def test_dit_xl_has_the_675_million_of_its_paper_and_an_embedding_in_each_block() -> None:
    """diffusers repeats the embedding of time and class in each of the 28 blocks; the paper counts it once."""
    with torch.device("meta"):
        module: Any = dit.DIT_XL_2.build().module
    embedding = sum(parameter.numel() for parameter in module.transformer_blocks[0].norm1.emb.parameters())
    assert round((parameters(dit.DIT_XL_2) - 27 * embedding) / 1e6) == 675
