"""How often each network is asked, and how far: the calls an algorithm cannot avoid, and no other."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from counting import Counting

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Rng, features, on_path
from fewstep.diffusion.path import RectifiedFlow, TrigFlow
from fewstep.methods import DMD2, KD, Critic, Gan, Nets, StudentSample
from fewstep.networks.families.cosmos.models import transfer1_7b
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.heads import Conv2dSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Networks, build
from fewstep.networks.tiny import TinySpec

DIT = TinySpec("dit", channels=2, width=16, depth=4, num_heads=2, num_labels=2)


def counted(method: DMD2, turn: str, shared: bool) -> dict[str, Counter[str]]:
    roles = Networks(DIT, Lora(rank=2), Lora(rank=2)) if shared else Networks(DIT)
    nets: dict[str, Any] = dict(build(roles, ("student", "teacher", "critic"), 0))
    nets["teacher"].module.requires_grad_(False)
    for role in ("student", "critic"):
        nets[role].module.requires_grad_(role == turn)
    seen = {role: Counting(net, Counter()) for role, net in nets.items()}
    asked: dict[str, Any] = dict(seen)
    blocks = Counter[str]()
    for i, block in enumerate(nets["teacher"].blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: blocks.update([str(i)]))
    if method.gan is not None:
        asked["head"] = Conv2dSpec(taps=(1,), channels=16, hidden=8).build()
    label = torch.tensor([0, 1])
    cond, negative = Condition(label=label), Condition(label=torch.full_like(label, -1))
    batch = Batch(x0=torch.randn(2, 2, 2, 4, 4), cond=cond, negative=negative)
    step = next(i for i in range(9) if method.turn(i).name == turn)
    for terms in method.losses(method.turn(step), Nets(asked), batch, Rng(0, step, range(2))):
        terms.total.backward()
    return {role: net.counts for role, net in seen.items()} | {"blocks": blocks}


@pytest.mark.parametrize("shared", [False, True])
def test_a_student_turn_asks_each_network_once(shared: bool) -> None:
    """cond and negative are one call of twice the rows; teacher and critic keep no graph."""
    seen = counted(DMD2(student=StudentSample((1.0, 0.7, 0.4), exit_step="last"), guidance=3.0), "student", shared)
    assert seen["student"] == Counter(calls=3, rows=6, graphs=1)  # two of them lead to the state of the third
    assert seen["critic"] == Counter(calls=1, rows=2, graphs=0)
    assert seen["teacher"] == Counter(calls=1, rows=4, graphs=0)


@pytest.mark.parametrize("shared", [False, True])
def test_a_critic_turn_asks_no_teacher_and_keeps_no_graph_of_the_student(shared: bool) -> None:
    seen = counted(DMD2(student=StudentSample((1.0, 0.7), exit_step="last"), guidance=3.0), "critic", shared)
    assert seen["student"] == Counter(calls=2, rows=4, graphs=0) and seen["critic"] == Counter(calls=1, rows=2, graphs=1)
    assert not seen["teacher"]


def test_one_sample_serves_several_draws_of_the_critic() -> None:
    seen = counted(DMD2(student=StudentSample((1.0, 0.7), exit_step="last"), critic=Critic(draws=4)), "critic", True)
    assert seen["student"]["calls"] == 2 and seen["critic"]["calls"] == 4


def test_features_come_with_the_score_and_alone_they_cost_the_blocks_up_to_the_tap() -> None:
    """Student: the score's own call gives them. Critic: fake and real, blocks 0 and 1 of 4, which is half a call each."""
    gan = DMD2(student=StudentSample((1.0,)), gan=Gan(features="teacher"))
    student = counted(gan, "student", False)
    assert student["teacher"]["calls"] == 1 and student["blocks"] == Counter({"0": 1, "1": 1, "2": 1, "3": 1})
    critic = counted(gan, "critic", False)
    assert critic["teacher"]["calls"] == 2 and critic["blocks"] == Counter({"0": 2, "1": 2})


def test_a_kd_step_is_one_call() -> None:
    net = Counting(DIT.build(), Counter())
    batch = Batch(x0=torch.randn(2, 2, 2, 4, 4), noise=torch.randn(2, 2, 2, 4, 4))
    for terms in KD().losses(KD().turn(0), Nets({"student": net}), batch, Rng(0, 0, range(2))):
        terms.total.backward()
    assert net.counts == Counter(calls=1, rows=2, graphs=1)


@pytest.mark.parametrize("name", ["tiny", "cosmos", "transfer1"])
def test_features_alone_are_the_features_of_a_whole_call(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "latent_channels": 4,
        "num_heads": 2,
        "head_dim": 16,
        "num_layers": 4,
        "text_dim": 32,
        "mlp_ratio": 2,
    }
    sizes |= {"adaln_lora_dim": 4, "max_size": (8, 32, 32)}
    spec: Any = {"tiny": DIT, "cosmos": CosmosSpec(**sizes), "transfer1": transfer1_7b("edge")}[name]
    if name == "transfer1":
        from dataclasses import replace

        spec = replace(spec, **sizes)
    net = spec.build()
    for parameter in net.module.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, spec.channels if name == "tiny" else 4, 2, 8, 8), torch.tensor([0.3, 0.8], dtype=torch.float64)
    control = {"edge": torch.randn(2, 4, 2, 8, 8)} if name == "transfer1" else {}
    cond = Condition(text=torch.randn(2, 5, 32), control=control)
    for path in (net.path, TrigFlow() if net.path == RectifiedFlow() else net.path):
        asked = on_path(net, path)
        want = asked(x, t, cond, taps=(2, 0)).features
        got = features(asked, x, t, cond, (2, 0))
        assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    weights = [p for n, p in net.module.named_parameters() if p.requires_grad]
    got = torch.autograd.grad(features(net, x, t, cond, (1,))[0].square().sum(), weights, allow_unused=True)
    want = torch.autograd.grad(net(x, t, cond, taps=(1,)).features[0].square().sum(), weights, allow_unused=True)
    assert any(g is not None for g in got)
    for a, b in zip(got, want, strict=True):
        assert (a is None or not bool(a.abs().max())) if b is None else a is not None and torch.equal(a, b)
    assert all("forward" not in vars(block) for block in net.blocks)
