"""Distilling Cosmos-Predict2.5 and Transfer2.5 by their own commands: from clips and captions to a clip in four steps."""

import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.batch import Condition
from fewstep.data.files import video
from fewstep.diffusion import Rng
from fewstep.networks.encoders.codecs import open_codec, to_uint8
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.families.cosmos.models import transfer2_5_2b
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT2_5_2B
from fewstep.networks.weights.addresses import load_into, read

sys.path.insert(0, str(Path(__file__).parent))
import materials
from shell import IN_BOTH_FORMS, walk

SIZES: dict[str, Any] = {
    "latent_channels": 4, "num_heads": 2, "head_dim": 12, "num_layers": 4, "mlp_ratio": 2.0, "text_dim": 8,
    "adaln_lora_dim": 4, "max_size": [4, 8, 8], "text_projection_from": 48,
}  # fmt: skip
CONTROLLED = SIZES | {"image_context_dim": 8, "image_context_tokens": 2, "hint_channels": 8}
PLAIN = """
import sys

sys.modules["fewstep"] = sys.modules["torchvision"] = None  # importing either fails
import av
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
frames = np.stack([frame.to_ndarray(format="rgb24") for frame in av.open(sys.argv[2]).decode(video=0)])
pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
noise = torch.from_numpy(np.load("noise.npy"))
np.save("plain.npy", pipe("a red ball rolls", latents=noise, control=pixels, output_type="pt").frames.numpy())
"""


def prepare(folder: Path, spec: CosmosSpec, sizes: dict[str, Any], weights: str) -> None:
    """The files that the story begins with."""
    small = replace(spec, **sizes)
    place = folder / "checkpoints/nvidia" / weights
    place.parent.mkdir(parents=True)
    torch.save(materials.original_weights(small, "2"), place)
    described = {f.name: getattr(small, f.name) for f in fields(small) if getattr(small, f.name) != f.default}
    kind = "cosmos" if type(spec) is CosmosSpec else "cosmos_control"
    materials.settings(folder / "checkpoints/network.yaml", {"kind": kind, **described})
    materials.settings(
        folder / "small.yaml",
        {"networks": {"teacher": sizes}, "optim": {"warmup_iters": 0}, "critic_optim": {"warmup_iters": 0}},
    )
    materials.clips(folder / "datasets/dmd2", size=(32, 32))
    materials.qwen(folder / "checkpoints/pipeline")
    materials.wan_codec(folder / "checkpoints/pipeline")
    parts = {
        "vae": "AutoencoderKLWan",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "PreTrainedTokenizerFast",
    }
    materials.pipeline(folder / "checkpoints/pipeline", "Cosmos2_5_PredictBasePipeline", **parts)
    (folder / "inputs").mkdir()


def frames_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(video.read(path).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def by_hand(folder: Path, spec: CosmosSpec, cond: Condition) -> np.ndarray:
    """Four steps in TrigFlow from one noise, which returns between them: cosmos-predict2.5's student, uint8 T H W 3."""
    network = spec.build()
    load_into(network.module, read(f"{folder}/converted/model_ema_fp32.pt", network.module), "the converted student")
    noise = x = Rng.of_samples([0]).normal((4, 3, 4, 4)).double()
    times = [math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)]
    with torch.no_grad():
        for now, then in zip(times, [*times[1:], None], strict=True):
            flow = math.sin(now) / (math.sin(now) + math.cos(now))
            z = x / (math.sin(now) + math.cos(now))
            x0 = network(z.float(), torch.tensor([flow]), cond).x0.double()
            x = x0 if then is None else math.cos(then) * x0 + math.sin(then) * noise
        pixels = open_codec(folder / "checkpoints/pipeline").decode(x.float())
    return to_uint8(pixels, "the student")[0]


def same_clips(folder: Path, name: str, wanted: np.ndarray) -> None:
    """The clips of the converted file and of the export are the one computed by hand."""
    for place in ("outputs", "outputs/converted"):
        made = video.read(folder / place / f"{name}.mp4").frames
        np.testing.assert_allclose(made.astype(int), wanted.astype(int), atol=1)
    assert wanted.std() > 1


def text_of(folder: Path) -> torch.Tensor:
    return open_text_encoder(folder / "checkpoints/pipeline").encode(["a red ball rolls"])[0]


@IN_BOTH_FORMS
def test_predict25_is_distilled_into_four_steps(tmp_path: Path, real: bool) -> None:
    prepare(tmp_path, PREDICT2_5_2B, SIZES, "Cosmos-Predict2.5-2B/model.pt")
    spec = {"name": "ball", "prompt": "a red ball rolls", "inference_type": "image2world", "input_path": "first.png"}
    (tmp_path / "inputs/spec.json").write_text(json.dumps(spec))
    first = video.read(tmp_path / "datasets/dmd2/videos/0.mp4").frames[0]
    import cv2

    cv2.imwrite(str(tmp_path / "inputs/first.png"), first[:, :, ::-1])
    walk("predict25.sh", tmp_path, real=real)
    frames = open_codec(tmp_path / "checkpoints/pipeline").encode(frames_of(tmp_path / "datasets/dmd2/videos/0.mp4"))
    cond = Condition(text=text_of(tmp_path), frames=frames, frame_mask=torch.tensor([[1.0, 0.0, 0.0]]))
    same_clips(tmp_path, "ball", by_hand(tmp_path, replace(PREDICT2_5_2B, **SIZES), cond))


@pytest.mark.slow  # its road is that of Predict2.5 and of Transfer1, whose quick forms run always
@IN_BOTH_FORMS
@pytest.mark.parametrize("control", ["edge"])
def test_transfer25_is_distilled_into_four_steps(tmp_path: Path, control: str, real: bool) -> None:
    spec = transfer2_5_2b(control)
    prepare(tmp_path, spec, CONTROLLED, f"Cosmos-Transfer2.5-2B/{control}.pt")
    settings = {"name": "ball", "prompt": "a red ball rolls", control: {"control_path": f"../datasets/dmd2/{control}/0.mp4"}}
    (tmp_path / "inputs/spec.json").write_text(json.dumps(settings))
    (tmp_path / "plain.py").write_text(PLAIN)
    np.save(tmp_path / "noise.npy", Rng.of_samples([0]).normal((4, 3, 4, 4)).numpy())
    walk("transfer25.sh", tmp_path, real=real, TYPE=control)
    shown = open_codec(tmp_path / "checkpoints/pipeline").encode(frames_of(tmp_path / f"datasets/dmd2/{control}/0.mp4"))
    cond = Condition(text=text_of(tmp_path), control={control: shown})
    wanted = by_hand(tmp_path, replace(spec, **CONTROLLED), cond)
    same_clips(tmp_path, "ball", wanted)
    plain = np.load(tmp_path / "plain.npy")[0]  # of diffusers, without this package and without torchvision
    np.testing.assert_allclose(255 * np.moveaxis(plain, 1 if plain.shape[1] == 3 else 0, -1), wanted, atol=1.5)
