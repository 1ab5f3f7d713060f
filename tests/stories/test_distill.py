"""`fewstep distill` from nothing to a folder that diffusers samples where fewstep cannot be imported; killed and rerun."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import materials
import tiny_pipelines

from fewstep import TOY
from fewstep.cli import main
from fewstep.data.files import video
from fewstep.networks.families.cosmos.keys import Generation
from fewstep.networks.families.cosmos.models import MODELS, transfer1_7b, transfer2_5_2b
from fewstep.networks.families.cosmos.network import CosmosSpec

pytestmark = pytest.mark.slow
SHORT = ("--teacher-steps", "8", "--kd-iters", "4", "--iters", "6", "--num-eval", "4", "kd.checkpoint.save_iter=2")
PLAIN = """
import sys
sys.modules["fewstep"] = None
import torch
from diffusers import DiffusionPipeline
folder, frames, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own = {} if sys.argv[4] == "upstream" else {"custom_pipeline": f"{folder}/pipeline.py", "trust_remote_code": True}
pipe = DiffusionPipeline.from_pretrained(folder, **own)
steps, control = int(sys.argv[5]), sys.argv[6:]
shape = {"height": side, "width": side, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": 1.0}
shape = {} if own else shape
if control:
    import av
    import numpy as np

    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in av.open(control[0]).decode(video=0)])
    shape["control"] = torch.from_numpy(pictures).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
frames = pipe(["a red square"], generator=torch.Generator().manual_seed(0), output_type="np", **shape).frames
print(type(pipe).__name__, tuple(frames[0].shape), bool((frames[0] == frames[0]).all()))
"""


def distil(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fewstep", "distill", *words]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(folder: Path, *words: str) -> str:
    process = distil(folder, *words)
    text, _ = process.communicate()
    assert process.returncode == 0, text[-5000:]
    return text


def plain(folder: Path, frames: int, side: int, whose: str = "own", *, steps: int = 4, control: str | None = None) -> str:
    command = [sys.executable, "-c", PLAIN, "student", str(frames), str(side), whose, str(steps)]
    command += [] if control is None else [control]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize(("name", "steps"), [("wan", 4), ("predict1", 2), ("predict2", 4), ("predict25", 4)])
def test_one_command_for_tiny_pipelines(name: str, steps: int, tmp_path: Path) -> None:
    tiny_pipelines.PIPELINES[name](tmp_path / "teacher")
    tiny_pipelines.clips(tmp_path / "clips", num=4)
    words = ("teacher", "clips", "--out", "student", "--steps", str(steps), *SHORT)
    text = done(tmp_path, *words)
    assert "the student is" in text and (tmp_path / "student" / "scores" / "student.json").is_file()
    assert (tmp_path / "student" / "report.html").stat().st_size > 100_000
    shape = "(9, 32, 32, 3) True"
    if name == "wan":
        assert plain(tmp_path, 9, 32, "upstream").strip() == f"WanPipeline {shape}"
    else:
        assert plain(tmp_path, 9, 32).strip() == f"StudentPipeline {shape}"
    before = weights(tmp_path)
    again = done(tmp_path, *words)
    assert again.count("done earlier") == again.count("\n--- ") and torch.equal(before, weights(tmp_path))


def weights(folder: Path) -> torch.Tensor:
    files = sorted((folder / "student").glob("transformer/*.safetensors")) or sorted((folder / "student").glob("model*.pt"))
    tensors = [(load_file(file) if file.suffix == ".safetensors" else torch.load(file)) for file in files]
    whole = {f"{number}.{name}": tensor for number, part in enumerate(tensors) for name, tensor in part.items()}
    return torch.cat([tensor.float().reshape(-1) for _, tensor in sorted(whole.items())])


@dataclass(frozen=True)
class Road:
    """A teacher that is no folder of diffusers: its address, and the further words of the command."""

    teacher: str
    words: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def of_the_hub(folder: Path) -> Road:
    """A pipeline in the hub's cache, as its library leaves it there: links to blobs, and no network."""
    tiny_pipelines.wan(folder / "source")
    place = folder / "cache" / "models--team--teacher"
    for name in ("blobs", "refs"):
        (place / name).mkdir(parents=True)
    (place / "refs" / "main").write_text("0123456789" * 4)
    for number, file in enumerate(sorted(path for path in (folder / "source").rglob("*") if path.is_file())):
        blob, link = (
            place / "blobs" / f"{number}",
            place / "snapshots" / ("0123456789" * 4) / file.relative_to(folder / "source"),
        )
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return Road("team/teacher", environment={"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"})


SIZES: dict[str, Any] = {
    "latent_channels": 2, "num_heads": 2, "head_dim": 12, "num_layers": 3, "mlp_ratio": 2.0, "text_dim": 8, "adaln_lora_dim": 4,
    "max_size": [4, 8, 8],
}  # fmt: skip


def original(folder: Path, spec: CosmosSpec, generation: Generation, sizes: dict[str, Any]) -> None:
    """original/model.pt under the names of the original code, with network.yaml."""
    small = replace(spec, **sizes)
    (folder / "original").mkdir(parents=True)
    torch.save(materials.original_weights(small, generation), folder / "original" / "model.pt")
    described = {f.name: getattr(small, f.name) for f in fields(small) if getattr(small, f.name) != f.default}
    kind = "cosmos" if type(spec) is CosmosSpec else "cosmos_control"
    materials.settings(folder / "original" / "network.yaml", {"kind": kind, **described})


