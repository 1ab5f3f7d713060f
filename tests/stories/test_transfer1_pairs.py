"""A teacher shaped as Cosmos-Transfer1 (EDM, a control branch): what its pairs hold is what `generate` shows, bit by bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.cli import main as cli
from fewstep.data.controls import Edge
from fewstep.data.files import arrays, cache, video
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import EDM, Rng, guided, samplers
from fewstep.diffusion.sampling import student_times
from fewstep.diffusion.times import karras
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.families.cosmos.keys import original_names
from fewstep.networks.families.cosmos.models import MODELS, transfer1_7b

NUM, FRAMES, SIZE, TOKENS = 3, 9, 16, 6
SPEC = replace(
    transfer1_7b("edge"), latent_channels=2, num_heads=2, head_dim=12, num_layers=3, num_control_blocks=2, mlp_ratio=2.0,
    text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), rope_scale=(2.0, 1.0, 1.0), hint_channels=2,
)  # fmt: skip
SAMPLED = ("--steps", "3", "--guidance", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a codec, and the weights of a base and of its branch under the original names."""
    from diffusers import AutoencoderKLCosmos

    root = tmp_path_factory.mktemp("transfer1")
    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.1, -0.1], latents_std=[0.7, 1.3],
    ).save_pretrained(root / "codec" / "vae")  # fmt: skip
    network = SPEC.build()
    for weight in network.module.parameters():
        torch.nn.init.normal_(weight, std=0.5 * weight.shape[-1] ** -0.5)
    state = network.module.state_dict()
    names = original_names(state, "1")
    torch.save({names[name]: tensor.clone() for name, tensor in state.items() if name in names}, root / "model.pt")
    rng = np.random.default_rng(0)
    for n in range(NUM):
        frames = rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        video.write(root / "data" / "videos" / f"{n}.mp4", frames, 24.0, quality="lossless")
        video.write(root / "data" / "edge" / f"{n}.mp4", Edge()(frames), 24.0, quality="lossless")
        (root / "data" / "metas").mkdir(exist_ok=True)
        (root / "data" / "metas" / f"{n}.txt").write_text(f"clip {n}\n")
        arrays.write_pickle(root / "data" / "t5_xxl" / f"{n}.pickle", [rng.standard_normal((TOKENS, 8), dtype=np.float32)])
    return root


@pytest.fixture(autouse=True)
def is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "small", SPEC)  # type: ignore[arg-type]


def pairs(folder: Path, out: Path, *more: str) -> int:
    where = [str(folder / "model.pt"), str(folder / "data"), "--out", str(out), "--codec", str(folder / "codec")]
    settings = ["--control", "edge", "--max-tokens", str(TOKENS), "--quality", "lossless", *SAMPLED]
    return cli(["pairs", *where, *settings, *more])


def generate(folder: Path, out: Path, *more: str) -> None:
    rows = [
        {"embedding": str(folder / "data" / "t5_xxl" / f"{n}.pickle"), "name": str(n), "seed": n,
         "control_overrides": {"edge": {"input_control": str(folder / "data" / "edge" / f"{n}.mp4")}}}
        for n in range(NUM)
    ]  # fmt: skip
    out.mkdir(parents=True)
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    size = ["--num-frames", str(FRAMES), "--height", str(SIZE), "--width", str(SIZE), "--fps", "24", "--quality", "lossless"]
    where = ["--prompts", str(out / "rows.jsonl"), "--out", str(out), "--codec", str(folder / "codec"), "--save-noise"]
    assert cli(["generate", str(folder / "model.pt"), "--control", "edge", *where, *size, *SAMPLED, *more]) == 0


def same_clips(one: Path, other: Path) -> None:
    for n in range(NUM):
        assert torch.equal(*(arrays.read_one(folder / "noise" / f"{n}.pickle") for folder in (one, other)))
        frames = video.read(one / "videos" / f"{n}.mp4").frames
        np.testing.assert_array_equal(frames, video.read(other / f"{n}.mp4").frames, strict=True)


