"""Weights of others come in whole or not at all: every form that checkpoints have, and no code of a file is run."""

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp

from fewstep.cli import main
from fewstep.config import dump
from fewstep.config.text import write_yaml
from fewstep.files import write_tensors
from fewstep.inference.model import open_model
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.keys import Generation, original_names
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.files.pipeline import is_diffusers_folder
from fewstep.networks.files.tensor_files import open_tensors
from fewstep.networks.roles import Networks, build
from fewstep.networks.weights.addresses import load_into, read
from fewstep.networks.weights.convert import convert

FLOW = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8),
    text_projection_from=12,
)  # fmt: skip
FIRST = replace(FLOW, text_projection_from=None, family="edm", sigma_data=0.5, learnable_positions=True)
SIZES = {name: getattr(FLOW, name) for name in FLOW.__dataclass_fields__}
TRANSFER2 = CosmosControlSpec(**SIZES, controls=("edge",), num_control_blocks=2, hint_channels=8)
TRANSFER1 = replace(
    TRANSFER2, text_projection_from=None, learnable_positions=True, style="transfer1", family="edm", num_control_blocks=1
)

State = dict[str, Tensor]


def module(spec: CosmosSpec, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = spec.build().module
    for parameter in made.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter)
    if isinstance(spec, CosmosControlSpec) and spec.style == "transfer2_5":  # what a branch repeats is equal to its base's
        for control in spec.controls:
            for own, again in (("patch_embed", "patch_embed_base"), ("time_embed", "time_embed"), ("crossattn_proj",) * 2):
                getattr(made.branches[control], again).load_state_dict(getattr(made.base, own).state_dict())
    return made


def original(made: Any, generation: Generation) -> State:
    state = made.state_dict()
    return {theirs: state[ours] for ours, theirs in original_names(state, generation).items()}


