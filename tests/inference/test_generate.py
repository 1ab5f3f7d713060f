"""`fewstep generate`: what it makes equals the pieces by hand; it divides, resumes, refuses and warns."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import socket
import subprocess
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
from fewstep.config import ConfigError, dump
from fewstep.data.files import arrays, cache, video
from fewstep.diffusion import Rng, StudentSampler, TeacherSampler, guided, samplers, times
from fewstep.inference.command import read_command
from fewstep.inference.fit import sampler_of
from fewstep.inference.generate import generate
from fewstep.inference.model import Model, open_model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.encoders.words import WordsConfig, WordsEncoder, WordsModel
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec

NET = CosmosSpec(
    latent_channels=2, num_heads=2, head_dim=12, num_layers=2, mlp_ratio=2.0, text_dim=8, adaln_lora_dim=4,
    max_size=(4, 8, 8), rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)  # fmt: skip
TIMES = (1.0, 0.75)
SIZE = ["--num-frames", "9", "--height", "16", "--width", "16", "--fps", "8"]
FIRST = {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0, "latent_shape": [2, 3, 4, 4]}


def write_parts(folder: Path) -> None:
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0],
    ).save_pretrained(folder / "vae")  # fmt: skip
    words = WordsConfig(("a", "red", "ball", "rolls"), dim=8, num_layers=1, num_heads=2, max_tokens=6)
    WordsEncoder(WordsModel(words).eval()).save(folder / "text_encoder")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_parts(folder)
    module: Any = NET.build().module
    module.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos2_5_PredictBasePipeline"}))
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `fewstep export` writes it."""
    folder = tmp_path_factory.mktemp("student")
    write_parts(folder)
    module: Any = NET.build().module
    module.save_pretrained(folder / "transformer")
    told = {"times": TIMES, "renoise": "fresh", "path": {"kind": "rectified_flow"}, "envelope": FIRST}
    told["network"] = {"kind": "cosmos", **dump(NET)}
    (folder / "student.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (13, 16, 16, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    video.write(path, frames, 8.0, quality="lossless")
    return path


def made(out: Path, *arguments: str, told: list[str] | None = None, rank: int = 0, size: int = 1) -> int:
    asked = read_command([*arguments, "--out", str(out), "--quality", "lossless"], (told or []).append)
    return generate(asked, rank, size, say=(told if told is not None else []).append)


def as_frames(folder: Path, latents: Tensor) -> np.ndarray:
    pixels = open_codec(folder).decode(latents)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]


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


