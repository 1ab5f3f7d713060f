"""A flow map on Cosmos: at r = t it is its teacher, bit for bit; elsewhere diffusers' network with blended embeddings."""

from dataclasses import replace

import pytest
import torch

from fewstep.batch import Condition
from fewstep.config import ConfigError, check
from fewstep.diffusion import features
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.roles import Full, Networks, build

FLOW = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=2, text_dim=12, adaln_lora_dim=4, max_size=(4, 4, 6),
    rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)  # fmt: skip
EDM = replace(FLOW, family="edm", sigma_data=0.5, clean_time=None, learnable_positions=True)
FAMILIES = pytest.mark.parametrize("spec", [FLOW, EDM], ids=["predict2.5", "predict1"])


def pair(spec):
    nets = build(Networks(teacher=spec, student=Full(replace(spec, end_gate=0.25))), ("student", "teacher"), 3)
    return nets["teacher"], nets["student"]


def clip():
    torch.manual_seed(0)
    x, text = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 5, 12)
    given = {"frames": torch.randn_like(x), "frame_mask": torch.tensor([[1.0, 0, 0], [0, 0, 0]])}
    return x, torch.tensor([0.9, 0.35], dtype=torch.float64), Condition(text=text), Condition(text=text, **given)


@FAMILIES
def test_at_the_same_time_it_answers_as_its_teacher(spec):
    teacher, student = pair(spec)
    x, t, plain, given = clip()
    assert student.traits.reads_end and not teacher.traits.reads_end
    for cond in (plain, given):
        expected = teacher(x, t, cond).velocity
        for end in (None, t):
            assert torch.equal(student(x, t, replace(cond, end=end)).velocity, expected)
        assert not torch.equal(student(x, t, replace(cond, end=0.5 * t)).velocity, expected)
    per_frame = t[:, None].expand(2, 3)
    assert torch.equal(student(x, per_frame, plain).velocity, teacher(x, per_frame, plain).velocity)
    for ours, theirs in zip(features(student, x, t, plain, (0, 1)), features(teacher, x, t, plain, (0, 1)), strict=True):
        assert torch.equal(ours, theirs)


@FAMILIES
def test_elsewhere_it_is_diffusers_network_with_blended_embeddings(spec):
    """The plain network of diffusers, with a hook that replaces the embedding of t by the blend."""
    teacher, student = pair(spec)
    x, t, plain, given = clip()
    r = torch.tensor([0.2, 0.01], dtype=torch.float64)
    with torch.no_grad():
        for p in student.module.time_embed.end.parameters():
            p.mul_(1.5)
    second = student.module.time_embed.end

    def blend(module, args, output):
        end = (r if spec is FLOW else r.log() / 4).float()
        if args[1].numel() > 2:  # a time for each frame
            end = end[:, None].repeat(1, 3)
            end[0, 0] = args[1].reshape(2, 3)[0, 0] if spec is FLOW else end[0, 0]  # the given frame's is its own
        first_part, second_part = output, second(args[0], end.flatten())
        return tuple(0.75 * one + 0.25 * other.view_as(one) for one, other in zip(first_part, second_part))

    teacher.module.time_embed.register_forward_hook(blend)
    for cond in (plain, given):
        ours, theirs = student(x, t, replace(cond, end=r)).velocity, teacher(x, t, cond).velocity
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_has_no_second_time_is_refused():
    with pytest.raises(ConfigError, match="end_gate"):
        check(replace(FLOW, end_gate=0.0))
    with pytest.raises(ConfigError, match="end_gate"):
        check(CosmosControlSpec(end_gate=0.25))