def of_predict1(folder: Path) -> Road:
    original(folder, MODELS["predict1_7b_text2world"], "1", SIZES)
    return first(folder)


def of_transfer1(folder: Path) -> Road:
    original(folder, transfer1_7b("edge"), "1", SIZES | {"num_control_blocks": 2, "hint_channels": 2})
    return first(folder, "--control", "edge")


def first(folder: Path, *words: str) -> Road:
    """Beside files of Cosmos 1: its tokenizer of videos, and a T5."""
    materials.cosmos_codec(folder / "tokenizer", ratio=8)
    materials.t5(folder / "t5")
    return Road("original/model.pt", ("--codec", "tokenizer", "--text-encoder", "t5", *words))


def of_transfer25(folder: Path) -> Road:
    sizes = {"latent_channels": 4, "num_layers": 4, "text_projection_from": 48, "image_context_dim": 8, "hint_channels": 8}
    original(folder, transfer2_5_2b("edge"), "2", SIZES | sizes | {"image_context_tokens": 2})
    materials.wan_codec(folder / "pipeline")
    materials.qwen(folder / "pipeline")
    return Road("original/model.pt", ("--codec", "pipeline", "--text-encoder", "pipeline", "--control", "edge"))


ROADS = {"hub": of_the_hub, "predict1": of_predict1, "transfer1": of_transfer1, "transfer25": of_transfer25}


@pytest.mark.parametrize("name", ROADS)
def test_one_command_for_other_teachers_killed_and_run_again(name: str, tmp_path: Path) -> None:
    road = ROADS[name](tmp_path)
    tiny_pipelines.clips(tmp_path / "clips", num=4, frames=17 if name in ("predict1", "transfer1") else 9)
    words = (road.teacher, "clips", "--out", "student", "--steps", "2", *road.words, *SHORT)
    with patch.dict(os.environ, road.environment):
        killed(tmp_path, words, random.Random().uniform(20, 60))
        text = done(tmp_path, *words)
    assert "the student is" in text and (tmp_path / "student" / "scores" / "student.json").is_file()
    if name == "hub":
        assert plain(tmp_path, 9, 32, "upstream", steps=2).strip() == "WanPipeline (9, 32, 32, 3) True"
    elif name == "predict1":
        assert plain(tmp_path, 17, 32).strip() == "StudentPipeline (17, 32, 32, 3) True"
    elif name == "transfer25":
        assert plain(tmp_path, 9, 32, control="clips/edge/clip_000.mp4").strip() == "StudentPipeline (9, 32, 32, 3) True"
    else:
        control = {"control_weight": 1.0, "input_control": "clips/edge/clip_000.mp4"}
        (tmp_path / "spec.json").write_text(json.dumps({"prompt": "a red square", "edge": control}))
        where = ("--video_save_folder", "outputs", "--video_save_name", "clip", "--codec", "tokenizer", "--text-encoder", "t5")
        with contextlib.chdir(tmp_path):
            assert main(["generate", "student", "--controlnet_specs", "spec.json", *where]) == 0
        made = video.read(tmp_path / "outputs" / "clip.mp4").frames
        assert made.shape == (17, 32, 32, 3) and made.std() > 1


def killed(folder: Path, words: Sequence[str], after_s: float) -> None:
    """Runs the command and kills it with all its processes, as when the power fails: nobody is asked."""
    process = distil(folder, *words)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=after_s)
    for pid in reversed([process.pid, *descendants(process.pid)]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_the_toy_teacher_on_clips_of_64_pixels_with_words_it_does_not_know(tmp_path: Path) -> None:
    tiny_pipelines.clips(tmp_path / "clips", num=4, frames=33, side=64)
    words = (str(TOY), "clips", "--out", "student", "--guidance", "2", *SHORT)
    process = distil(tmp_path, *words)
    text, _ = process.communicate()
    assert process.returncode == 1 and "this encoder has no word for dark" in text and "--text-encoder FOLDER" in text
    assert not (tmp_path / "clips" / "latents").exists()  # before anything heavy
    assert main(["prepare", "words", str(tmp_path / "clips"), "--out", str(tmp_path / "words"), "--iters", "20"]) == 0
    done(tmp_path, *words, "--text-encoder", "words")
    # 29 of 33 frames: the toy network has positions for eight latent ones.
    assert plain(tmp_path, 29, 64).strip() == "StudentPipeline (29, 64, 64, 3) True"


def test_killed_at_any_moment_and_rerun_it_ends_with_the_same_student(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        tiny_pipelines.wan(folder / "teacher")
        tiny_pipelines.clips(folder / "clips", num=4)
    words = ("teacher", "clips", "--out", "student", *SHORT)
    began = time.monotonic()
    done(whole, *words)
    taken = time.monotonic() - began
    seed = int.from_bytes(os.urandom(4), "big")
    draw = random.Random(seed)
    for _ in range(3):
        killed(broken, words, draw.uniform(3, taken))
    done(broken, *words)
    assert torch.equal(weights(whole), weights(broken)), f"seed {seed}"


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(FileNotFoundError):
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]
