"""The published models at full size, on the meta device: parameters counted, every name of the published tables mapped."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

from fewstep.diffusion import EDM
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.keys import generation_of, match, num_branches, original_names
from fewstep.networks.families.cosmos.models import MODELS, transfer1_7b, transfer2_5_2b
from fewstep.networks.families.cosmos.network import Cosmos, CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT2_5_2B
from fewstep.networks.families.published import PUBLISHED

TABLE = {model.model: model for model in PUBLISHED if model.constant == "cosmos.models.MODELS"}


@cache
def built(name: str) -> Cosmos:
    with torch.device("meta"):
        return MODELS[name].build()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def block_size(d: int, picture: bool = False) -> int:
    """One block by the sizes of cosmos.md 4.1: attention to itself and to 1024 channels of text, MLP of 4, AdaLN of 256."""
    itself = 4 * d * d + 2 * 128
    text = 2 * d * d + 2 * 1024 * d + 2 * 128 + (3 * d * d + 2 * 128 if picture else 0)
    return itself + text + 2 * d * 4 * d + 3 * (256 * d + 3 * d * 256)


def embed_size(d: int, channels: int, positions: bool) -> int:
    return 4 * channels * d + d * d + 3 * d * d + d + (d * (128 + 120 + 120) if positions else 0)


def transformer_size(d: int, layers: int, channels: int, positions: bool = False, projection: int = 0, picture: int = 0) -> int:
    last = 256 * d + 2 * d * 256 + d * 16 * 4
    outside = (
        embed_size(d, channels, positions)
        + last
        + (projection + 1) * 1024 * bool(projection)
        + (picture + 1) * d * bool(picture)
    )
    return outside + layers * block_size(d, bool(picture))


# (name, size from the dimensions, size on its model card). The card of Predict2.5 14B counts 900 numbers more than there are
# weights; those of Predict1 and Predict2 speak of 7, 14 and 2 billion.
SIZES = [
    ("predict1_7b", transformer_size(4096, 28, 18, positions=True), 7e9),
    ("predict1_14b", transformer_size(5120, 36, 18, positions=True), 14e9),
    ("predict1_7b_text2world", transformer_size(4096, 28, 17, positions=True), 7e9),
    ("predict1_14b_text2world", transformer_size(5120, 36, 17, positions=True), 14e9),
    ("predict2_2b", transformer_size(2048, 28, 18), 2e9),
    ("predict2_14b", transformer_size(5120, 36, 18), 14e9),
    ("predict2_2b_text2image", transformer_size(2048, 28, 17), 2e9),
    ("predict2_14b_text2image", transformer_size(5120, 36, 17), 14e9),
    ("predict2_5_2b", transformer_size(2048, 28, 18, projection=100352), 2_059_174_912),
    ("predict2_5_14b", transformer_size(5120, 36, 18, projection=100352), 14_368_048_004),
]


@pytest.mark.parametrize(("name", "from_dimensions", "published"), SIZES)
def test_the_transformers_have_the_published_size(name: str, from_dimensions: int, published: float) -> None:
    have = size(built(name).module)
    assert have == from_dimensions == TABLE[name].parameters
    assert abs(have - published) < (1000 if published > 14e9 or published % 1e9 else 0.04 * published)


def test_the_transfer_models_have_the_size_of_their_branches_besides() -> None:
    one = built("transfer1_7b")
    d = 4096
    mlp = sum((a + 1) * b for a, b in zip((d, 16, 16, 32, 32, 96, 96, 256), (16, 16, 32, 32, 96, 96, 256, d)))
    branch = embed_size(d, 18, True) + 4 * 129 * d + mlp + 3 * (block_size(d) + (d + 1) * d)
    assert size(one.base) == transformer_size(d, 28, 18, positions=True) == TABLE["transfer1_7b"].parameters
    assert size(one.module) - size(one.base) == branch == TABLE["transfer1_7b"].branch
    two = built("transfer2_5_2b")
    d = 2048
    repeated = embed_size(d, 18, False) + (100352 + 1) * 1024 + (1152 + 1) * d
    branch = 4 * 130 * d + 4 * (block_size(d, True) + (d + 1) * d) + (d + 1) * d
    assert size(two.base) == transformer_size(d, 28, 18, projection=100352, picture=1152) == TABLE["transfer2_5_2b"].parameters
    assert size(two.module) - size(two.base) == branch  # what a branch repeats of its base is the base's own
    assert size(two.module.branches["edge"]) == branch + repeated == TABLE["transfer2_5_2b"].branch


def test_the_table_has_every_model_and_each_is_counted() -> None:
    assert set(TABLE) == set(MODELS) == {name for name, *_ in SIZES} | {"transfer1_7b", "transfer2_5_2b"}


def published_names(name: str) -> set[str]:
    """The names in the original file, as the classes of the original code give them."""
    spec = MODELS[name]
    layers = range(spec.num_layers)
    if name.startswith(("predict1", "transfer1")):
        base = {*embed_names_1(), *(f"blocks.block{i}.{inside}" for i, inside in product(layers, block_names_1()))}
        base |= {f"final_layer.{part}.weight" for part in ("linear", "adaLN_modulation.1", "adaLN_modulation.2")}
        if not isinstance(spec, CosmosControlSpec):
            return {f"net.{inside}" for inside in base}
        branch = {*embed_names_1(), "x_embedder2.proj.1.weight"}
        branch |= {f"blocks.block{i}.{inside}" for i, inside in product(range(3), block_names_1())}
        branch |= {f"zero_blocks.block{i}.{kind}" for i, kind in product(range(3), ("weight", "bias"))}
        branch |= {f"input_hint_block.{i}.{kind}" for i, kind in product(range(0, 16, 2), ("weight", "bias"))}
        return {f"base_model.net.{inside}" for inside in base} | {f"net.{inside}" for inside in branch}
    names = {
        "x_embedder.proj.1.weight",
        "t_embedder.1.linear_1.weight",
        "t_embedder.1.linear_2.weight",
        "t_embedding_norm.weight",
    }
    names |= {f"final_layer.{part}.weight" for part in ("linear", "adaln_modulation.1", "adaln_modulation.2")}
    if spec.text_projection_from:
        names |= {"crossattn_proj.0.weight", "crossattn_proj.0.bias"}
    picture = bool(spec.image_context_dim)
    if picture:
        names |= {"img_context_proj.0.weight", "img_context_proj.0.bias"}
    names |= {f"blocks.{i}.{inside}" for i, inside in product(layers, block_names_2(picture))}
    if isinstance(spec, CosmosControlSpec):
        names.add("control_embedder.proj.1.weight")
        names |= {f"control_blocks.{i}.{inside}" for i, inside in product(range(4), block_names_2(picture))}
        names |= {f"control_blocks.{i}.after_proj.{kind}" for i, kind in product(range(4), ("weight", "bias"))}
        names |= {f"control_blocks.0.before_proj.{kind}" for kind in ("weight", "bias")}
    return {f"net.{inside}" for inside in names}


def embed_names_1() -> set[str]:
    times = {"t_embedder.1.linear_1.weight", "t_embedder.1.linear_2.weight", "affline_norm.weight"}
    return times | {"x_embedder.proj.1.weight"} | {f"extra_pos_embedder.pos_emb_{axis}" for axis in "thw"}


def block_names_1() -> set[str]:
    attention = ("to_q.0", "to_q.1", "to_k.0", "to_k.1", "to_v.0", "to_out.0")
    names = {f"blocks.{k}.block.attn.{inside}.weight" for k, inside in product((0, 1), attention)}
    names |= {f"blocks.2.block.layer{i}.weight" for i in (1, 2)}
    return names | {f"blocks.{k}.adaLN_modulation.{i}.weight" for k, i in product((0, 1, 2), (1, 2))}


def block_names_2(picture: bool) -> set[str]:
    attention = ("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm")
    names = {f"{kind}_attn.{inside}.weight" for kind, inside in product(("self", "cross"), attention)}
    if picture:
        names |= {f"cross_attn.{inside}.weight" for inside in ("q_img", "k_img", "v_img", "q_img_norm", "k_img_norm")}
    names |= {f"mlp.layer{i}.weight" for i in (1, 2)}
    return names | {f"adaln_modulation_{kind}.{i}.weight" for kind, i in product(("self_attn", "cross_attn", "mlp"), (1, 2))}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_of_the_original_file_is_one_of_ours_and_none_is_left(name: str) -> None:
    controls = ("edge",) if isinstance(MODELS[name], CosmosControlSpec) else ()
    ours = set(built(name).module.state_dict())
    theirs = published_names(name)
    beside = {"net.pos_embedder.seq", "net.blocks.0.self_attn.attn_op._extra_state", "net.accum_iteration", "logvar.0.freqs"}
    found = match(theirs | beside, controls)
    assert set(found.sources) == ours and set(found.sources.values()) == theirs
    assert set(found.unused) == beside and not found.unknown
    back = original_names(ours, "1" if "1_" in name else "2")
    assert set(back.values()) == theirs
    assert all(found.sources[mine] == name for mine, name in back.items())


def test_the_second_table_is_the_one_that_diffusers_publishes() -> None:
    """cosmos.md 4.3: replacements, one after the other, as the conversion script of diffusers makes them."""
    replacements = {
        "t_embedder.1": "time_embed.t_embedder",
        "t_embedding_norm": "time_embed.norm",
        "blocks": "transformer_blocks",
        "adaln_modulation_self_attn.1": "norm1.linear_1",
        "adaln_modulation_self_attn.2": "norm1.linear_2",
        "adaln_modulation_cross_attn.1": "norm2.linear_1",
        "adaln_modulation_cross_attn.2": "norm2.linear_2",
        "adaln_modulation_mlp.1": "norm3.linear_1",
        "adaln_modulation_mlp.2": "norm3.linear_2",
        "self_attn": "attn1",
        "cross_attn": "attn2",
        "q_proj": "to_q",
        "k_proj": "to_k",
        "v_proj": "to_v",
        "output_proj": "to_out.0",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
        "mlp.layer1": "ff.net.0.proj",
        "mlp.layer2": "ff.net.2",
        "x_embedder.proj.1": "patch_embed.proj",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    }
    for theirs in published_names("predict2_5_2b"):
        wanted = theirs.removeprefix("net.")
        for before, after in replacements.items():
            wanted = wanted.replace(before, after)
        found = match({theirs, "net.blocks.0.self_attn.q_proj.weight"})
        assert found.sources[wanted] == theirs


def test_what_no_table_knows_is_told_and_what_a_file_lacks_is_not_invented() -> None:
    theirs = {name.replace("blocks.3.mlp.layer1", "blocks.3.mlp.layer_1") for name in published_names("predict2_5_2b")}
    found = match(theirs)
    assert found.unknown == ("net.blocks.3.mlp.layer_1.weight",)
    assert "transformer_blocks.3.ff.net.0.proj.weight" not in found.sources
    with pytest.raises(ValueError, match=r"'something\.else' has no name in the original"):
        original_names(["something.else"], "2")


def test_names_that_are_ours_already_stay() -> None:
    ours = set(built("transfer2_5_2b").module.state_dict())
    found = match(ours, ("edge",))
    assert found.generation is None and found.sources == {name: name for name in ours}


def test_a_file_of_several_branches() -> None:
    controls = ("edge", "depth")
    with torch.device("meta"):
        ours = set(transfer2_5_2b(*controls).build().module.state_dict())
    theirs = set(original_names(ours, "2").values())
    assert {"net.control_embedder.1.proj.1.weight", "net.control_blocks_0.3.after_proj.bias"} <= theirs
    assert num_branches(theirs) == 2 and num_branches(published_names("transfer1_7b")) == 1
    assert num_branches(published_names("predict1_7b")) == 0
    assert set(match(theirs, controls).sources) == ours
    assert all(name.startswith("net.control_") for name in match(theirs, ("edge",)).unknown)  # of the second branch
    with torch.device("meta"):
        several = set(transfer1_7b(*controls).build().module.state_dict())
    with pytest.raises(ValueError, match="one control branch a file"):
        original_names(several, "1")


def test_the_generation_is_seen_in_the_names() -> None:
    assert [generation_of(published_names(name)) for name in ("predict1_7b", "transfer1_7b")] == ["1", "1"]
    assert [generation_of(published_names(name)) for name in ("predict2_2b", "transfer2_5_2b")] == ["2", "2"]
    assert generation_of(built("predict2_2b").module.state_dict()) is None
    assert generation_of(["0.weight"]) is None


def test_the_default_configuration_is_the_model_most_used() -> None:
    assert CosmosSpec(text_projection_from=100352) == PREDICT2_5_2B


@pytest.mark.parametrize(
    ("name", "g", "noise_levels"),
    [
        ("predict1_7b", 7, None),
        ("transfer1_7b", 5, [80]),
        ("predict2_5_2b", 7, [1, 15 / 16, 5 / 6, 5 / 8]),
        ("transfer2_5_2b", 3, [1, 15 / 16, 5 / 6, 5 / 8]),
    ],
)
def test_what_the_inference_commands_of_a_generation_take_by_default(name: str, g: int, noise_levels: list[float]) -> None:
    """Guidance in Cosmos' writing, and where the published students are asked: in sigma, or in flow time."""
    with torch.device("meta"):
        traits = replace(MODELS[name], num_layers=4, num_heads=2).build().traits
    assert traits.guidance == g + 1
    if noise_levels is None:
        assert traits.student is None
        return
    assert traits.student is not None
    a, s, _, _ = traits.student.path.coefficients(torch.tensor(traits.student.times, dtype=torch.float64))
    found = s if traits.student.path == EDM(sigma_data=0.5) else s / (a + s)
    torch.testing.assert_close(found, torch.tensor(noise_levels, dtype=torch.float64))