def fills(spec: CosmosSpec, address: str | Path, wanted: Any) -> None:
    """The weights at the address fill a network of the spec with the very bits of `wanted`."""
    other = module(spec, seed=1)
    assert load_into(other, read(str(address), other), str(address)) == len(other.state_dict())
    for name, value in wanted.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def dcp_save(tensors: State, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


BESIDE = {"net.pos_embedder.seq": torch.arange(4.0), "net.blocks.0.self_attn.attn_op._extra_state": io.BytesIO(b"fp8")}
CASES: list[tuple[str, CosmosSpec, Generation]] = [("first", FIRST, "1"), ("second", FLOW, "2"), ("transfer1", TRANSFER1, "1")]
CASES.append(("transfer2.5", TRANSFER2, "2"))


@pytest.mark.parametrize(("name", "spec", "generation"), CASES, ids=[case[0] for case in CASES])
def test_an_original_file_comes_in_and_goes_out_again_with_equal_bits(
    name: str, spec: CosmosSpec, generation: Generation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = module(spec)
    file = original(made, generation)
    torch.save(file | BESIDE, tmp_path / "model.pt")
    fills(spec, tmp_path / "model.pt", made)
    told = capsys.readouterr().err
    assert (
        f"weights: {len(made.state_dict())} tensors from {tmp_path}/model.pt, named as Cosmos {generation} names them" in told
    )
    assert "2 other entries left" in told

    convert(f"{tmp_path}/model.pt", tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() - {"control"} >= {n.replace("branches.edge", "branches.control") for n in made.state_dict()}
    convert(f"{tmp_path}/ours.safetensors", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == file.keys()
    assert all(torch.equal(again[n], file[n]) and again[n].dtype == file[n].dtype for n in file)


@pytest.mark.parametrize("mistake", ["renamed", "missing", "extra", "misshapen"])
def test_a_wrong_file_is_refused_by_name(mistake: str, tmp_path: Path) -> None:
    file = original(module(FLOW), "2")
    key = "net.blocks.1.mlp.layer1.weight"
    ours = "transformer_blocks.1.ff.net.0.proj.weight"
    if mistake == "renamed":
        file["net.blocks.1.mlp.layer3.weight"] = file.pop(key)
    elif mistake == "missing":
        del file[key]
    elif mistake == "extra":
        file["net.blocks.1.mlp.layer3.weight"] = torch.zeros(2)
    else:
        file[key] = torch.zeros(3, 3)
    words = {
        "renamed": f"missing in the weights: {ours}\n  not in the network: net.blocks.1.mlp.layer3.weight",
        "missing": f"missing in the weights: {ours}",
        "extra": "not in the network: net.blocks.1.mlp.layer3.weight",
        "misshapen": f"{ours}: the network wants (64, 32), the weights have (3, 3)",
    }
    torch.save(file, tmp_path / "model.pt")
    other = module(FLOW, seed=1)
    with pytest.raises(ValueError) as refusal:
        load_into(other, read(f"{tmp_path}/model.pt", other), f"{tmp_path}/model.pt")
    assert words[mistake] in str(refusal.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, other: {"model": state, "ema": None, "optimizer": {"state": {0: torch.zeros(3)}, "param_groups": []}},
        lambda state, other: {"model": other, "ema": state, "iteration": 500},
        lambda state, other: {"model": other, "ema": {n.replace(".", "-"): t for n, t in state.items()}},  # Cosmos 1
        lambda state, other: {
            "model": {"net": {f"transformer.{n[4:]}": t for n, t in state.items()}, "fake_score": other}
        },  # FastGen
        lambda state, other: {f"net_ema.{n[4:]}": t for n, t in state.items()} | other,  # Predict2.5
        lambda state, other: dict(state) | {f"net_fake_score.{n[4:]}": t for n, t in other.items()},
        lambda state, other: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        lambda state, other: {n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for n, t in state.items()},
        lambda state, other: {n.removeprefix("net."): t for n, t in state.items()},
    ],
    ids=["model", "ema", "dashes", "fastgen", "net_ema", "fake_score", "ddp", "checkpointed", "bare"],
)
def test_whatever_a_trainer_wraps_around_its_weights(wrap: Any, tmp_path: Path) -> None:
    made, other = module(FLOW), module(FLOW, seed=5)
    torch.save(wrap(original(made, "2"), original(other, "2")), tmp_path / "0010000.pth")
    fills(FLOW, tmp_path / "0010000.pth", made)


def test_one_of_several_sets_is_named_after_a_colon_and_a_wrong_name_is_told_what_there_is(tmp_path: Path) -> None:
    one, two = module(FLOW), module(FLOW, seed=5)
    path = tmp_path / "iter_000000100.pt"
    torch.save({"model": original(one, "2"), "ema": original(two, "2")}, path)
    fills(FLOW, f"{path}:model", one)
    fills(FLOW, path, two)
    with pytest.raises(ValueError, match="holds no weights called 'emma'; it holds ema, model"):
        read(f"{path}:emma")
    torch.save({"a": original(one, "2"), "b": original(two, "2")}, path)
    with pytest.raises(ValueError, match=r"several sets of weights; say which: .*:a, .*:b"):
        read(str(path))
    torch.save(original(one, "2") | {f"net_ema.{n[4:]}": t for n, t in original(two, "2").items()}, path)
    fills(FLOW, f"{path}:net", one)
    with pytest.raises(ValueError, match="one set of weights only, none is called 'critic'"):
        read(f"{path}:critic")


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    made, average = module(FLOW), module(FLOW, seed=5)
    state = original(made, "2") | {f"net_ema.{n[4:]}": t for n, t in original(average, "2").items()}
    dcp_save(state, tmp_path / "iter_000001500/model")
    fills(FLOW, tmp_path / "iter_000001500/model", average)
    fills(FLOW, f"{tmp_path}/iter_000001500/model:net", made)
    distilled = {f"base_model.net.{n[4:]}": t for n, t in original(module(FIRST), "1").items()}
    student = module(TRANSFER1)
    file = original(student, "1")
    distilled = {n if n.startswith("base_model.") else f"net_ctrl.{n[4:]}": t for n, t in file.items()}
    dcp_save(distilled, tmp_path / "iter_000000500_model_net")
    fills(TRANSFER1, tmp_path / "iter_000000500_model_net", student)


def test_parts_of_tensor_parallelism_are_put_together_as_they_were_cut(tmp_path: Path) -> None:
    """Split as the original converter splits: queries, keys, values, first MLP layer by rows, what follows them by columns."""
    made = module(FIRST)
    parts: list[State] = [{} for _ in range(8)]
    for name, tensor in original(made, "1").items():
        axis = 0 if name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "block.layer1.weight")) else None
        axis = 1 if name.endswith(("to_out.0.weight", "block.layer2.weight")) else axis
        for part, piece in zip(parts, [tensor] * 8 if axis is None else tensor.chunk(8, axis), strict=True):
            part[name] = piece.clone()
    torch.save({"grad_scaler": {}, "iteration": 100}, tmp_path / "iter_000000100.pt")
    for number, part in enumerate(parts):
        torch.save({"model": part, "ema": None}, tmp_path / f"iter_000000100_model_mp_{number}.pt")
    for address in ("iter_000000100.pt", "iter_000000100_model_mp_3.pt", "iter_000000100_model_mp_*.pt"):
        fills(FIRST, tmp_path / address, made)

    parts[5]["net.affline_norm.weight"] = parts[5]["net.affline_norm.weight"] + 1
    torch.save({"model": parts[5]}, tmp_path / "iter_000000100_model_mp_5.pt")
    with pytest.raises(ValueError, match=r"'net\.affline_norm\.weight' should be whole in every part, but part 5 differs"):
        read(str(tmp_path / "iter_000000100.pt"))
    (tmp_path / "iter_000000100_model_mp_5.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks iter_000000100_model_mp_5\.pt"):
        read(str(tmp_path / "iter_000000100.pt"))


def test_weights_go_out_in_the_parts_of_tensor_parallelism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a split by hand, for 8 processes; what goes out comes in again."""
    made = module(FIRST)
    whole = original(made, "1")
    torch.save(whole, tmp_path / "model.pt")
    assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "iter_000000100.pt"), "--parts", "8"]) == 0
    assert not (tmp_path / "iter_000000100.pt").exists()
    for number in range(8):
        part = torch.load(tmp_path / f"iter_000000100_model_mp_{number}.pt", weights_only=True)["model"]
        assert part.keys() == whole.keys()
        for name, tensor in whole.items():
            by_rows = name.endswith(("to_q.0.weight", "to_k.0.weight", "to_v.0.weight", "block.layer1.weight"))
            by_columns = name.endswith(("to_out.0.weight", "block.layer2.weight"))
            rows, columns = tensor.shape[0] // 8, tensor.shape[-1] // 8
            wanted = tensor[number * rows : (number + 1) * rows] if by_rows else tensor
            wanted = tensor[:, number * columns : (number + 1) * columns] if by_columns else wanted
            assert torch.equal(part[name], wanted), name
    fills(FIRST, tmp_path / "iter_000000100.pt", made)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "other.pt"), "--parts", "7"]) == 1
    assert "which 7 parts do not divide" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "folder"), "--parts", "8"]) == 2
    assert "are of OUT.pt" in capsys.readouterr().err


def test_a_base_and_its_control_are_joined_as_the_original_script_joins_them(tmp_path: Path) -> None:
    made = module(TRANSFER1)
    file = original(made, "1")
    folder = tmp_path / "checkpoints/nvidia/Cosmos-Transfer1-7B"
    folder.mkdir(parents=True)
    base = {n: t for n, t in file.items() if n.startswith("base_model.")} | {"logvar.1.weight": torch.zeros(1)}
    edge = {n: t for n, t in file.items() if n.startswith("net.")} | {"logvar.1.weight": torch.ones(1)}
    torch.save(base, folder / "base_model.pt")
    torch.save(edge, folder / "edge_control.pt")
    assert main(["convert", "--ctrl_type", "edge", "--checkpoint_dir", str(tmp_path / "checkpoints")]) == 0
    joined = torch.load(folder / "checkpoints_teacher/edge_control.pt", weights_only=True)
    wanted = {**base, **edge}  # what the script does
    assert joined.keys() == wanted.keys() and all(torch.equal(joined[n], wanted[n]) for n in wanted)
    fills(TRANSFER1, folder / "checkpoints_teacher/edge_control.pt", made)
    fills(TRANSFER1, f"{folder}/base_model.pt+{folder}/edge_control.pt", made)
    fills(TRANSFER1, f"{folder}/base_model.pt+edge={folder}/edge_control.pt", made)

    plain = {n.removeprefix("base_model."): t for n, t in base.items()}  # as a transformer alone is saved
    torch.save(plain, folder / "base_model.pt")
    main(
        ["convert", "--base", f"{folder}/base_model.pt", "--control", f"{folder}/edge_control.pt", str(tmp_path / "joined.pt")]
    )
    fills(TRANSFER1, tmp_path / "joined.pt", made)


def test_a_missing_file_of_the_two_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--ctrl_type", "depth", "--checkpoint_dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"there is no {tmp_path}/nvidia/Cosmos-Transfer1-7B/base_model.pt" in told and "depth_control.pt" in told


def test_several_controls_of_one_base(tmp_path: Path) -> None:
    controls = ("edge", "depth")
    for spec, generation in ((TRANSFER1, "1"), (TRANSFER2, "2")):
        made = module(replace(spec, controls=controls))
        state = made.state_dict()
        for control in controls:
            one = {n: t for n, t in state.items() if n.startswith(("base.", f"branches.{control}."))}
            names = original_names(one, generation)  # type: ignore[arg-type]
            is_branch = {ours: ours.startswith("branches.") for ours in names}
            torch.save({names[n]: one[n] for n in names if is_branch[n]}, tmp_path / f"{control}.pt")
            torch.save({names[n].replace("base_model.", ""): one[n] for n in names if not is_branch[n]}, tmp_path / "base.pt")
        address = f"{tmp_path}/base.pt+edge={tmp_path}/edge.pt+depth={tmp_path}/depth.pt"
        fills(replace(spec, controls=controls), address, made)
        swapped = f"{tmp_path}/base.pt+edge={tmp_path}/depth.pt+depth={tmp_path}/edge.pt"
        other = read(swapped)
        name = "branches.edge.control_blocks.0.attn1.to_q.weight"
        assert torch.equal(other[name], state[name.replace("edge", "depth")])


def test_folders_of_diffusers_and_sharded_safetensors(tmp_path: Path) -> None:
    made = module(FLOW)
    made.save_pretrained(str(tmp_path / "one"))
    made.save_pretrained(str(tmp_path / "sharded"), max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "pipeline").mkdir()
    made.save_pretrained(str(tmp_path / "pipeline/transformer"))
    save_file(original(made, "2"), tmp_path / "original.safetensors")
    for place in ("one", "sharded", "pipeline", "original.safetensors"):
        fills(FLOW, tmp_path / place, made)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_is_written_that_diffusers_opens(sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

    monkeypatch.setattr("fewstep.networks.weights.convert.SHARD_BYTES", 20_000 if sharded else 10**9)
    monkeypatch.setattr("fewstep.networks.weights.convert.MODELS", {"small": FLOW, "first": FIRST, "small_transfer": TRANSFER2})
    made = module(FLOW)
    torch.save(original(made, "2"), tmp_path / "model.pt")
    convert(f"{tmp_path}/model.pt", tmp_path / "out")
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == sharded
    again = CosmosTransformer3DModel.from_pretrained(str(tmp_path / "out"))
    assert dict(again.config)["rope_scale"] == [1.0, 3.0, 3.0] or tuple(again.config["rope_scale"]) == (1.0, 3.0, 3.0)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in made.state_dict().items())
    fills(FLOW, tmp_path / "out", made)

    led = module(TRANSFER2)
    torch.save(original(led, "2"), tmp_path / "led.pt")
    convert(f"{tmp_path}/led.pt", tmp_path / "led")
    for cls, part, own in (
        (CosmosTransformer3DModel, "transformer", led.base),
        (CosmosControlNetModel, "controlnet", led.branches["edge"]),
    ):
        again = cls.from_pretrained(str(tmp_path / "led" / part))
        assert all(torch.equal(again.state_dict()[n], t) for n, t in own.state_dict().items())
    spec = replace(TRANSFER2, pretrained=str(tmp_path / "led"), branches=(str(tmp_path / "led"),))
    assert all(torch.equal(spec.build().module.state_dict()[n], t) for n, t in led.state_dict().items())


def test_which_model_it_is_must_be_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(FLOW, rope_scale=(1.0, 4.0, 4.0))
    monkeypatch.setattr("fewstep.networks.weights.convert.MODELS", {"small": FLOW, "wide": wide})
    torch.save(original(module(FLOW), "2"), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="fit small and wide, which differ in their positions; say which with --model"):
        convert(f"{tmp_path}/model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(f"{tmp_path}/model.pt", tmp_path / "out", model="wide")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_scale"] == [1.0, 4.0, 4.0]
    torch.save(original(module(replace(FLOW, num_layers=3)), "2"), tmp_path / "deep.pt")
    with pytest.raises(
        ValueError, match=r"fit none of the published models; the nearest is small:\n  not in it: transformer_blocks\.2"
    ):
        convert(f"{tmp_path}/deep.pt", tmp_path / "deep")
    module(replace(FLOW, num_layers=3)).save_pretrained(str(tmp_path / "like"))
    convert(f"{tmp_path}/deep.pt", tmp_path / "deep", model=str(tmp_path / "like"))
    fills(replace(FLOW, num_layers=3), tmp_path / "deep", module(replace(FLOW, num_layers=3)))
    with pytest.raises(ValueError, match="diffusers has no branch of Cosmos-Transfer1"):
        monkeypatch.setattr("fewstep.networks.weights.convert.MODELS", {"led": TRANSFER1})
        torch.save(original(module(TRANSFER1), "1"), tmp_path / "led.pt")
        convert(f"{tmp_path}/led.pt", tmp_path / "led")


def test_another_precision_and_a_writer_that_safetensors_reads(tmp_path: Path) -> None:
    made = module(FLOW)
    torch.save(original(made, "2"), tmp_path / "model.pt")
    convert(f"{tmp_path}/model.pt", tmp_path / "half.safetensors", dtype="bf16")
    half = load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in made.state_dict().items())
    odd = {
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "b": torch.randn(2, 3).bfloat16(),
    }
    save_file(odd, tmp_path / "odd.safetensors")
    write_tensors(tmp_path / "again.safetensors", open_tensors(tmp_path / "odd.safetensors").tensors, {"fewstep": "us"})
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == odd.keys() and all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in odd.items())


def test_the_roles_of_a_run_read_them(tmp_path: Path) -> None:
    made = module(TRANSFER1)
    torch.save(original(made, "1"), tmp_path / "edge_control.pt")
    nets = build(Networks(teacher=TRANSFER1, teacher_init=str(tmp_path / "edge_control.pt")), ("teacher", "student"), 0)
    for role in ("teacher", "student"):
        assert all(torch.equal(nets[role].module.state_dict()[n], t) for n, t in made.state_dict().items())


class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_hostile_checkpoint_runs_nothing(old_format: bool, tmp_path: Path) -> None:
    file = original(module(FLOW), "2") | {"net.extra": Hostile(tmp_path / "ran")}
    torch.save(file, tmp_path / "model.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=r"model\.pt.*: refused at byte .*: it asks for"):
        read(str(tmp_path / "model.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_hostile_table_of_contents_runs_nothing(tmp_path: Path) -> None:
    dcp_save(original(module(FLOW), "2"), tmp_path / "model")
    metadata = dcp.FileSystemReader(tmp_path / "model").read_metadata()
    metadata.planner_data = Hostile(tmp_path / "ran")
    (tmp_path / "model/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata: refused at byte .*: it asks for 'posix\.system"):
        read(str(tmp_path / "model"))
    metadata.planner_data = None
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (tmp_path / "model/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names the file .../../secret.: must be a plain file name"):
        read(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_an_index_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"weight_map\.a: must be a plain file name"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_says_so(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pt" else save_file)(original(module(FLOW), "2"), path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"Is the download complete\?|Write or download it again"):
            read(str(path))


def test_what_is_written_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(original(module(FLOW), "2"), tmp_path / "model.pt")
    convert(f"{tmp_path}/model.pt", tmp_path / "out.safetensors")
    before = (tmp_path / "out.safetensors").read_bytes()

    def full(self: Any, *args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.networks.files.tensor_files.Path.open", full)
    for out in ("out.safetensors", "new.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            convert(f"{tmp_path}/model.pt", tmp_path / out)
    monkeypatch.undo()
    assert (tmp_path / "out.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out.safetensors"]


@pytest.mark.parametrize(
    ("words", "told", "status"),
    [
        (["convert"], "give either SRC, or --base with --control", 2),
        (["convert", "a.pt", "b.pt", "--base", "c.pt", "--control", "d.pt"], "give either SRC", 2),
        (["convert", "--base", "c.pt", "x.pt"], "--base wants the --control", 2),
        (["convert", "none.pt", "x.pt"], "there is no none.pt", 2),
        (["convert", "model.pt"], "Missing argument 'OUT'", 2),
        (["convert", "model.pt", "x.zip"], "must end in .pt or .safetensors", 2),
        (["convert", "model.pt", "model.pt"], "is what is read", 1),
        (["convert", "model.pt", "x.pt", "--dtype", "int8"], "not one of keep, fp32, bf16, fp16", 2),
        (["convert", "model.pt", "x", "--model", "huge"], "neither a folder with a config.json nor one of predict1_7b", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_use_is_told_apart(
    words: list[str],
    told: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(original(module(FLOW), "2"), "model.pt")
    assert main(words) == status
    assert told in capsys.readouterr().err


def test_a_folder_as_the_downloads_make_it_is_an_address(tmp_path: Path) -> None:
    """C/D with model.pt, and a config.json that is none of diffusers."""
    made = module(FLOW)
    (tmp_path / "D").mkdir()
    torch.save({"model": original(made, "2")}, tmp_path / "D/model.pt")
    (tmp_path / "D/config.json").write_text("{}")
    fills(FLOW, tmp_path / "D", made)
    assert not is_diffusers_folder(tmp_path / "D")


def test_a_size_never_published_is_described_beside_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base, its branch and both together; without the file, or with a wrong one, the message names it."""
    made = module(TRANSFER1)
    file = original(made, "1")
    folder = tmp_path / "checkpoints/nvidia/Cosmos-Transfer1-7B"
    folder.mkdir(parents=True)
    for name, start in (("base_model", "base_model."), ("edge_control", "net.")):
        torch.save({n: t for n, t in file.items() if n.startswith(start)}, folder / f"{name}.pt")
    assert main(["convert", f"{folder}/base_model.pt", f"{tmp_path}/folder"]) == 1
    assert "put a network.yaml with its settings beside the weights" in capsys.readouterr().err
    (folder / "network.yaml").write_text(write_yaml({"kind": "cosmos_control", **dump(TRANSFER1)}))
    assert main(["convert", f"{folder}/base_model.pt", f"{tmp_path}/folder"]) == 0
    assert FIRST.__class__(**{**dump(FIRST), "pretrained": str(tmp_path / "folder")}).build().module.config.num_layers == 2
    joined = f"{folder}/base_model.pt+edge={folder}/edge_control.pt"
    for address in (joined, f"{folder}/checkpoints_teacher/edge_control.pt"):
        model = open_model(address, controls=["edge"])
        assert model.spec == TRANSFER1
        for name, value in made.state_dict().items():
            assert torch.equal(model.network.module.state_dict()[name], value), name
        assert main(["convert", "--ctrl_type", "edge", "--checkpoint_dir", str(tmp_path / "checkpoints")]) == 0
    elsewhere = tmp_path / "sizes.yaml"
    (folder / "network.yaml").rename(elsewhere)
    assert open_model(joined, network=str(elsewhere)).spec == TRANSFER1
    elsewhere.write_text("kind: wan\n")
    with pytest.raises(ValueError, match="is no network of Cosmos"):
        open_model(joined, network=str(elsewhere))
    elsewhere.write_text(write_yaml({"kind": "cosmos_control", **dump(replace(TRANSFER1, num_layers=3))}))
    with pytest.raises(ValueError, match=r"do not fit the network:\n  missing in the weights: base\.transformer_blocks\.2\."):
        open_model(joined, network=str(elsewhere))


MEASURE = """
import sys, threading, time
from pathlib import Path
from fewstep.networks.weights.convert import convert
import fewstep.networks.files.tensor_files, diffusers, torch, safetensors.torch
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
before, top, going = anonymous(), [0.0], [True]
def watch():
    while going:
        top[0] = max(top[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
convert(sys.argv[1], Path(sys.argv[2]))
going.clear(); thread.join()
print("GREW", top[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts resident memory in /proc")
def test_tensors_that_were_read_and_dropped_are_not_resident(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for number in range(8):
        write_tensors(tmp_path / f"{number}.safetensors", {f"{name}{number}": torch.ones(2**21) for name in "abcd"})
    before, tensors = resident(), open_tensors(tmp_path).tensors
    for stored in tensors.values():
        assert stored.read().sum() == 2**21
    assert resident() - before < 2**25 < sum(stored.num_bytes for stored in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous memory in /proc")
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
def test_a_file_is_never_in_memory_whole(out: str, tmp_path: Path) -> None:
    wide = replace(FLOW, num_heads=16, head_dim=128, num_layers=2, mlp_ratio=1, text_dim=2048)  # 19 tensors of 16 MiB and more
    with torch.device("meta"):
        names = original_names(wide.build().module.state_dict(), "2")
        shapes = {names[name]: tensor.shape for name, tensor in wide.build().module.state_dict().items()}
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model.pt"), str(tmp_path / out)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout.split("GREW")[1]) < 100