@torch.no_grad()
def test_a_clip_of_pairs_is_that_of_generate_by_the_published_sampler(folder: Path, tmp_path: Path) -> None:
    assert pairs(folder, tmp_path / "pairs", "--batch-size", "1") == 0
    generate(folder, tmp_path / "clips")
    same_clips(tmp_path / "pairs", tmp_path / "clips")
    assert pairs(folder, tmp_path / "together") == 0
    generate(folder, tmp_path / "batch", "--batch-size", "3")
    same_clips(tmp_path / "together", tmp_path / "batch")
    for n in range(NUM):  # a batch has the same noise and conditions; its sums differ in their order
        x0, again = (
            cache.read(tmp_path / f / "latents" / f"{n}.safetensors").tensors["latents"] for f in ("pairs", "together")
        )
        torch.testing.assert_close(x0, again, rtol=0, atol=1e-5)
    # RES 2ab from sigma 80 with a clean denoise, by hand
    network = open_model(folder / "model.pt", controls=["edge"]).network
    codec = open_codec(folder / "codec", scale=0.5)
    for n in range(NUM):
        edge = torch.from_numpy(video.read(folder / "data" / "edge" / f"{n}.mp4").frames).permute(3, 0, 1, 2)[None]
        text = arrays.read_one(folder / "data" / "t5_xxl" / f"{n}.pickle", "text").reshape(1, TOKENS, 8)
        cond = Condition(text=text, control={"edge": codec.encode(edge.float() / 127.5 - 1)}, fps=torch.tensor([24.0]))
        noise = Rng.of_samples([n]).normal((2, 3, 4, 4))
        teacher = guided(network, replace(cond, text=torch.zeros_like(text)), 2.0)
        x0 = samplers.res_2ab(teacher, 80 * noise, karras(4, 80.0, 0.002), cond)
        latents = cache.read(tmp_path / "pairs" / "latents" / f"{n}.safetensors").tensors["latents"]
        assert torch.equal(latents, x0[0])
    record = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
    assert (record["sampler"]["solver"], record["sampler"]["grid"], record["sampler"]["sigma_max"]) == ("res_2ab", "karras", 80)
    assert record["sampler"] == json.loads((tmp_path / "clips" / "0.json").read_text())["sampler"]


def test_control_latents_of_pairs_are_those_of_prepare_latents(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    assert pairs(folder, tmp_path / "pairs") == 0
    scaled = ["--codec", str(folder / "codec"), "--control", "edge", "--scale", "0.5"]
    assert cli(["prepare", "latents", str(tmp_path / "data"), *scaled]) == 0
    found: list[Tensor] = []
    for name in ("pairs", "data"):
        data = Folder(str(tmp_path / name), x0="latents", text=None, control=Edge()).open()
        found.append(data.batch(torch.arange(NUM)).cond.control["edge"])
    assert torch.equal(*found)


def test_a_student_that_starts_at_a_state_finds_it_in_the_time_of_its_teacher(folder: Path, tmp_path: Path) -> None:
    """A number of states is that of a student's times in sigma; flow times are refused by name."""
    assert pairs(folder, tmp_path / "pairs", "--path-times", "2", "--steps", "8") == 0
    times = cache.read(tmp_path / "pairs" / "path" / "0.safetensors").tensors["path_times"].tolist()
    assert times[0] == 80 and times == list(student_times(2, EDM(), 5.0))
    state = cache.read(tmp_path / "pairs" / "path" / "0.safetensors").tensors["path"]
    torch.testing.assert_close(state[0], 80 * arrays.read_one(tmp_path / "pairs" / "noise" / "0.pickle"))


def test_what_cannot_be_meant_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(out: str, *more: str) -> str:
        assert pairs(folder, tmp_path / out, *more) in (1, 2)
        return capsys.readouterr().err

    assert "are flow times, from 1 to 0, but the time of this teacher's path" in refused(
        "a", "--path-times", "1,0.8", "--steps", "8"
    )
    assert "--shift has no effect on this teacher, whose grid is karras" in refused("a", "--shift", "5")
    assert "'--batch-size': 0: the value should be greater than or equal to 1" in refused("a", "--batch-size", "0")
    assert not (tmp_path / "a").exists()
    assert pairs(folder, tmp_path / "out", "--num", "1") == 0
    for options, key in (
        (("--max-tokens", "8"), "max_tokens 6, not 8"),
        (("--mask-text",), "mask_text False, not True"),
        (("--steps", "4"), "sampler.num_steps 3, not 4"),
        (("--sampler", "euler"), "sampler.solver 'res_2ab', not 'euler'"),
        (("--precision", "bf16"), "precision 'fp32', not 'bf16'"),
        (("--seed", "1"), "seed 0, not 1"),
    ):
        assert key in refused("out", *options), key
    assert pairs(folder, tmp_path / "out", "--num", "2") == 0
