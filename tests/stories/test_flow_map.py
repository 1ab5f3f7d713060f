"""A flow map of a Wan teacher by its commands; diffusers' AnyFlow pipeline makes our clip from the same noise."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.batch import Condition
from fewstep.diffusion import Rng
from fewstep.inference.model import open_model

sys.path.insert(0, str(Path(__file__).parent))
from shell import walk
from tiny_pipelines import clips, wan


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