def test_processes_divide_the_clips_and_make_what_one_makes(student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--seed", "7"]
    assert made(tmp_path / "one", *asked) == 3
    assert [made(tmp_path / "two", *asked, rank=rank, size=2) for rank in (0, 1)] == [2, 1]
    for i in range(3):
        name = f"p_{i:04d}.mp4"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    alone = [str(student), "--prompt", "rolls", "--seed", "9"]  # the third's seed
    made(tmp_path / "alone", *alone)
    assert (tmp_path / "alone" / "output.mp4").read_bytes() == (tmp_path / "one" / "p_0002.mp4").read_bytes()


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


def test_a_word_that_the_text_encoder_does_not_know_is_refused_before_the_network_is_opened(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was opened")

    monkeypatch.setattr("fewstep.inference.model.Outline.open", refuse)
    with pytest.raises(ValueError, match="has no word for purple"):
        made(tmp_path, str(student), "--prompt", "a purple ball")


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


def on_processes(num: int, *commands: list[str]) -> list[str]:
    """Runs these commands on `num` processes, one after the other; what each process printed."""
    code = (
        "import os, sys, torch; torch.set_num_threads(1); from fewstep.cli import main\n"
        f"for port, words in {list(zip(free_ports(len(commands)), commands, strict=True))!r}:\n"
        "    os.environ['MASTER_PORT'] = str(port)\n"  # gloo cannot meet a second time under the same address
        "    code = main(words)\n"
        "    if code:\n"
        "        sys.exit(code)\n"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(num), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num, "\n".join(said)
    return said


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def assert_same_files(root: Path, folder: str, num: int = 3) -> None:
    assert sorted(path.name for path in (root / folder).glob("*.mp4")) == [f"p_{i:04d}.mp4" for i in range(num)]
    for path in (root / "one").glob("*.mp4"):
        assert (root / folder / path.name).read_bytes() == path.read_bytes(), (folder, path.name)


def test_two_processes_divide_the_clips_the_weights_or_the_tokens_and_make_the_same_files(
    student: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--quality", "lossless"]
    assert made(tmp_path / "one", *asked[:-2]) == 3
    ways = {"divided": (), "sharded": ("--shard",), "together": ("--context", "2")}
    words = [["generate", *asked, *how, "--device", "cpu", "--out", str(tmp_path / name)] for name, how in ways.items()]
    said = on_processes(2, *words)
    for folder in ways:
        assert_same_files(tmp_path, folder)
    assert [text.count(" of 1: ") + text.count(" of 2: ") for text in said] == [4, 2]  # each file by one process, once
    assert [text.count(" of 3: ") for text in said] == [3, 0]  # those that two made together


@pytest.mark.slow
def test_four_processes_divide_clips_and_weights_over_pairs_that_share_tokens(student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--quality", "lossless"]
    assert made(tmp_path / "one", *asked[:-2]) == 3
    ways = {"together": (), "sharded": ("--shard",)}
    options = ("--context", "2", "--device", "cpu", "--out")
    said = on_processes(4, *(["generate", *asked, *how, *options, str(tmp_path / name)] for name, how in ways.items()))
    for folder in ways:
        assert_same_files(tmp_path, folder)
    assert [text.count(" of 1: ") + text.count(" of 2: ") for text in said] == [4, 0, 2, 0]


@pytest.mark.slow
def test_two_processes_that_share_tokens_make_the_pairs_of_one(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    command = ["pairs", str(teacher), "--prompts", str(tmp_path / "p.txt"), *SIZE, "--num-steps", "4", "--path-times", "2"]
    command += ["--batch-size", "2", "--device", "cpu", "--verify", "2", "--out"]
    assert cli([*command, str(tmp_path / "one")]) == 0
    said = on_processes(2, [*command, str(tmp_path / "together"), "--context", "2"])
    assert "3 pairs made" in said[0]
    one, together = (sorted(path for path in (tmp_path / f).rglob("*.safetensors")) for f in ("one", "together"))
    assert [path.name for path in one] == [path.name for path in together] and len(one) >= 3
    for path, other in zip(one, together, strict=True):
        tensors = [cache.read(file).tensors for file in (path, other)]
        for name, tensor in tensors[0].items():
            assert float((tensors[1][name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max())


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


def test_beyond_the_envelope_it_warns_and_against_its_training_it_refuses(student: Path, teacher: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made(
        tmp_path / "a",
        str(student),
        "--prompt",
        "a ball",
        "--height",
        "32",
        "--num-frames",
        "5",
        "--sampler",
        "heun",
        told=told,
    )
    said = "\n".join(told)
    assert "5 frames: this student was trained on 9" in said
    assert "32 pixels high: this student was trained on 16" in said
    assert "--sampler has no effect" in said
    with pytest.raises(ValueError, match=r"--num-steps 8: this student takes 2.*guidance w = 3: .*--force"):
        made(tmp_path / "b", str(student), "--prompt", "a ball", "--num-steps", "8", "--guidance", "3")
    told.clear()
    forced = ["--num-steps", "3", "--guidance", "2", "--force"]
    assert made(tmp_path / "b", str(student), "--prompt", "a ball", *forced, told=told) == 1
    assert "warning: --num-steps 3" in told[0]
    with pytest.raises(ValueError, match="is a teacher"):
        made(tmp_path / "c", str(teacher), "--prompt", "a ball", "--use_distilled", *SIZE)
    with pytest.raises(ValueError, match="does not say what clips it makes: give --num-frames, --height, --width"):
        made(tmp_path / "c", str(teacher), "--prompt", "a ball")


def test_an_embedding_stands_for_a_prompt(student: Path, tmp_path: Path) -> None:
    text, _ = open_text_encoder(student).encode(["a red ball"])
    arrays.write_pickle(tmp_path / "e.pickle", [text[0].numpy()])
    made(tmp_path / "a", str(student), "--embedding", str(tmp_path / "e.pickle"))
    made(tmp_path / "b", str(student), "--prompt", "a red ball")
    first, second = (video.read(tmp_path / name / "output.mp4").frames for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with branches for edge and depth."""
    spec = CosmosControlSpec(
        **{f: getattr(NET, f) for f in NET.__dataclass_fields__}, controls=("edge", "depth"), num_control_blocks=2
    )
    torch.manual_seed(0)
    network = spec.build()
    for weight in network.module.parameters():
        weight.data = torch.randn_like(weight) * 0.2
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("controlled")
    write_parts(folder)
    state = {name: value.contiguous().clone() for name, value in network.module.state_dict().items()}
    save_file(state, folder / "student.safetensors")
    told = {"times": TIMES, "renoise": "same", "path": {"kind": "rectified_flow"}, "envelope": FIRST}
    told["network"] = {"kind": "cosmos_control", **dump(spec)}
    (folder / "student.json").write_text(json.dumps(told))
    return folder


@torch.no_grad()
def test_controls_are_encoded_or_made_from_the_input(controlled: Path, tmp_path: Path, clip: Path) -> None:
    folder = controlled
    asked = [str(folder), "--prompt", "a ball", "--input", str(clip)]
    made(tmp_path / "made", *asked, "--control", "edge")
    from fewstep.data.controls import Edge, made_of

    edges = made_of(Edge(), video.read(clip, 0, 9).frames, 0)
    video.write(tmp_path / "edges.mp4", edges, 8.0, quality="lossless")
    made(tmp_path / "file", *asked, "--control", f"edge={tmp_path / 'edges.mp4'}")
    first, second = (video.read(tmp_path / name / "output.mp4").frames for name in ("made", "file"))
    np.testing.assert_array_equal(first, second)
    made(tmp_path / "both", *asked, "--control", "edge", "--control", f"depth={clip}")
    assert (video.read(tmp_path / "both" / "output.mp4").frames != first).any()
    with pytest.raises(ValueError, match="control 'depth' cannot be made from a video here, as edge and vis can"):
        made(tmp_path / "x", *asked, "--control", "depth")
    with pytest.raises(ValueError, match="control 'seg': this network is led by edge, depth"):
        made(tmp_path / "x", *asked, "--control", f"seg={clip}")


@torch.no_grad()
def test_a_long_clip_begins_with_given_frames_and_follows_two_weighted_controls(
    controlled: Path, tmp_path: Path, clip: Path
) -> None:
    """As a loop by hand: each chunk has its slice of the controls, whose weights of 1.5 in all are scaled down to 1."""
    from fewstep.data.controls import Edge, made_of

    frames = video.read(clip).frames
    depth = np.ascontiguousarray(frames[:, ::-1])
    video.write(tmp_path / "depth.mp4", depth, 8.0, quality="lossless")
    spec = {
        "prompt": "a ball",
        "input_video_path": str(clip),
        "edge": {"control_weight": 0.9, "canny_threshold": "low"},
        "depth": {"control_weight": 0.6, "input_control": str(tmp_path / "depth.mp4")},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    asked = [str(controlled), "--controlnet_specs", str(tmp_path / "spec.json"), "--num_input_frames", "5", "--seed", "3"]
    made(tmp_path / "out", *asked, "--num-frames", "13", "--overlap", "5", "--save-controls")
    model, codec = open_model(controlled), open_codec(controlled)
    network = replace(model.network, control_weights={"edge": 0.6, "depth": 0.4})  # type: ignore[type-var]
    text, text_mask = open_text_encoder(controlled).encode(["a ball"])

    def pixels(part: np.ndarray) -> Tensor:
        return torch.from_numpy(part.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    signals = {"edge": made_of(Edge("low"), frames, 3), "depth": depth}
    begins, clips = pixels(frames[:5]), list[Tensor]()
    assert isinstance(model.sampler, StudentSampler)
    for number, first in enumerate((0, 4)):
        given = codec.encode(torch.cat([begins, begins[:, :, -1:].expand(-1, -1, 4, -1, -1)], 2))
        control = {name: codec.encode(pixels(signal[first : first + 9])) for name, signal in signals.items()}
        mask = torch.tensor([[1.0, 1.0, 0.0]])
        cond = Condition(text, text_mask, frames=given, frame_mask=mask, control=control, fps=torch.tensor([8.0]))
        rng = Rng(0, number, [3])
        clips.append(codec.decode(model.sampler(network, rng.normal((2, 3, 4, 4)), cond, rng)))
        begins = clips[-1][:, :, -5:].clamp(-1, 1)
    whole = torch.cat([clips[0], clips[1][:, :, 5:]], 2).clamp(-1, 1)
    wanted = ((whole + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]
    np.testing.assert_array_equal(video.read(tmp_path / "out" / "output.mp4").frames, wanted)
    for name, signal in signals.items():
        np.testing.assert_array_equal(video.read(tmp_path / "out" / name / "output.mp4").frames, signal)


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


def test_mistakes_are_told_before_anything_is_read(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--input .*none\.mp4: no such file \(for clip 'output'\)"):
        made(tmp_path, "no/such/model", "--prompt", "a", "--input", "none.mp4")
    with pytest.raises(ValueError, match="no model at"):
        made(tmp_path, str(tmp_path / "nothing"), "--prompt", "a")
    rows = "\n".join(json.dumps({"prompt": "a ball", "name": "same"}) for _ in range(2))
    (tmp_path / "p.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="two clips are called 'same'"):
        made(tmp_path, str(student), "--prompts", str(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match="--num-input-frames 2: this codec takes 1"):
        made(tmp_path / "o", str(student), "--prompt", "a", "--input", str(_picture(tmp_path)), "--num-input-frames", "2")
    assert cli(["generate", str(student), "--prompt", "a purple ball", "--out", str(tmp_path / "o")]) == 1
    assert "has no word for purple" in capsys.readouterr().err
    assert cli(["generate", str(student), "--promt", "a"]) == 2


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
        cli(["generate", str(student), "--prompt", "a ball", "--input", str(_picture(tmp_path)), "--out", str(tmp_path)]) == 0
    )
    assert video.probe(tmp_path / "output.mp4").num_frames == 9
    assert (
        cli(["generate", str(student), "--prompt", "a ball", "--num-frames", "1", "--out", str(tmp_path), "--name", "one"]) == 0
    )
    picture = cv2.imread(str(tmp_path / "one.png"))
    assert picture is not None
    assert picture.shape == (16, 16, 3)


def _picture(folder: Path) -> Path:
    import cv2

    frame = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    (folder / "in.png").write_bytes(cv2.imencode(".png", frame)[1].tobytes())
    return folder / "in.png"


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
    picture, asked = _picture(tmp_path), ["--num-steps", "2", "--sampler", "euler", "--shift", "1", "--prompt", "a ball"]
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


# ---- what is asked is checked before weights are read ----------------------------------------------------------------


def _without_weights(folder: Path, place: Path) -> Path:
    """A copy in which no file of weights is: whatever is said of it, nothing large was read."""
    return Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt")))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("student", "--num-steps 8 --guidance 3", "--num-steps 8: this student takes 2.*guidance w = 3"),
        ("student", "--num-frames 10 --chunk-frames 10", r"10 frames do not fit; it takes 1 \+ k \* 4: 9 or 13"),
        ("student", "--height 18", "18 x 16 pixels do not fit; both sides must be multiples of 4"),
        ("student", "--width 20", r"--width 20: .* makes multiples of 8 pixels, 16 or 24 for instance"),
        ("student", "--control edge --input IN", "control 'edge': this network is led by no control"),
        ("student", "--input IN --num-input-frames 2", r"--num-input-frames 2: this codec takes 1 \+ k \* 4"),
        ("student", "--input IN --num-input-frames 9", "nothing is left to be made of 9 frames"),
        ("student", "--num-frames 17 --overlap 2", "--overlap 2: this codec takes 1"),
        ("teacher", "", "does not say what clips it makes: give --num-frames, --height, --width"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --sigma-max 70", "--sigma-max has no effect on this teacher"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --guidance-low 3", "no pair of experts"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --use-distilled", "is a teacher"),
        ("teacher", "--num-frames 9 --height 15 --width 16", "15 x 16 pixels do not fit"),
    ],
)
def test_a_call_that_does_not_fit_is_named_before_weights_are_read(
    model: str, arguments: str, message: str, student: Path, teacher: Path, clip: Path, tmp_path: Path
) -> None:
    folder = _without_weights(student if model == "student" else teacher, tmp_path / "model")
    words = arguments.replace("IN", str(clip)).split()
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "out", str(folder), "--prompt", "a ball", *words)


def test_what_is_beyond_the_envelope_is_named_before_weights_are_read(student: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match="text_encoder: cannot be opened"):
        folder = str(_without_weights(student, tmp_path / "model"))
        made(tmp_path / "out", folder, "--prompt", "a ball", "--width", "32", "--fps", "30", "--shift", "3", told=told)
    assert "--shift has no effect" in told[0] and "32 pixels wide" in told[1] and "30 frames per second" in told[2]


def test_a_codec_of_other_channels_and_texts_of_others_are_named(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fewstep.inference.model.Outline.open", refuse)
    arrays.write_pickle(tmp_path / "e.pickle", [np.zeros((4, 7), np.float32)])
    with pytest.raises(ValueError, match="its embeddings have 7 channels, but this network reads 8"):
        made(tmp_path, str(student), "--embedding", str(tmp_path / "e.pickle"))
    config = json.loads((teacher / "vae" / "config.json").read_text()) | {"latent_channels": 3}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}))
    with pytest.raises(ValueError, match=r"its latents have 3 channels, but .* works on 2\. Give the codec"):
        made(tmp_path, str(teacher), "--prompt", "a ball", *SIZE, "--codec", str(tmp_path / "vae"))


def test_offloaded_parts_are_in_memory_for_their_stage_only_and_change_no_frame(student: Path, tmp_path: Path) -> None:
    """Bytes of all live parameters, counted whenever one of the three parts is called."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    (tmp_path / "p.txt").write_text("a ball\na red ball\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--num-frames", "17", "--overlap", "5"]  # three chunks
    parts = {
        "CosmosTransformer3DModel": "network",
        "CosmosEncoder3d": "codec",
        "CosmosDecoder3d": "codec",
        "WordsModel": "text",
    }

    def bytes_in_memory() -> int:
        """Of what was made since the last `gc.freeze`: what is frozen is not among the objects that are gone through."""
        live = [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]
        return sum(item.numel() * item.element_size() for item in live if not item.is_meta)

    def peaks(*options: str) -> dict[str, int]:
        seen: dict[str, int] = {}
        calls = dict.fromkeys(parts, 0)

        def look(module: torch.nn.Module, _: Any) -> None:
            name = type(module).__name__
            part = parts.get(name)
            if part is not None and calls[name] < 2:  # looking takes long
                calls[name] += 1
                seen[part] = max(seen.get(part, 0), bytes_in_memory())

        gc.collect()
        gc.freeze()
        handle = register_module_forward_pre_hook(look)
        try:
            made(tmp_path / "".join(options or ["plain"]), *asked, *options)
        finally:
            handle.remove()
            gc.unfreeze()
        return seen

    sizes = {
        "network": sum(p.numel() * p.element_size() for p in open_model(student).network.module.parameters()),
        "codec": sum(p.numel() * p.element_size() for p in open_codec(student).module.parameters()),
    }
    plain, network, every = peaks(), peaks("--offload_diffusion_transformer"), peaks("--offload")
    assert plain["network"] == plain["codec"] == sizes["network"] + sizes["codec"]
    assert network == {**plain, "codec": sizes["codec"]}
    assert every == {**sizes, "text": plain["text"]}
    assert plain["text"] < min(sizes.values())  # the text encoder alone
    for i in range(2):
        files = {(tmp_path / folder / f"p_{i:04d}.mp4").read_bytes() for folder in ("plain", "--offload")}
        assert len(files) == 1
