"""`fewstep distill` from nothing to a folder that diffusers samples where fewstep cannot be imported; killed and rerun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines

from fewstep import TOY
from fewstep.cli import main

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
shape = {"height": side, "width": side, "num_frames": frames, "num_inference_steps": 4, "guidance_scale": 1.0}
shape = {} if own else shape
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


def plain(folder: Path, frames: int, side: int, whose: str = "own") -> str:
    command = [sys.executable, "-c", PLAIN, "student", str(frames), str(side), whose]
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
    tensors = load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensor.float().reshape(-1) for _, tensor in sorted(tensors.items())])


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
        process = distil(broken, *words)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(3, taken))
        for pid in reversed([process.pid, *descendants(process.pid)]):  # as when the power fails: nobody is asked
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    done(broken, *words)
    assert torch.equal(weights(whole), weights(broken)), f"seed {seed}"


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(FileNotFoundError):
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]
