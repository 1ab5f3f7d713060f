"""Which network an address names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.inference.model import know_every_kind, open_model, spec_of


def folder(tmp_path: Path, pipeline: str, network: str, part: str = "transformer", index: Any = None, **config: Any) -> str:
    (tmp_path / part).mkdir(exist_ok=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **(index or {})}))
    (tmp_path / part / "config.json").write_text(json.dumps({"_class_name": network, **config}))
    return str(tmp_path)


def test_a_pipelines_folder_names_its_network_and_how_it_is_asked(tmp_path: Path) -> None:
    know_every_kind()
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


def test_a_unet_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    know_every_kind()
    assert spec_of(folder(tmp_path, "StableDiffusionXLPipeline", "UNet2DConditionModel", "unet")).kind == "unet"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its denoiser is a SanaTransformer2DModel, for which there is no adapter"):
        spec_of(folder(tmp_path, "SanaPipeline", "SanaTransformer2DModel"))
    with pytest.raises(ValueError, match="no model at"):
        open_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no transformer/, no unet/ and no config\.json"):
        open_model(tmp_path / "empty")
