"""A flow map of a Wan teacher by its commands; diffusers' AnyFlow pipeline makes our clip from the same noise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.diffusion import Rng
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec

sys.path.insert(0, str(Path(__file__).parent))
from shell import walk
from tiny_pipelines import clips, predict25, wan

PLAIN = """
import sys

sys.modules["fewstep"] = None  # it cannot be imported here
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

pipe = DiffusionPipeline.from_pretrained("student")
assert type(pipe).__name__ == "AnyFlowPipeline" and type(pipe.scheduler).__name__ == "FlowMapEulerDiscreteScheduler"
pipe.set_progress_bar_config(disable=True)
given, clips = load_file("given.safetensors"), {}
for num in (3, 5):
    size = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "num_inference_steps": num}
    for kind in ("latent", "pt"):
        made = pipe(prompt_embeds=given["text"], latents=given["noise"], output_type=kind, **size).frames
        clips[f"{kind}{num}"] = made.contiguous()
save_file(clips, "plain.safetensors")
"""


def test_a_flow_map_opens_in_upstreams_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wan(tmp_path / "teacher")
    clips(tmp_path / "clips", 4)
    walk("flow_map.sh", tmp_path, real=False)
    model, codec = open_model(tmp_path / "student"), open_codec(tmp_path / "student")
    noise, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 7, 16)
    padded = torch.nn.functional.pad(text, (0, 0, 0, model.network.text_tokens - 7))
    save_file({"noise": noise, "text": padded}, tmp_path / "given.safetensors")
    subprocess.run([sys.executable, "-c", PLAIN], cwd=tmp_path, check=True)
    plain = load_file(tmp_path / "plain.safetensors")
    for num in (3, 5):
        ours = model.sampler.with_steps(num)(model.network, noise, Condition(text=text), Rng(0))
        torch.testing.assert_close(ours, plain[f"latent{num}"].reshape(ours.shape), rtol=1e-4, atol=1e-4)
        frames = codec.decode(ours)[0].transpose(0, 1) / 2 + 0.5
        torch.testing.assert_close(frames, plain[f"pt{num}"][0], rtol=1e-4, atol=1e-4)
        assert frames.std() > 0.01
    plain = open_model(tmp_path / "teacher").network
    x, t = noise, torch.tensor([0.7], dtype=torch.float64)
    student = model.network
    moved = (student(x, t, Condition(text=text)).velocity - plain(x, t, Condition(text=text)).velocity).abs().max()
    assert 1e-5 < float(moved.detach()) < 0.1, "trained, and from the teacher's weights"


def test_a_flow_map_of_a_cosmos_pipeline_by_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained from its teacher's weights, exported, reloaded: the same jumps, for any number of them."""
    monkeypatch.chdir(tmp_path)
    predict25(Path("teacher"))
    clips(Path("clips"), 4)
    for line in (
        "prepare text clips --text-encoder teacher",
        "prepare latents clips --codec teacher",
        "train experiment=flow_map teacher=teacher data.dataset_dir=clips guidance=1 data.negative=none trainer.max_iter=2 "
        "trainer.batch_size=2",
        "export general/teacher/flow_map --out student",
        "generate student --prompt square --codec teacher --text-encoder teacher --num-steps 3 --num-frames 9 --height 32 "
        "--width 32 --out made",
    ):
        assert main(line.split()) == 0, line
    model, run = open_model("student"), open_model("checkpoints/general/teacher/flow_map")
    text = torch.randn(1, 7, model.network.traits.text_channels)
    noise = torch.randn(1, 4, 3, 4, 4)
    for num in (1, 5):
        ours, theirs = (m.sampler.with_steps(num)(m.network, noise, Condition(text=text), Rng(0)) for m in (model, run))
        assert torch.equal(ours, theirs)
    plain = open_model("teacher").network
    t = torch.tensor([0.7], dtype=torch.float64)
    moved = (
        (model.network(noise, t, Condition(text=text)).velocity - plain(noise, t, Condition(text=text)).velocity).abs().max()
    )
    assert 1e-5 < float(moved) < 0.2, "trained, and from the teacher's weights"
