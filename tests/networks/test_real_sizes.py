"""Every published network besides Cosmos, built without weights: its number of parameters is the published one.

The numbers are those of networks/families/published.py: from the safetensors metadata of the published checkpoints as third
parties quote it (exact numbers), or held here against the model card (rounded ones, met to the digits given).
"""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.config.types import kind_of
from fewstep.networks.families.published import CHECKPOINT, FAMILIES, PUBLISHED, Published

DOCS = Path(__file__).parents[2] / "docs/models.md"
HERE = {model.model: model for model in PUBLISHED if model.constant != "cosmos.models.MODELS"}
ROUNDED = {  # billions on the model card, or of the checkpoint of which it is a variant
    "Wan 2.1 I2V 14B": 16.4,
    "Wan 2.1 FLF2V 14B": 16.4,
    "CogVideoX 2B": 1.7,
    "CogVideoX 1.5 5B": 5.6,
    "CogVideoX 5B I2V": 5.6,
    "Flux.1-schnell": 11.9,
}


def parameters(spec: Any) -> int:
    with torch.device("meta"):
        network = spec.build()
    assert {parameter.device.type for parameter in network.module.parameters()} == {"meta"}
    return sum(parameter.numel() for parameter in network.module.parameters())


@pytest.mark.parametrize("name", HERE)
def test_the_number_of_parameters_is_that_of_the_table(name: str) -> None:
    model = HERE[name]
    assert parameters(model.spec()) == model.networks * model.parameters
    assert name not in ROUNDED or round(model.parameters / 1e9, 1) == ROUNDED[name]


def test_each_number_is_a_published_one() -> None:
    assert {name for name, model in HERE.items() if model.known_from != CHECKPOINT} == {*ROUNDED, "DiT-XL/2"}


def test_dit_xl_has_the_675_million_of_its_paper_and_an_embedding_in_each_block() -> None:
    """diffusers repeats the embedding of time and class in each of the 28 blocks; the paper counts it once."""
    with torch.device("meta"):
        module: Any = HERE["DiT-XL/2"].spec().build().module
    embedding = sum(parameter.numel() for parameter in module.transformer_blocks[0].norm1.emb.parameters())
    assert round((HERE["DiT-XL/2"].parameters - 27 * embedding) / 1e6) == 675


def test_the_families_are_the_kinds_there_are() -> None:
    ours = {name for name, spec in choices("network").items() if spec.__module__.startswith("fewstep.")}  # tests have kinds too
    assert set(FAMILIES) == ours
    assert [kind_of(model.spec()) for model in PUBLISHED] == [("network", model.network) for model in PUBLISHED]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.model)
def test_what_each_is_said_to_read_is_what_its_size_has_inputs_for(model: Published) -> None:
    spec: Any = model.spec()
    one = getattr(spec, "high", spec)
    has = {
        "text": model.network != "dit",
        "label": model.network == "dit",
        "frames": getattr(one, "frame_mask", False) or model.model == "Wan 2.2 TI2V 5B",  # the others were not taught to
        "fps": getattr(one, "use_fps", False),
        "control": bool(model.branch),
        "beside": getattr(one, "beside_channels", 0) or getattr(one, "has_picture", False),
        "image": getattr(one, "image_dim", None),
        "pooled": getattr(one, "pooled_dim", None),
        "size": model.network == "unet" and one.pooled_dim,
    }
    assert set(model.reads) == {name for name, there in has.items() if there}
    assert set(model.reads) <= {field.name for field in fields(Condition)}


def test_the_numbers_in_the_docs_are_those_of_the_table() -> None:
    numbers = {
        int(found.replace(",", "")) for found in re.findall(r"(?<![\d,])\d{1,3}(?:,\d{3}){2,3}(?![\d,])", DOCS.read_text())
    }
    ours = {model.parameters for model in PUBLISHED} | {model.branch for model in PUBLISHED}
    assert numbers - ours == {122_049_536}  # what a Transfer2.5 branch repeats of its base: test_cosmos_models.py
