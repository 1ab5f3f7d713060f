"""A flow map of a Wan teacher by its commands; diffusers' AnyFlow pipeline makes our clip from the same noise."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.diffusion import Rng
from fewstep.inference.model import open_model

sys.path.insert(0, str(Path(__file__).parent))
from shell import walk
from tiny_pipelines import clips, predict25, wan


def test_a_flow_map_opens_in_upstreams_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wan(tmp_path / "teacher")
    clips(tmp_path / "clips", 4)
    walk("flow_map.sh", tmp_path, real=False)
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "student"))
    assert type(pipe).__name__ == "AnyFlowPipeline" and type(pipe.scheduler).__name__ == "FlowMapEulerDiscreteScheduler"
    pipe.set_progress_bar_config(disable=True)
    model = open_model(tmp_path / "student")
    noise, text = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 7, 16)
    for num in (3, 5):
        ours = model.sampler.with_steps(num)(model.network, noise, Condition(text=text), Rng(0))
        size = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "num_inference_steps": num}
        padded = torch.nn.functional.pad(text, (0, 0, 0, model.network.text_tokens - 7))
        theirs = pipe(prompt_embeds=padded, latents=noise, output_type="latent", **size).frames
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-4, atol=1e-4)
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
