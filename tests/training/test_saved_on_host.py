"""Activations that wait on the host: the same bits, and fewer bytes on the device between forward and backward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.config import ConfigError, check
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, KD, CausalSample, Gan, Nets, SelfForcing, StudentSample
from fewstep.networks.causal_attention import Causality
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.saved import SavedOnHost
from fewstep.networks.tiny import TinySpec
from fewstep.parallel import World
from fewstep.training import iteration
from fewstep.training.crew import assemble
from fewstep.training.plan.ledger import HOST, PASSING, Ledger
from fewstep.training.plan.plan import plan
from fewstep.training.run import Run, Trainer

ALONE = World(0, 1, torch.device("cpu"), None)
DIT = TinySpec("dit", channels=4, width=48, depth=4, num_heads=4, text_dim=16)
WAN = WanSpec(
    num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, text_tokens=5, freq_dim=16, latent_channels=4,
    max_positions=64,
)  # fmt: skip
GAN = DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2, gan=Gan(weight=0.3, features="critic"))
HEAD = MultiscaleSpec(taps=(1, 3), channels=48, hidden=16)
CASES: dict[str, tuple[Any, Networks]] = {
    "kd": (KD(), Networks(student=Full(DIT, "random"))),
    "dmd2": (GAN, Networks(DIT, head=HEAD)),
    "dmd2_lora": (GAN, Networks(DIT, Lora(rank=2), Lora(rank=2), head=HEAD)),
    "self_forcing": (
        SelfForcing(student=CausalSample(t_list=(1.0, 0.8, 0.5)), guidance=2.0),
        Networks(WAN, student=Full(causal=Causality(2, 6)), critic=Full()),
    ),
}


def run_of(name: str, offloads: bool) -> Run:
    method, networks = CASES[name]
    roles = tuple(role for role in method.roles if role != "head") if offloads else ()
    data = Mock((4, 6, 4, 4), (5, 16), num=8)
    return Run(method, networks, data, trainer=Trainer(batch_size=2, checkpointing=True, offload_activations=roles))


def crew_of(run: Run) -> Any:
    networks = build(run.networks, run.method.roles, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for network in networks.values():
            for parameter in network.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return assemble(run, networks, ALONE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "dmd2_lora")) for name in CASES])
def test_losses_gradients_and_weights_have_the_same_bits(name: str) -> None:
    ends: list[dict[str, Tensor]] = []
    for offloads in (False, True):
        run = run_of(name, offloads)
        crew, values = crew_of(run), dict[str, Tensor]()
        for step in range(2):
            turn = run.method.turn(step)
            part = iteration.Part(run.data.open().batch(torch.arange(2)), Rng(3, step, range(2)), 1.0)
            for number, terms in enumerate(iteration.gradients(run, crew, turn, [part])):
                values |= {f"{step}.{number}.{term}": value.detach() for term, value in terms.values.items()}
            for role in turn.trains:
                values |= {
                    f"{step}.{role}.{n}": w.grad.clone() for n, w in crew.trained[role].weights.items() if w.grad is not None
                }
            norms = {role: float(norm) for role, norm in iteration.norms(crew, turn, ALONE).items()}
            iteration.step(run, crew, norms, step, step)
        ends.append(values | {key: tensor.clone() for key, tensor in crew.state().items()})
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 50
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", ["kd", "self_forcing"])
def test_block_inputs_are_not_on_the_device_between_forward_and_backward(name: str) -> None:
    device: dict[bool, int] = {}
    host = inputs = 0
    for offloads in (False, True):
        run = run_of(name, offloads)
        crew, ledger, seen = crew_of(run), Ledger(), list[int]()
        student = crew.networks["student"]
        if offloads:
            student.watchers.append(lambda ledger=ledger: ledger.entering(HOST))
        for block in student.blocks:
            block.register_forward_pre_hook(
                lambda module, given, seen=seen: seen.extend(
                    t.nbytes for t in given if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()
                )
            )
        for role_name, role in crew.trained.items():
            role.take_turn(role_name == "student")
        for network in crew.networks.values():
            ledger.hold((*network.module.parameters(), *network.module.buffers()), "weights")
        batch = run.data.open().batch(torch.arange(2))
        ledger.hold([t for t in (batch.x0, batch.noise, batch.cond.text) if t is not None], "weights")
        with ledger:
            terms = next(iter(run.method.losses(run.method.turn(0), Nets(crew.networks), batch, Rng(3, 0, range(2)))))
            device[offloads], host, inputs = ledger.now[PASSING], ledger.now.get(HOST, 0), sum(seen)
            del terms
    print(name, device, host, inputs)
    assert host >= inputs > 0
    assert device[False] - device[True] > 0.7 * inputs


def test_the_plan_counts_them_on_the_host() -> None:
    """At the worst moment, the recomputation of the last of eight blocks, the inputs of the seven before it are away."""
    run = run_of("kd", True)
    run = replace(
        run, networks=Networks(student=Full(replace(DIT, depth=8), "random")), data=Mock((4, 6, 16, 16), (5, 16), num=8)
    )
    dense = replace(run, trainer=replace(run.trainer, offload_activations=()))
    block = 2 * 6 * 16 * 16 * 48 * 4
    parts = plan(run).parts
    assert plan(dense).parts[PASSING] - parts[PASSING] == pytest.approx(7 * block, rel=0.15)
    assert HOST not in parts


def test_what_has_no_block_inputs_to_send_is_refused_by_name() -> None:
    run = run_of("dmd2", True)
    check(run)
    for changes, message in (
        ({"checkpointing": False}, r"trainer\.offload_activations: needs trainer\.checkpointing=true"),
        (
            {"recompute_roles": ("critic", "teacher")},
            r"trainer\.offload_activations: names student, whose blocks are not recomputed",
        ),
        ({"offload_activations": ("student", "head")}, r"names head, a discriminator"),
        ({"offload_activations": ("studnet",)}, r"names studnet; this method has"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(run, trainer=replace(run.trainer, **changes)))
    assert isinstance(crew_of(run).networks["critic"], SavedOnHost)
