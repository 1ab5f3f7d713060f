"""Which network an address names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, RectifiedFlow, TeacherSampler
from fewstep.inference.model import open_model, spec_of, teacher_sampler
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.keys import original_names
from fewstep.networks.families.cosmos.models import MODELS, transfer1_7b


def folder(tmp_path: Path, pipeline: str, network: str, part: str = "transformer", index: Any = None, **config: Any) -> str:
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **(index or {})}))
    (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": network, **config}))
    return str(tmp_path)


def test_a_pipelines_folder_names_its_network_and_how_it_is_asked(tmp_path: Path) -> None:
    cosmos = "CosmosTransformer3DModel"
    first = spec_of(folder(tmp_path, "CosmosVideoToWorldPipeline", cosmos))
    assert (first.family, first.sigma_data, first.use_fps, first.clean_time) == ("edm", 0.5, True, None)
    second = spec_of(folder(tmp_path, "Cosmos2VideoToWorldPipeline", cosmos))
    assert (second.family, second.use_fps) == ("flow", True)
    newest = spec_of(folder(tmp_path, "Cosmos2_5_PredictBasePipeline", cosmos))
    assert (newest.family, newest.use_fps, newest.pretrained) == ("flow", False, str(tmp_path))
    one = spec_of(folder(tmp_path, "WanPipeline", "WanTransformer3DModel"))
    assert one.kind == "wan"
    two = spec_of(folder(tmp_path, "WanPipeline", "WanTransformer3DModel", index={"boundary_ratio": 0.875}))
    assert (two.kind, two.low.subfolder, two.boundary) == ("experts", "transformer_2", 0.875)
    for network, kind in (("CogVideoXTransformer3DModel", "cogvideox"), ("FluxTransformer2DModel", "flux")):
        assert spec_of(folder(tmp_path, "P", network)).kind == kind


def test_a_teacher_is_sampled_as_its_pipelines_scheduler_says(tmp_path: Path) -> None:
    def sampler(path: Any = None, **scheduler: Any) -> TeacherSampler:
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        return teacher_sampler(MixtureSpec(path=path or RectifiedFlow()).build(), str(tmp_path))  # type: ignore[arg-type]

    euler, unipc = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
    published = TeacherSampler.for_path(RectifiedFlow())
    assert sampler(_class_name=unipc, flow_shift=3.0) == replace(published, shift=3.0)
    assert sampler(_class_name=euler, shift=3.0) == replace(published, solver="euler", shift=3.0)
    flux = sampler(_class_name=euler, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert flux == replace(published, solver="euler", shift=3.1582)
    assert sampler(_class_name=unipc, use_karras_sigmas=True, sigma_max=200.0, flow_shift=1.0) == published  # Predict2.5
    predict2 = sampler(_class_name=euler, use_karras_sigmas=True, sigma_max=80.0, shift=1.0)
    assert predict2 == TeacherSampler("res_2ab", grid="karras")
    assert sampler(EDM(), _class_name="EDMEulerScheduler", sigma_max=70.0) == TeacherSampler(
        "res_2ab", grid="karras", sigma_max=70.0
    )
    assert sampler(VP(), _class_name="DDIMScheduler") == TeacherSampler.for_path(VP())
    assert open_model(fewstep.TOY).sampler == replace(published, shift=1.0)
    assert teacher_sampler(MixtureSpec().build(), None) == published  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["predict2_2b", "predict2_14b", "predict2_5_2b", "predict2_5_14b", "predict1_7b"])
def test_a_published_network_alone_in_its_folder_is_asked_as_it_was_taught(name: str, tmp_path: Path) -> None:
    """As `fewstep convert` writes it: no pipeline beside it says that Predict2 reads the rate of frames, and 2.5 does not."""
    with torch.device("meta"):
        module: Any = MODELS[name].build().module
    module.save_config(tmp_path)
    found = spec_of(str(tmp_path))
    wanted = MODELS[name]
    assert (found.family, found.sigma_data, found.use_fps, found.clean_time) == (
        wanted.family, wanted.sigma_data, wanted.use_fps, wanted.clean_time,
    )  # fmt: skip
    assert found.pretrained == str(tmp_path)


def test_a_unet_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    assert spec_of(folder(tmp_path, "StableDiffusionXLPipeline", "UNet2DConditionModel", "unet")).kind == "unet"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its denoiser is a SanaTransformer2DModel, for which there is no adapter"):
        spec_of(folder(tmp_path, "SanaPipeline", "SanaTransformer2DModel"))
    with pytest.raises(ValueError, match="no model at"):
        open_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no transformer/, no unet/ and no config\.json"):
        open_model(tmp_path / "empty")


SIZES: dict[str, Any] = {
    "latent_channels": 4, "num_heads": 2, "head_dim": 16, "num_layers": 4, "mlp_ratio": 2, "text_dim": 16, "adaln_lora_dim": 4,
    "max_size": (8, 16, 16), "num_control_blocks": 2, "hint_channels": 8,
}  # fmt: skip


def random(network: Any) -> Any:
    torch.manual_seed(0)
    for weight in network.module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return network


def same_answer(network: Any, other: Any, control: str, t: float) -> None:
    draw = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(1, 4, 3, 8, 8, generator=draw) for _ in range(2))
    cond = Condition(text=torch.randn(1, 5, 16, generator=draw), control={control: hint}, fps=torch.tensor([24.0]))
    at = torch.tensor([t], dtype=torch.float64)
    torch.testing.assert_close(other(x, at, cond).velocity, network(x, at, cond).velocity, rtol=0, atol=1e-5)


def test_a_pipeline_of_transfer2_5_is_led_by_the_control_that_is_asked_for(tmp_path: Path) -> None:
    network = random(CosmosControlSpec(**SIZES, controls=("depth",)).build())
    network.base.save_pretrained(tmp_path / "transformer")
    network.module.branches["depth"].save_pretrained(tmp_path / "controlnet")
    index = {"_class_name": "Cosmos2_5_TransferPipeline", "controlnet": ["diffusers", "CosmosControlNetModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = open_model(tmp_path, controls=["depth"])
    assert model.network.controls == ("depth",)  # type: ignore[attr-defined]
    same_answer(network, model.network, "depth", 0.7)
    (tmp_path / "controlnet").rename(tmp_path / "controlnet_depth")  # as convert names several
    same_answer(network, open_model(tmp_path).network, "depth", 0.7)


def test_a_branch_that_the_index_does_not_name_comes_along_when_it_is_asked_for(tmp_path: Path) -> None:
    network = random(CosmosControlSpec(**SIZES, controls=("edge",)).build())
    network.module.base.save_pretrained(tmp_path / "transformer")
    network.module.branches["edge"].save_pretrained(tmp_path / "controlnet_edge")
    index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", "CosmosTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert getattr(open_model(tmp_path).network, "controls", ()) == ()
    same_answer(network, open_model(tmp_path, controls=["edge"]).network, "edge", 0.6)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"controlnet_edge": ["diffusers", "CosmosControlNetModel"]}))
    same_answer(network, open_model(tmp_path).network, "edge", 0.6)


@pytest.mark.parametrize("together", [False, True], ids=["base and control", "one file"])
def test_original_weights_are_a_teacher(together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(
        transfer1_7b("edge"), **{**SIZES, "num_control_blocks": 3, "num_heads": 2, "head_dim": 12}, rope_scale=(2.0, 1.0, 1.0)
    )
    monkeypatch.setitem(MODELS, "small", spec)  # type: ignore[arg-type]
    network = random(replace(spec, controls=("seg",)).build())
    state = network.module.state_dict()
    names = original_names(state, "1")
    file = {names[name]: tensor.clone() for name, tensor in state.items() if name in names}
    base = {name: tensor for name, tensor in file.items() if name.startswith("base_model.")}
    torch.save(file if together else base, tmp_path / "a.pt")
    torch.save({name: tensor for name, tensor in file.items() if name not in base}, tmp_path / "b.pt")
    address = str(tmp_path / "a.pt") + ("" if together else f"+{tmp_path / 'b.pt'}")
    model = open_model(address, controls=["seg"])
    assert (model.spec.controls, model.sampler, model.folder) == (("seg",), TeacherSampler.for_path(EDM()), None)
    same_answer(network, model.network, "seg", 5.0)
    assert open_model(address, controls=["seg"], network="small").spec == model.spec
    with pytest.raises(ValueError, match="the nearest is transfer1_7b"):
        open_model(address, controls=["seg"], network="transfer1_7b")
    with pytest.raises(ValueError, match="--network nothing: is none of predict1_7b"):
        open_model(address, network="nothing")
    with pytest.raises(ValueError, match=r"--network small: .* says itself what it is"):
        open_model(folder(tmp_path, "WanPipeline", "WanTransformer3DModel"), network="small")
