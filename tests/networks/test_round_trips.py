"""Every table of original names, through the commands: in and out again with equal bits, and nothing wrong gets through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.cli import main
from fewstep.networks.families.cosmos.control import SHARED, CosmosControlSpec
from fewstep.networks.families.cosmos.keys import Generation, odd_names, original_names
from fewstep.networks.families.cosmos.models import MODELS
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.weights.addresses import load_into, read

PREDICT2 = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8),
)  # fmt: skip
SIZES = {name: getattr(PREDICT2, name) for name in PREDICT2.__dataclass_fields__}
CONTROL = CosmosControlSpec(**SIZES, controls=("edge",), num_control_blocks=2, hint_channels=8)
FIRST: dict[str, Any] = {"family": "edm", "sigma_data": 0.5, "learnable_positions": True}
SPECS: dict[str, tuple[CosmosSpec, Generation]] = {
    "predict1": (replace(PREDICT2, **FIRST), "1"),
    "predict2": (PREDICT2, "2"),
    "predict2.5": (replace(PREDICT2, text_projection_from=12), "2"),
    "transfer1": (replace(CONTROL, **FIRST, style="transfer1"), "1"),
    "transfer2.5": (replace(CONTROL, text_projection_from=12, image_context_dim=6, image_context_tokens=3), "2"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def module(table: str, seed: int = 0) -> Any:
    """Random weights, none of them 0; what a Transfer2.5 branch repeats of its base is equal to it."""
    torch.manual_seed(seed)
    made: Any = SPECS[table][0].build().module
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    for own, again in SHARED.items() if table == "transfer2.5" else ():
        part = getattr(made.base, own, None)
        if part is not None:
            getattr(made.branches["edge"], again).load_state_dict(part.state_dict())
    return made


def original(table: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The table turned round: what the original code would have saved of these weights."""
    state = module(table).state_dict()
    return {theirs: state[ours].to(dtype) for ours, theirs in original_names(state, SPECS[table][1]).items()}


def save(table: str, file: dict[str, Tensor], folder: Path) -> Path:
    """As published: Transfer1's base and branch as two files, which the original command puts together."""
    if table != "transfer1":
        torch.save(file, folder / "model.pt")
        return folder / "model.pt"
    place = folder / "nvidia/Cosmos-Transfer1-7B"
    place.mkdir(parents=True, exist_ok=True)
    torch.save({n: t for n, t in file.items() if n.startswith("base_model.")}, place / "base_model.pt")
    torch.save({n: t for n, t in file.items() if not n.startswith("base_model.")}, place / "edge_control.pt")
    return place / "checkpoints_teacher/edge_control.pt"


def combine(table: str, folder: Path) -> int:
    return 0 if table != "transfer1" else main(["convert", "--ctrl_type", "edge", "--checkpoint_dir", str(folder)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", SPECS)
def test_in_and_out_again_with_equal_bits(table: str, dtype: str, tmp_path: Path) -> None:
    file = original(table, DTYPES[dtype])
    place = save(table, file, tmp_path)
    assert combine(table, tmp_path) == 0
    assert main(["convert", str(place), str(tmp_path / "ours.safetensors")]) == 0
    wanted = module(table).state_dict()
    ours = {n.replace("branches.control.", "branches.edge."): t for n, t in load_file(tmp_path / "ours.safetensors").items()}
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[n], wanted[n].to(DTYPES[dtype])) for n in wanted)
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "again.pt")]) == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == file.keys()
    assert all(torch.equal(again[n], file[n]) and again[n].dtype == DTYPES[dtype] for n in file)


# One key of each part that only this table has, and what it is called here.
KEYS = {
    "predict1": ("net.extra_pos_embedder.pos_emb_t", "learnable_pos_embed.pos_emb_t"),
    "predict2": ("net.blocks.1.mlp.layer1.weight", "transformer_blocks.1.ff.net.0.proj.weight"),
    "predict2.5": ("net.crossattn_proj.0.bias", "crossattn_proj.0.bias"),
    "transfer1": ("net.input_hint_block.14.bias", "branches.edge.hint.14.bias"),
    "transfer2.5": ("net.control_blocks.1.after_proj.weight", "branches.edge.control_blocks.1.after_proj.weight"),
}


