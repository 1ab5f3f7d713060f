"""Post-training Cosmos-Predict1 by its own commands: all weights and adapters, then videos from an image and nine frames."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.data.files import arrays, video
from fewstep.diffusion import Rng, guided, samplers
from fewstep.diffusion.precondition import with_noise
from fewstep.diffusion.times import karras
from fewstep.networks.encoders.codecs import open_codec, to_uint8
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.families.cosmos.predict import PREDICT1_7B
from fewstep.networks.lora import merged
from fewstep.networks.weights.addresses import load_into, read

sys.path.insert(0, str(Path(__file__).parent))
import materials
from shell import IN_BOTH_FORMS, walk

SIZES: dict[str, Any] = {
    "latent_channels": 2, "num_heads": 2, "head_dim": 12, "num_layers": 2, "mlp_ratio": 2.0, "text_dim": 8,
    "adaln_lora_dim": 4, "max_size": [4, 8, 8],
}  # fmt: skip
SPEC = replace(PREDICT1_7B, **SIZES)
SHOT = "--num_video_frames 17 --height 32 --width 32 --num_steps 3 --quality lossless"
NAME = "Cosmos-Predict1-7B-Video2World"


def prepare(folder: Path) -> None:
    """The files that the story begins with."""
    described = {f.name: getattr(SPEC, f.name) for f in fields(SPEC) if getattr(SPEC, f.name) != f.default}
    for place in (NAME, f"{NAME}_post-trained", f"{NAME}_post-trained-lora"):
        materials.settings(folder / "checkpoints" / place / "network.yaml", {"kind": "cosmos", **described})
    torch.save(materials.original_weights(SPEC, "1"), folder / "checkpoints" / NAME / "model.pt")
    trained: dict[str, Any] = {"trainer": {"max_iter": 2, "log_every": 1}, "optim": {"lr": 1e-2, "warmup_iters": 0}}
    trained |= {"checkpoint": {"save_iter": 1}}
    materials.settings(folder / "full.yaml", {"networks": {"student": {"network": SIZES}}, **trained})
    materials.settings(folder / "lora.yaml", {"networks": {"teacher": SIZES}, **trained})
    materials.clips(folder / "datasets/cosmos_nemo_assets", frames=21, size=(32, 48))
    for caption in (folder / "datasets/cosmos_nemo_assets/metas").iterdir():
        caption.unlink()
    (folder / "assets/diffusion").mkdir(parents=True)
    picture = np.random.default_rng(5).integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    cv2.imwrite(str(folder / "assets/diffusion/video2world_input0.png"), picture)
    materials.t5(folder / "google-t5/t5-11b")
    materials.cosmos_codec(folder / "checkpoints/tokenizer", ratio=8)


@IN_BOTH_FORMS
def test_predict1_is_post_trained_and_makes_videos(tmp_path: Path, real: bool) -> None:
    prepare(tmp_path)
    walk("predict1.sh", tmp_path, real=real, SHOT=SHOT)
    runs, models = tmp_path / "checkpoints/posttraining/diffusion_video2world", tmp_path / "checkpoints"
    full, adapters = (runs / f"video2world_7b_{kind}example_cosmos_nemo_assets" for kind in ("", "lora_"))
    base = read(str(models / NAME / "model.pt"))

    files = {path.name for path in (full / "checkpoints").glob("*.pt")}
    assert files == {f"iter_00000000{n}_{kind}_model.pt" for n in (1, 2) for kind in ("reg", "ema")}
    tuned = read(str(models / f"{NAME}_post-trained/model.pt"))
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in read(f"{full}:student.ema").items())
    assert sum(not torch.equal(tuned[name], tensor) for name, tensor in base.items()) > 0.9 * len(base)

    low_rank = read(f"{adapters}:student.ema")
    assert len(low_rank) == 2 * 2 * 2 * 2  # A and B of q and v, in self- and cross-attention of two blocks
    found = read(str(models / f"{NAME}_post-trained-lora/model.pt"))
    for name, tensor in merged(base, low_rank).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    changed = {name for name, tensor in base.items() if not torch.equal(found[name], tensor)}
    assert changed == {f"{name.removesuffix('.lora_A.weight')}.weight" for name in low_rank if "lora_A" in name}

    picture = cv2.imread(str(tmp_path / "assets/diffusion/video2world_input0.png"), cv2.IMREAD_COLOR)
    assert picture is not None
    nine = video.read(tmp_path / "datasets/cosmos_nemo_assets/videos/1.mp4", 0, 9, size=(32, 32)).frames
    check(tmp_path, tuned, picture[None, :, :, ::-1], 1, "diffusion-video2world-7b-post-trained")
    check(tmp_path, tuned, nine, 2, "nine-frames")
    check(tmp_path, found, picture[None, :, :, ::-1], 1, "diffusion-video2world-7b-post-trained-lora")
    outputs = tmp_path / "outputs"
    two, one = (video.read(outputs / f"{name}.mp4").frames for name in ("diffusion-video2world-7b-post-trained-lora", "alone"))
    assert np.array_equal(two, one)
    noise = arrays.read_one(outputs / "noise/nine-frames.pickle")
    assert torch.equal(noise, Rng.of_samples([0]).normal((2, 3, 4, 4))[0])


def check(folder: Path, weights: dict[str, Tensor], frames: np.ndarray, num: int, name: str) -> None:
    """The clip is that of the published sampler with guidance 7, from `num` latent frames of `frames` and a little noise."""
    network: Any = SPEC.build()
    load_into(network.module, weights, name)
    codec, encoder = open_codec(folder / "checkpoints/tokenizer", scale=0.5), open_text_encoder(folder / "google-t5/t5-11b")
    (text, empty), _ = encoder.encode(["a red ball rolls", ""])
    pixels = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    shown = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, 17 - len(frames), -1, -1)], 2)
    latents, mask = codec.encode(shown), torch.tensor([[float(n < num) for n in range(3)]])
    fixed = torch.randn((1, 2, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    noisy = with_noise(latents, torch.tensor([0.001]).double(), fixed, 0.5)
    cond = Condition(text=text[None], frames=latents, noisy_frames=noisy, frame_mask=mask, fps=torch.tensor([24.0]))
    noise = Rng.of_samples([0]).normal((2, 3, 4, 4))
    with torch.no_grad():
        x0 = samplers.res_2ab(guided(network, replace(cond, text=empty[None]), 8.0), 80 * noise, karras(4, 80.0, 0.002), cond)
        wanted = to_uint8(codec.decode(x0), name)[0]
    made = video.read(folder / "outputs" / f"{name}.mp4").frames
    np.testing.assert_allclose(made.astype(int), wanted.astype(int), atol=1)
    assert made.std() > 1
    sampler = json.loads((folder / "outputs" / f"{name}.json").read_text())["sampler"]
    assert (sampler["guidance"], sampler["solver"], sampler["num_steps"]) == (8.0, "res_2ab", 3)
