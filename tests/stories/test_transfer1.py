"""Distilling Cosmos-Transfer1, by its own commands: for each control from clips and captions to a clip in one step."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.data.controls import Span
from fewstep.data.files import video
from fewstep.diffusion import Rng
from fewstep.networks.encoders.codecs import open_codec, to_uint8
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.families.cosmos.models import transfer1_7b
from fewstep.networks.weights.addresses import load_into, read

sys.path.insert(0, str(Path(__file__).parent))
import materials
from shell import walk

FILES = "checkpoints/nvidia/Cosmos-Transfer1-7B"
SIZES: dict[str, Any] = {
    "latent_channels": 2, "num_heads": 2, "head_dim": 12, "num_layers": 3, "num_control_blocks": 2, "mlp_ratio": 2.0,
    "text_dim": 8, "adaln_lora_dim": 4, "max_size": [4, 8, 8], "hint_channels": 2,
}  # fmt: skip


def prepare(folder: Path, control: str) -> dict[str, str]:
    """The files that the story begins with; returns its variables."""
    spec = replace(transfer1_7b(control), **SIZES)
    weights = materials.original_weights(spec, "1")
    place = folder / FILES
    place.mkdir(parents=True)
    torch.save({name: tensor for name, tensor in weights.items() if name.startswith("base_model.")}, place / "base_model.pt")
    torch.save({name: tensor for name, tensor in weights.items() if name.startswith("net.")}, place / f"{control}_control.pt")
    described = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != f.default}
    materials.settings(place / "network.yaml", {"kind": "cosmos_control", **described})
    materials.settings(folder / "small.yaml", {"networks": {"teacher": SIZES}, "trainer": {"grad_accum": 1}})
    materials.settings(folder / "branch.yaml", {"networks": {"student": {"network": SIZES}}})
    materials.clips(folder / "datasets/dmd2")
    materials.t5(folder / "google-t5/t5-11b")
    materials.cosmos_codec(folder / "checkpoints/tokenizer")
    kind = "mp4" if control in ("edge", "vis", "depth") else "pickle"
    spec_json = {
        "prompt": "a red ball rolls",
        control: {"control_weight": 1.0, "input_control": f"datasets/dmd2/{control}/0.{kind}"},
    }
    (folder / "spec.json").write_text(json.dumps(spec_json))
    if control in ("edge", "vis"):
        return {"TYPE": control, "FROM": ""}
    materials.results_of_other_models(folder / "results", control)
    return {"TYPE": control, "FROM": "--from results"}


# The other controls differ in their files alone, not in how processes are started.
@pytest.mark.parametrize(
    ("control", "real"),
    [
        pytest.param("edge", False, id="edge-quick"),
        pytest.param("edge", True, id="edge-slow", marks=pytest.mark.slow),
        *(pytest.param(name, False, id=name, marks=pytest.mark.slow) for name in ("vis", "depth", "seg", "keypoint")),
    ],
)
def test_a_control_is_distilled_into_one_step(tmp_path: Path, control: str, real: bool) -> None:
    walk("transfer1.sh", tmp_path, real=real, **prepare(tmp_path, control))
    network = replace(transfer1_7b(control), **SIZES).build()
    runs = tmp_path / "checkpoints/cosmos_transfer1_distill/DISTILL_CTRL_7Bv1"
    places = {stage: f"{runs}/DISTILL_CTRL_7Bv1_{control}_fsdp_{stage}_train" for stage in ("kd", "dmd2")}
    places |= {"teacher": f"{tmp_path}/{FILES}/checkpoints_teacher/{control}_control.pt", "student": f"{tmp_path}/student"}
    weights = {name: read(place, network.module) for name, place in places.items()}
    assert all(torch.equal(tensor, weights["student"][name]) for name, tensor in weights["dmd2"].items())
    assert moved(weights["teacher"], weights["kd"]) > 5e-6  # twice the learning rate of 1e-5
    assert 0 < moved(weights["kd"], weights["dmd2"]) < 2e-6  # once that of 5e-7: it began where KD ended

    load_into(network.module, weights["student"], "the student")
    codec = open_codec(tmp_path / "checkpoints/tokenizer", scale=0.5)
    kind = choices("control")[control]()
    shown = kind.read(tmp_path / f"datasets/dmd2/{control}/0{kind.suffix}", Span(0, 9), (16, 16))
    text, _ = open_text_encoder(tmp_path / "google-t5/t5-11b").encode(["a red ball rolls"])
    pixels = torch.from_numpy(shown).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    cond = Condition(text=text, control={control: codec.encode(pixels)}, fps=torch.tensor([24.0]))
    noise = Rng.of_samples([0]).normal((2, 3, 4, 4))
    with torch.no_grad():
        wanted = to_uint8(codec.decode(network(80 * noise, torch.tensor([80.0]), cond).x0), "the student")
    made = video.read(tmp_path / "outputs" / f"{control}.mp4").frames
    np.testing.assert_allclose(made.astype(int), wanted[0].astype(int), atol=1)
    assert made.std() > 1
    again, teacher = (video.read(tmp_path / f"outputs/{name}.mp4").frames for name in ("distilled", "teacher"))
    assert np.array_equal(again, made) and not np.array_equal(teacher, made)
    sampler = json.loads((tmp_path / "outputs/teacher.json").read_text())["sampler"]
    assert (sampler["guidance"], sampler["solver"], sampler["num_steps"]) == (6.0, "res_2ab", 2)  # Transfer1's g is 5


@pytest.mark.slow
def test_a_branch_is_trained_over_its_frozen_base(tmp_path: Path) -> None:
    walk("transfer1_branch.sh", tmp_path, real=False, **prepare(tmp_path, "edge"))
    network = replace(transfer1_7b("edge"), **SIZES).build()
    runs, name = tmp_path / "checkpoints", "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3"
    published = read(f"{tmp_path}/{FILES}/base_model.pt+{tmp_path}/{FILES}/edge_control.pt", network.module)
    trained = {
        stage: read(f"{runs}/cosmos_transfer1_{stage}/CTRL_7Bv1_lvg/{name}_{stage}") for stage in ("pretrain", "posttrain")
    }
    copied = "branches.edge.control_blocks.0.attn1.to_q.weight"
    for weights in trained.values():
        base = {n: tensor for n, tensor in published.items() if n.startswith("base.")}
        assert all(torch.equal(tensor.bfloat16(), weights[n].bfloat16()) for n, tensor in base.items())  # frozen, in bf16
        assert any(not torch.equal(tensor, published[n]) for n, tensor in weights.items() if n.startswith("branches."))
    torch.testing.assert_close(trained["posttrain"][copied], published[copied], rtol=0, atol=1e-3)
    base = published["base.transformer_blocks.0.attn1.to_q.weight"]
    torch.testing.assert_close(trained["pretrain"][copied], base, rtol=0, atol=1e-3)
    sampler = json.loads((tmp_path / "outputs/output.json").read_text())["sampler"]
    assert sampler["guidance"] == 6.0


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The mean distance between two sets of weights."""
    return float(torch.cat([(after[name] - tensor).abs().flatten() for name, tensor in before.items()]).mean())
