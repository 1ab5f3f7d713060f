"""`fewstep generate`: what it makes equals the pieces by hand; batches change nothing, and it goes on where it was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import TOY
from fewstep.batch import Condition
from fewstep.cli import main as cli
from fewstep.config import ConfigError
from fewstep.data.files import arrays, video
from fewstep.diffusion import Rng, StudentSampler, TeacherSampler, guided, samplers, times
from fewstep.inference.command import read_command
from fewstep.inference.fit import sampler_of
from fewstep.inference.model import Model, open_model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder

sys.path.insert(0, str(Path(__file__).parent))
from generating import NET, SIZE, as_frames, made, write_parts, write_picture


@torch.no_grad()
def test_a_student_takes_its_own_steps(student: Path, tmp_path: Path) -> None:
    assert made(tmp_path, str(student), "--prompt", "a red ball", "--seed", "3", "--save-noise") == 1
    model, rng = open_model(student), Rng.of_samples([3])
    text, mask = open_text_encoder(student).encode(["a red ball"])
    cond = Condition(text=text, text_mask=mask, fps=torch.tensor([8.0]))
    assert isinstance(model.sampler, StudentSampler)
    noise = rng.normal((2, 3, 4, 4))
    wanted = as_frames(student, model.sampler(model.network, noise, cond, rng))
    found = video.read(tmp_path / "output.mp4")
    np.testing.assert_array_equal(found.frames, wanted)
    assert found.fps == 8
    assert (tmp_path / "output.txt").read_text() == "a red ball\n"
    torch.testing.assert_close(arrays.read_one(tmp_path / "noise" / "output.pickle"), noise[0])


@torch.no_grad()
def test_a_teacher_is_solved_with_guidance_and_led_by_first_frames(teacher: Path, clip: Path, tmp_path: Path) -> None:
    asked = ["--prompt", "a ball", "--negative-prompt", "red", "--guidance", "3", "--num-steps", "4", "--sampler", "heun"]
    made(tmp_path, str(teacher), *asked, *SIZE, "--shift", "2", "--input", str(clip), "--num-input-frames", "5")
    network, codec = open_model(teacher).network, open_codec(teacher)
    texts, masks = open_text_encoder(teacher).encode(["a ball", "red"])
    pixels = torch.from_numpy(video.read(clip, 0, 5).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    frames = codec.encode(torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, 4, -1, -1)], 2))
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    cond = Condition(text=texts[:1], text_mask=masks[:1], frames=frames, frame_mask=mask, fps=torch.tensor([8.0]))
    negative = replace(cond, text=texts[1:], text_mask=masks[1:])
    noise = Rng.of_samples([0]).normal((2, 3, 4, 4))
    x0 = samplers.heun(guided(network, negative, 3.0), noise, times.shifted(4, 2.0), cond)
    np.testing.assert_array_equal(video.read(tmp_path / "output.mp4").frames, as_frames(teacher, x0))
    torch.testing.assert_close(x0[:, :, :2], frames[:, :, :2], rtol=0, atol=1e-6)


def test_batches_of_any_size_make_the_same_clips(student: Path, teacher: Path, clip: Path, tmp_path: Path) -> None:
    """Clips whose conditions have other shapes go through by themselves."""
    text, _ = open_text_encoder(student).encode(["a red ball"])
    arrays.write_pickle(tmp_path / "e.pickle", [text[0].numpy()])
    rows: list[dict[str, Any]] = [
        {"prompt": "a ball"},
        {"prompt": "rolls", "visual_input": str(clip)},
        {"prompt": "a red ball"},
    ]
    rows += [{"embedding": str(tmp_path / "e.pickle")}, {"prompt": "red"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = ["--prompts", str(tmp_path / "p.jsonl")]
    for model in (student, teacher):
        more = [] if model == student else [*SIZE, "--guidance", "3", "--num-steps", "3"]
        for size in ("1", "2", "8"):
            out = tmp_path / f"{model.name}_{size}"
            assert made(out, str(model), *prompts, *more, "--batch-size", size, "--save-noise") == 5
            for i in range(5):
                one, many = (tmp_path / f"{model.name}_{num}" / f"p_{i:04d}.mp4" for num in ("1", size))
                np.testing.assert_array_equal(video.read(one).frames, video.read(many).frames)
    assert made(tmp_path / f"{student.name}_1", str(student), *prompts, "--batch-size", "2") == 0  # they are there already
    with pytest.raises(ConfigError, match="--batch-size 0: at least 1"):
        made(tmp_path, str(student), "--prompt", "a", "--batch-size", "0")


@torch.no_grad()
def test_the_low_noise_expert_may_have_a_guidance_of_its_own() -> None:
    from fewstep.networks.families.wan.experts import ExpertsSpec
    from fewstep.networks.families.wan.network import WanSpec

    torch.manual_seed(0)
    wan = WanSpec(
        num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8, text_tokens=4, freq_dim=8, latent_channels=4,
        max_positions=16,
    )  # fmt: skip
    spec = ExpertsSpec(wan, wan)
    network, draw = spec.build(), torch.Generator().manual_seed(1)
    noise, text, other = (torch.randn(1, *shape, generator=draw) for shape in ((4, 2, 4, 4), (4, 8), (4, 8)))
    cond, negative = Condition(text=text), Condition(text=other)
    asked = read_command(
        ["m", "--prompt", "a", "--guidance", "4", "--guidance_scale_2", "3", "--num-steps", "4", "--sampler", "euler"]
    )
    model = Model(network, spec, replace(TeacherSampler.for_path(network.path), boundary=network.boundary))
    made = sampler_of(asked, model, print)(network, noise, cond, Rng.of_samples([0]), negative)
    wanted = samplers.euler(guided(network, negative, 4.0, below=(network.boundary, 3.0)), noise, times.shifted(4, 5.0), cond)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match="--guidance-low: this model is no pair of experts"):
        sampler_of(asked, Model(network.low, wan, TeacherSampler()), print)


@torch.no_grad()
def test_a_longer_clip_is_made_chunk_after_chunk(student: Path, tmp_path: Path) -> None:
    told: list[str] = []
    asked = [str(student), "--prompt", "a red ball", "--seed", "3", "--num-frames", "20", "--overlap", "5"]
    made(tmp_path, *asked, told=told)
    assert told[0] == "20 frames in 4 chunks of 9, 5 of them from the one before"
    assert "trained on" not in "".join(told)
    model, codec = open_model(student), open_codec(student)
    text, mask = open_text_encoder(student).encode(["a red ball"])
    assert isinstance(model.sampler, StudentSampler)
    clips: list[Tensor] = []
    for chunk in range(4):
        cond = Condition(text=text, text_mask=mask, fps=torch.tensor([8.0]))
        if chunk:
            begins = clips[-1][:, :, -5:].clamp(-1, 1)
            frames = codec.encode(torch.cat([begins, begins[:, :, -1:].expand(-1, -1, 4, -1, -1)], 2))
            cond = replace(cond, frames=frames, frame_mask=torch.tensor([[1.0, 1.0, 0.0]]))
        rng = Rng(0, chunk, [3])
        clips.append(codec.decode(model.sampler(model.network, rng.normal((2, 3, 4, 4)), cond, rng)))
    whole = torch.cat([clips[0], *(clip[:, :, 5:] for clip in clips[1:])], 2)[:, :, :20]
    wanted = ((whole.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]
    np.testing.assert_array_equal(video.read(tmp_path / "output.mp4").frames, wanted)
    with pytest.raises(ValueError, match="--overlap 3: this codec takes 1"):
        made(tmp_path, *asked[:-1], "3", "--name", "b")
    with pytest.raises(ValueError, match="made in several chunks has no one noise"):
        made(tmp_path, *asked, "--save-noise", "--name", "b")


def test_a_killed_command_goes_on_and_another_one_does_not_mix_in(student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt")]
    assert made(tmp_path / "out", *asked) == 2
    kept = (tmp_path / "out" / "p_0000.mp4").stat().st_mtime_ns
    (tmp_path / "out" / "p_0001.mp4").unlink()
    assert made(tmp_path / "out", *asked) == 1
    assert made(tmp_path / "out", *asked) == 0
    assert (tmp_path / "out" / "p_0000.mp4").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"p_0000: is there and was made with clip\.seed 0 and not 1"):
        made(tmp_path / "out", *asked, "--seed", "1")
    assert not list((tmp_path / "out").glob(".*"))


def test_clips_of_other_weights_or_of_another_input_are_not_taken_for_those_asked_for(
    student: Path, clip: Path, tmp_path: Path
) -> None:
    """A student that was exported anew has the address of the one before, an edited video the name of the one before."""
    again = Path(shutil.copytree(student, tmp_path / "again"))
    source = Path(shutil.copy(clip, tmp_path / "source.mp4"))
    asked = [str(again), "--prompt", "a ball", "--input", str(source), "--num-input-frames", "1"]
    told: list[str] = []
    assert made(tmp_path / "out", *asked) == 1
    assert made(tmp_path / "out", *asked, told=told) == 0
    assert "nothing to do" in told[-1]
    for changed, name in ((next(again.rglob("*.safetensors")), again), (source, source)):
        before = changed.stat().st_mtime_ns
        os.utime(changed, ns=(1, 1))
        with pytest.raises(ValueError, match=f"output: is there and was made with another content of {name}"):
            made(tmp_path / "out", *asked)
        os.utime(changed, ns=(1, before))


def test_an_embedding_stands_for_a_prompt(student: Path, tmp_path: Path) -> None:
    text, _ = open_text_encoder(student).encode(["a red ball"])
    arrays.write_pickle(tmp_path / "e.pickle", [text[0].numpy()])
    made(tmp_path / "a", str(student), "--embedding", str(tmp_path / "e.pickle"))
    made(tmp_path / "b", str(student), "--prompt", "a red ball")
    first, second = (video.read(tmp_path / name / "output.mp4").frames for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)


@torch.no_grad()
def test_an_edm_teacher_starts_from_a_noised_video(tmp_path: Path, clip: Path) -> None:
    """x = x0 + sigma noise at --sigma-max, as Transfer1 begins; at its own sigma the video plays no part."""
    folder = tmp_path / "teacher"
    write_parts(folder)
    module: Any = NET.build().module
    module.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CosmosVideoToWorldPipeline"}))
    asked = [str(folder), "--prompt", "a ball", *SIZE, "--num-steps", "2", "--guidance", "1"]
    started = [*asked, "--input", str(clip), "--num-input-frames", "0"]
    told: list[str] = []
    made(tmp_path / "out", *started, "--sigma-max", "3", told=told)
    assert told[0] == "--sigma-max 3: clips start from their --input with noise of this sigma"
    network, codec = open_model(folder).network, open_codec(folder, scale=0.5)
    text, mask = open_text_encoder(folder).encode(["a ball"])
    cond = Condition(text=text, text_mask=mask, fps=torch.tensor([8.0]))
    pixels = torch.from_numpy(video.read(clip, 0, 9).frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    noise = Rng.of_samples([0]).normal((2, 3, 4, 4))
    grid = times.karras(3, 3.0, 0.002)
    x0 = samplers.res_2ab(network, (codec.encode(pixels) + 3.0 * noise).float(), grid, cond)
    wanted = ((codec.decode(x0).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]
    found = video.read(tmp_path / "out" / "output.mp4").frames
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1  # the sum is taken in another precision
    made(tmp_path / "a", *started)
    made(tmp_path / "b", *asked)
    first, second = (video.read(tmp_path / name / "output.mp4").frames for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)


def test_the_example_in_python_makes_what_the_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text()
    block = re.search(r"## From Python\n.*?```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert names["num_new"] == 2
    size = "--num-frames 17 --height 32 --width 32 --fps 8 --num-steps 4 --sampler euler --guidance 2 --seed 4"
    assert (
        cli(
            [
                "generate",
                str(TOY),
                "--prompt",
                "a red sphere rolls right",
                *size.split(),
                "--quality",
                "lossless",
                "--out",
                "command",
            ]
        )
        == 0
    )
    assert (tmp_path / "outputs" / "ball_4.mp4").read_bytes() == (tmp_path / "command" / "output.mp4").read_bytes()


def test_a_picture_begins_a_clip_and_a_clip_of_one_frame_is_a_picture(student: Path, tmp_path: Path) -> None:
    import cv2

    assert (
        cli(["generate", str(student), "--prompt", "a ball", "--input", str(write_picture(tmp_path)), "--out", str(tmp_path)])
        == 0
    )
    assert video.probe(tmp_path / "output.mp4").num_frames == 9
    assert (
        cli(["generate", str(student), "--prompt", "a ball", "--num-frames", "1", "--out", str(tmp_path), "--name", "one"]) == 0
    )
    picture = cv2.imread(str(tmp_path / "one.png"))
    assert picture is not None
    assert picture.shape == (16, 16, 3)


@torch.no_grad()
def test_wan_i2v_reads_its_picture_beside_its_latents(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    from fewstep.networks.families.wan.network import WanSpec, start_from

    spec = WanSpec(
        latent_channels=16, beside_channels=20, num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8, freq_dim=8,
        max_positions=16, text_tokens=4,
    )  # fmt: skip
    folder, wan = tmp_path / "wan", spec.build()
    write_parts(folder)
    torch.manual_seed(0)
    sizes = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    AutoencoderKLWan(**sizes).save_pretrained(folder / "vae")
    module: Any = wan.module
    module.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    picture, asked = write_picture(tmp_path), ["--num-steps", "2", "--sampler", "euler", "--shift", "1", "--prompt", "a ball"]
    made(tmp_path / "out", str(folder), *asked, *SIZE, "--input", str(picture))
    text, mask = open_text_encoder(folder).encode(["a ball"])
    codec, network = open_codec(folder), open_model(folder).network
    from PIL import Image

    sized = np.array(Image.open(picture).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    shown = torch.from_numpy(sized).permute(2, 0, 1)
    pixels = torch.cat([shown[None, :, None].float() / 127.5 - 1, torch.zeros(1, 3, 8, 16, 16)], 2)
    cond = Condition(text=text, text_mask=mask, beside=start_from(codec.encode(pixels)), fps=torch.tensor([8.0]))
    x0 = samplers.euler(network, Rng.of_samples([0]).normal((16, 3, 2, 2)), times.shifted(2), cond)
    np.testing.assert_array_equal(video.read(tmp_path / "out" / "output.mp4").frames, as_frames(folder, x0))
