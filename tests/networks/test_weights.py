"""Addresses of weights, and loading that refuses anything but the very tensors."""

import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from fewstep.environment import output_root
from fewstep.networks.weights.addresses import load_into, locate, read


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_a_fitting_set_is_loaded():
    module, tensors = network(), {name: torch.full_like(value, 2.0) for name, value in network().state_dict().items()}
    assert load_into(module, tensors, "here") == 4
    assert all(bool((value == 2.0).all()) for value in module.state_dict().values())


def test_renamed_missing_and_misshapen_are_named_together():
    """cosmos.md A.5.7: a renamed key must not pass as one missing and one ignored."""
    module, before = network(), {k: v.clone() for k, v in network().state_dict().items()}
    tensors = dict(before)
    tensors["0.wght"] = tensors.pop("0.weight")
    del tensors["0.bias"]
    tensors["1.weight"] = torch.zeros(1, 4)
    with pytest.raises(ValueError) as refusal:
        load_into(module, tensors, "runs/kd")
    for part in (
        "'runs/kd'",
        "missing in the weights: 0.weight",
        "missing in the weights: 0.bias",
        "not in the network: 0.wght",
        "1.weight: the network wants (1, 3), the weights have (1, 4)",
    ):
        assert part in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # nothing was touched


def test_a_long_list_is_cut():
    with pytest.raises(ValueError, match=r"and 92 more"):
        load_into(network(), {f"extra.{i}": torch.zeros(1) for i in range(100)}, "x")


def test_safetensors(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "w.safetensors")
    got = read(str(tmp_path / "w.safetensors"))
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="there is no such file"):
        read(str(tmp_path / "other.safetensors"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """OUTPUT_ROOT/group/kd with two finished checkpoints, as the trainer lays them out."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    checkpoints = tmp_path / "group/kd/checkpoints"
    for step in (500, 1000):
        tensors = {
            "student.weights.0.weight": torch.full((2,), 1.0 * step),
            "student.ema.0.weight": torch.full((2,), 2.0 * step),
            "student.buffers.table": torch.full((3,), 4.0 * step),
            "student.optim.state.0.weight.exp_avg": torch.zeros(2),
            "critic.weights.0.weight": torch.full((2,), 3.0 * step),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(checkpoints / f"iter_{step:09d}"), no_dist=True)
    (checkpoints / "latest_checkpoint.txt").write_text("iter_000001000\n")
    return tmp_path / "group/kd"


@pytest.mark.parametrize(
    "address, value",
    [
        ("group/kd", 2000.0),
        ("group/kd@latest:student.ema", 2000.0),
        ("group/kd@500", 1000.0),
        ("group/kd@500:student", 500.0),
        ("group/kd@iter_000000500:critic", 1500.0),
        ("group/kd:critic", 3000.0),
        ("group/kd/checkpoints@500:critic", 1500.0),
        ("group/kd/checkpoints/iter_000000500:critic", 1500.0),
    ],
)
def test_run_addresses(run, address, value):
    tensors = read(address)
    assert tensors.keys() == ({"0.weight"} if "critic" in address else {"0.weight", "table"})
    assert torch.equal(tensors["0.weight"], torch.full((2,), value))
    assert torch.equal(read(str(run.parents[1] / address))["0.weight"], tensors["0.weight"])  # absolute as well


def test_what_is_not_there_is_named_with_what_is(run):
    with pytest.raises(ValueError, match=r"neither 'group/kdd' nor .* is a folder"):
        locate("group/kdd@500")
    with pytest.raises(ValueError, match=r"has no iter_000000700; it has iter_000000500, iter_000001000"):
        locate("group/kd@700")
    with pytest.raises(ValueError, match=r"holds no 'head\.weights'; it holds .*critic"):
        read("group/kd:head")
    (run / "checkpoints/latest_checkpoint.txt").unlink()
    with pytest.raises(ValueError, match="no finished checkpoint yet"):
        locate("group/kd")


def test_output_root(monkeypatch):
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    assert str(output_root()) == "checkpoints"
    monkeypatch.setenv("OUTPUT_ROOT", "")  # set but empty: as if unset
    assert str(output_root()) == "checkpoints"
