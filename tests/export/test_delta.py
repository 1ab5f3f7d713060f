"""What distillation changed, apart from the weights: exact as a delta, and as adapters with the error that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.export.export import export
from fewstep.inference.model import open_model
from fewstep.methods import KD
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.weights.addresses import read
from fewstep.networks.weights.convert import convert
from tests.export.test_export import NET, trained

STEPS = KD(student_sample_steps=1, t_list=(1.0,))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("runs")
        patch.setenv("OUTPUT_ROOT", str(root))
        yield root


@pytest.fixture(scope="module")
def teacher(root: Path) -> str:
    """A teacher of random weights, as a file."""
    torch.manual_seed(3)
    file = root / "teacher.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in NET.build().module.state_dict().items()}, file)
    return str(file)


@pytest.fixture(scope="module")
def student(root: Path, teacher: str) -> Path:
    nets = Networks(teacher=NET, teacher_init=teacher, student=Full())
    return trained(root, "delta_student", nets=nets, method=STEPS)


def test_a_delta_on_its_teacher_is_the_student(student: Path, teacher: str, tmp_path: Path) -> None:
    export(str(student), tmp_path / "delta", "delta")
    convert(teacher, tmp_path / "again.safetensors", add=[str(tmp_path / "delta/delta.safetensors")])
    weights, again = read(f"{student}@latest:student.ema"), load_file(tmp_path / "again.safetensors")
    base = load_file(teacher)
    assert any(not torch.equal(weights[name], base[name]) for name in weights)
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-8)


def test_the_delta_on_a_tuned_teacher_is_the_tuning_on_the_student(
    student: Path, teacher: str, root: Path, tmp_path: Path
) -> None:
    """(tuned - base) + student = (student - base) + tuned, by two roads of commands."""
    tuned = trained(root, "tuned", nets=Networks(student=Full(NET, init=teacher)))
    for run, name in ((student, "student"), (tuned, "tuned")):
        export(str(run), tmp_path / name, "delta")
    export(str(student), tmp_path / "a", "safetensors", add=[f"{tmp_path}/tuned/delta.safetensors:0.5"])
    convert(f"{tuned}", tmp_path / "b.safetensors", add=[f"{tmp_path}/student/delta.safetensors"])
    first, second = load_file(tmp_path / "a/student.safetensors"), load_file(tmp_path / "b.safetensors")
    weights, base, other = (read(a) for a in (f"{student}@latest:student.ema", teacher, f"{tuned}@latest:student.ema"))
    for name in first:
        half = weights[name].double() + 0.5 * (other[name].double() - base[name].double())
        whole = weights[name].double() + other[name].double() - base[name].double()
        torch.testing.assert_close(first[name].double(), half, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second[name].double(), whole, rtol=1e-6, atol=1e-7)
    assert "delta.safetensors:0.5" in (tmp_path / "a/README.md").read_text()
    assert open_model(tmp_path / "a").sampler == open_model(str(student)).sampler


def test_the_error_of_the_adapters_is_the_one_that_is_said(student: Path, teacher: str, tmp_path: Path) -> None:
    export(str(student), tmp_path / "near", "delta", rank=2)
    weights, base = read(f"{student}@latest:student.ema"), load_file(teacher)
    left = whole = 0.0
    for name in (n.removesuffix(".lora_A.weight") for n in load_file(tmp_path / "near/pytorch_lora_weights.safetensors")):
        if name.endswith(".lora_B.weight"):
            continue
        layer = name.removeprefix("transformer.") + ".weight"
        sizes = np.linalg.svd((weights[layer].double() - base[layer].double()).numpy(), compute_uv=False)
        left, whole = left + (sizes[2:] ** 2).sum(), whole + (sizes**2).sum()
    assert f"of rank 2 and miss {(left / whole) ** 0.5:.1%} of" in (tmp_path / "near/README.md").read_text()
    export(str(student), tmp_path / "all", "delta", rank=64)
    convert(teacher, tmp_path / "again.safetensors", add=[str(tmp_path / "all/pytorch_lora_weights.safetensors")])
    again = load_file(tmp_path / "again.safetensors")
    layers = [n for n in load_file(tmp_path / "all/delta.safetensors") if n.endswith(".weight.diff")]
    assert len(layers) > 8
    for layer in (name.removesuffix(".diff") for name in layers):
        if weights[layer].ndim == 2:
            torch.testing.assert_close(again[layer], weights[layer], rtol=0, atol=2e-6)


def test_adapters_are_added_as_diffusers_fuses_them(tmp_path: Path) -> None:
    spec = WanSpec(latent_channels=2, num_heads=2, head_dim=12, num_layers=2, ffn_dim=16, text_dim=8)
    torch.manual_seed(0)
    module: Any = spec.build().module  # a class of diffusers
    adapters = {}
    for block in range(2):
        for layer in ("attn1.to_q", "attn2.to_k", "ffn.net.2"):
            out, into = module.get_submodule(f"blocks.{block}.{layer}").weight.shape
            adapters[f"transformer.blocks.{block}.{layer}.lora_A.weight"] = torch.randn(3, into)
            adapters[f"transformer.blocks.{block}.{layer}.lora_B.weight"] = torch.randn(out, 3)
    save_file(adapters, tmp_path / "lora.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "base.safetensors")
    convert(str(tmp_path / "base.safetensors"), tmp_path / "out.safetensors", add=[f"{tmp_path}/lora.safetensors:0.7"])
    module.load_lora_adapter(adapters, prefix="transformer")
    module.fuse_lora(lora_scale=0.7)
    module.unload_lora()
    ours, theirs = load_file(tmp_path / "out.safetensors"), module.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_added_is_refused(student: Path, teacher: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Weights cannot be added to weights"):
        convert(teacher, tmp_path / "no.safetensors", add=[teacher])
    other = replace(NET, num_layers=1)
    torch.manual_seed(0)
    save_file({n: t.contiguous() for n, t in other.build().module.state_dict().items()}, tmp_path / "other.safetensors")
    export(str(student), tmp_path / "delta", "delta")
    with pytest.raises(UserError, match="is of another network"):
        convert(str(tmp_path / "other.safetensors"), tmp_path / "no.safetensors", add=[f"{tmp_path}/delta/delta.safetensors"])
    with pytest.raises(UserError, match="has no teacher"):
        export(str(trained(root, "alone")), tmp_path / "no", "delta")
    assert not (tmp_path / "no.safetensors").exists() and not (tmp_path / "no").exists()
