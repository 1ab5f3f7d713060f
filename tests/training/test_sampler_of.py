"""How a post-trained model is sampled: as the pipeline that its weights came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from fewstep.data.mock import Mock
from fewstep.diffusion import TeacherSampler
from fewstep.methods import KD, Finetune
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.training.run import Run
from fewstep.training.run_folder import sampler_of

TINY = WanSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8, freq_dim=16, max_positions=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pipeline")
    TINY.build().module.save_pretrained(root / "transformer")  # pyright: ignore[reportCallIssue]  # a class of diffusers
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "scheduler")
    return str(root)


def sampler(networks: Networks, method: Finetune | KD | None = None) -> TeacherSampler:
    run = Run(method or Finetune(), networks, Mock())
    found = sampler_of(run, TINY.build())
    assert isinstance(found, TeacherSampler)
    return found


def test_a_post_trained_model_is_sampled_as_its_base(folder: str) -> None:
    own, published = WanSpec(pretrained=folder), TeacherSampler.for_path(TINY.build().path)
    base = TeacherSampler("euler", num_steps=35, shift=3.0)
    for networks in (
        Networks(teacher=own),
        Networks(teacher=own, student=Lora(rank=2)),
        Networks(student=Full(own, init="random")),
        Networks(student=Full(TINY, init=folder)),
        Networks(teacher=TINY, teacher_init=folder),
    ):
        assert sampler(networks) == base
    for networks in (Networks(student=Full(TINY, init="random")), Networks(teacher=TINY, teacher_init="weights.pt")):
        assert sampler(networks) == published
    assert sampler(Networks(teacher=own), Finetune(num_sample_steps=7)) == TeacherSampler("euler", num_steps=7, shift=3.0)


def test_the_shift_of_unipc_is_that_of_the_base(tmp_path: Path) -> None:
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0).save_pretrained(
        tmp_path / "scheduler"
    )
    TINY.build().module.save_pretrained(tmp_path / "transformer")  # pyright: ignore[reportCallIssue]  # a class of diffusers
    assert sampler(Networks(teacher=WanSpec(pretrained=str(tmp_path)))) == TeacherSampler("unipc", shift=8.0)
