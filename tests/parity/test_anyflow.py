"""A flow map on Wan: at r = t it is diffusers' Wan, elsewhere diffusers' AnyFlow; its tangents; its scheduler."""

from dataclasses import replace

import pytest
import torch
from diffusers import AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from fewstep.batch import Condition
from fewstep.diffusion import Rng, StudentSampler, features
from fewstep.diffusion.derivative import Difference, Jvp
from fewstep.export.schedulers import scheduler_of
from fewstep.methods import MeanFlow
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.anyflow import AnyFlowSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.roles import Full, Networks, build

WAN = WanSpec(
    num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=12, text_tokens=7, freq_dim=16, latent_channels=4,
    max_positions=16,
)  # fmt: skip
MAP = AnyFlowSpec.like(WAN)


@pytest.fixture(scope="module")
def pair():
    nets = build(Networks(teacher=WAN, student=Full(MAP)), ("student", "teacher"), 3)
    return nets["teacher"], nets["student"]


def clip(rows=2, frames=3):
    torch.manual_seed(0)
    x, text = torch.randn(rows, 4, frames, 4, 6), torch.randn(rows, 5, 12)
    return x, torch.tensor([0.9, 0.35], dtype=torch.float64)[:rows], Condition(text=text)


def test_at_the_same_time_it_answers_as_its_wan_teacher(pair):
    teacher, student = pair
    x, t, cond = clip()
    expected = teacher(x, t, cond).velocity
    for end in (None, t):
        torch.testing.assert_close(student(x, t, replace(cond, end=end)).velocity, expected, rtol=1e-5, atol=1e-5)
    given = replace(cond, frames=torch.randn_like(x), frame_mask=torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(student(x, t, given).velocity, teacher(x, t, given).velocity, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(features(student, x, t, cond, (0, 1)), features(teacher, x, t, cond, (0, 1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_elsewhere_it_is_the_upstream_class(pair):
    _, student = pair
    module = student.module
    assert isinstance(module, AnyFlowTransformer3DModel)
    x, t, cond = clip()
    r = torch.tensor([0.2, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for p in module.condition_embedder.delta_embedder.parameters():
            p.mul_(1.5)
        times = [(1000 * time).float()[:, None].expand(2, 3) for time in (t, r)]
        text = torch.nn.functional.pad(cond.text, (0, 0, 0, 2))
        raw = module(x.transpose(1, 2), *times, text, return_dict=False)[0].transpose(1, 2)
        ours = student(x, t, replace(cond, end=r)).velocity
        for p in module.condition_embedder.delta_embedder.parameters():
            p.div_(1.5)
    torch.testing.assert_close(ours, raw)


COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=2, text_dim=12, adaln_lora_dim=4, max_size=(4, 4, 6),
    rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)  # fmt: skip


COSMOS_MAP = replace(COSMOS, end_gate=0.25)


@pytest.mark.parametrize("spec", [WAN, MAP, COSMOS, COSMOS_MAP], ids=["wan", "anyflow", "cosmos", "cosmos flow map"])
def test_tangents_of_real_networks(spec):
    """Forward mode in float32 against differences in float64 of the same weights; Wan's fastest wave in t is sin 1000 t."""
    torch.manual_seed(1)
    network = spec.build()
    x, t, cond = clip()
    end = 0.5 * t if network.traits.reads_end else None
    d, one = torch.randn_like(x), torch.ones_like(t)

    def answer(x, t):
        return network(x, t, replace(cond, end=end)).velocity

    exact = Jvp().along(answer, (x, t), (d, one)).double()
    network.module.double()
    cond = replace(cond, text=cond.text.double())
    far, close = (Difference(step=h).along(answer, (x.double(), t), (d.double(), one)) for h in (2e-4, 1e-4))
    near = (4 * close - far) / 3
    assert float((exact - near).norm() / near.norm()) < 1e-3


@pytest.mark.parametrize(("num", "shift"), [(1, 1.0), (2, 5.0), (4, 5.0), (8, 3.0)])
def test_its_scheduler_takes_our_jumps(num, shift):
    sampler = MeanFlow(num_steps=num, shift=shift).sampler(MAP.path)
    fit = scheduler_of(sampler, MAP.path)
    assert fit is not None
    scheduler = fit.scheduler
    assert isinstance(scheduler, FlowMapEulerDiscreteScheduler)
    scheduler.set_timesteps(num)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(sampler.times, dtype=torch.float64))
    # any other number of steps is as good to both
    other = sampler.with_steps(num + 3)
    scheduler.set_timesteps(num + 3)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(other.times, dtype=torch.float64))


def test_clips_are_those_of_the_upstream_loop(pair):
    _, student = pair
    _, _, cond = clip(1)
    sampler = MeanFlow(num_steps=4, shift=5.0).sampler(MAP.path)
    noise = Rng(5, 0, (0,)).normal((4, 3, 4, 6))
    ours = sampler(student, noise, cond, Rng(5, 0, (0,)))
    assert isinstance(sampler, StudentSampler)
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    x, text = noise.transpose(1, 2), torch.nn.functional.pad(cond.text, (0, 0, 0, 2))
    with torch.no_grad():
        for i, time in enumerate(scheduler.timesteps):
            r = scheduler.sigmas[i + 1] * 1000
            begin, end = (value.float().expand(1, 3) for value in (time, r))
            raw = student.module(x, begin, end, text, return_dict=False)[0]
            x = scheduler.step(raw, time, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x.transpose(1, 2).float(), rtol=1e-4, atol=1e-5)