@pytest.mark.parametrize("mistake", ["renamed", "missing", "extra"])
@pytest.mark.parametrize("table", SPECS)
def test_a_wrong_file_is_refused_by_name(table: str, mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, (key, ours) = original(table), KEYS[table]
    wrong = key.replace(".bias", ".bais").replace(".weight", ".weihgt").replace("pos_emb_t", "pos_emb_x")
    if mistake != "missing":
        file[wrong] = file[key]
    if mistake != "extra":
        del file[key]
    place = save(table, file, tmp_path)
    refused = combine(table, tmp_path) or main(["convert", str(place), str(tmp_path / "ours.safetensors")])
    told = capsys.readouterr().err
    assert refused == 1 and not (tmp_path / "ours.safetensors").exists()
    assert (f"missing: {key}\n" in told) == (mistake != "extra")
    assert (f"no weight of Cosmos: {wrong}" in told) == (mistake != "missing")

    torch.save(file, tmp_path / "one.pt")  # and a network that is to hold them refuses them by name
    network = module(table, seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError) as refusal:
        load_into(network, read(str(tmp_path / "one.pt"), network), "one.pt")
    assert (f"missing in the weights: {ours}" in str(refusal.value)) == (mistake != "extra")
    assert ("not in the network: " in str(refusal.value)) == (mistake != "missing")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("table", SPECS)
def test_each_key_of_each_table_is_missed(table: str) -> None:
    names = set(original(table))
    assert odd_names(names) == ([], [])
    for name in names:
        missing, extra = odd_names(names - {name})
        assert missing == [name] and extra == [], name


@pytest.mark.parametrize("name", MODELS)
def test_the_published_networks_have_the_names_of_their_table_and_no_others(name: str) -> None:
    with torch.device("meta"):
        state = MODELS[name].build().module.state_dict()
    assert odd_names(set(original_names(state, "1" if "1_" in name else "2").values())) == ([], [])


def test_a_branch_that_has_come_away_from_its_base_does_not_go_out_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.clone() for name, tensor in module("transfer2.5").state_dict().items()}
    state["branches.edge.time_embed.norm.weight"] = state["branches.edge.time_embed.norm.weight"] + 1
    save_file(state, tmp_path / "ours.safetensors")
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "x.pt")]) == 1
    told = capsys.readouterr().err
    assert "branches.edge.time_embed.norm.weight differs from base.time_embed.norm.weight" in told
    assert not (tmp_path / "x.pt").exists()


def test_a_published_base_becomes_the_folder_of_which_a_fresh_branch_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road of CTRL_.._pretrain: base_model.pt -> a folder of diffusers -> the network whose branch is to be trained."""
    spec = SPECS["transfer1"][0]
    assert isinstance(spec, CosmosControlSpec)
    monkeypatch.setattr("fewstep.networks.weights.convert.MODELS", {"small": SPECS["predict1"][0]})
    save("transfer1", original("transfer1"), tmp_path)
    place = tmp_path / "nvidia/Cosmos-Transfer1-7B"
    assert main(["convert", str(place / "base_model.pt"), str(place / "base_model")]) == 0
    wanted = module("transfer1").base.state_dict()
    made: Any = replace(spec, pretrained=str(place / "base_model"), train="control").build().module
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.base.state_dict().items())
    branch = made.branches["edge"].state_dict()
    copied = {n: t for n, t in branch.items() if n.startswith("control_blocks.")}
    assert all(torch.equal(t, wanted[n.replace("control_blocks.", "transformer_blocks.")]) for n, t in copied.items())
    assert len(copied) > 20 and not branch["after.0.weight"].any()
    assert {name.split(".")[0] for name, p in made.named_parameters() if p.requires_grad} == {"branches"}
