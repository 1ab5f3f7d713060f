"""A pipeline's folder is opened as the network it holds, with what only the pipeline tells."""

import json
from pathlib import Path
from typing import Any

from fewstep.inference.model import spec_of
from fewstep.networks.families.cogvideox import CogVideoXSpec
from fewstep.networks.families.dit import DitSpec
from fewstep.networks.families.flux import FluxSpec
from fewstep.networks.families.unet import UnetSpec
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.families.wan.network import WanSpec


def folder(place: Path, denoiser: str, index: dict[str, Any], scheduler: dict[str, Any]) -> str:
    part = place / ("unet" if denoiser.startswith("UNet") else "transformer")
    for path, told in ((part, {"_class_name": denoiser}), (place / "scheduler", scheduler)):
        path.mkdir(parents=True)
        (path / ("scheduler_config.json" if path.name == "scheduler" else "config.json")).write_text(json.dumps(told))
    (place / "model_index.json").write_text(json.dumps(index))
    return str(place)


def test_each_family_is_known_by_its_class(tmp_path: Path) -> None:
    wan = folder(tmp_path / "a", "WanTransformer3DModel", {"_class_name": "WanPipeline"}, {})
    assert spec_of(wan) == WanSpec(pretrained=wan)
    a14b = folder(tmp_path / "b", "WanTransformer3DModel", {"_class_name": "WanPipeline", "boundary_ratio": 0.9}, {})
    low = WanSpec(pretrained=a14b, subfolder="transformer_2")
    assert spec_of(a14b) == ExpertsSpec(WanSpec(pretrained=a14b), low, 0.9)
    cog = folder(tmp_path / "c", "CogVideoXTransformer3DModel", {}, {"snr_shift_scale": 1.0})
    assert spec_of(cog) == CogVideoXSpec(pretrained=cog, snr_shift=1.0)
    unet = folder(tmp_path / "d", "UNet2DConditionModel", {}, {"prediction_type": "v_prediction"})
    assert spec_of(unet) == UnetSpec(pretrained=unet, predicts="v", pooled_dim=None)
    flux = folder(tmp_path / "e", "FluxTransformer2DModel", {}, {})
    assert spec_of(flux) == FluxSpec(pretrained=flux)
    dit = folder(tmp_path / "f", "DiTTransformer2DModel", {}, {})
    assert spec_of(dit) == DitSpec(pretrained=dit)
