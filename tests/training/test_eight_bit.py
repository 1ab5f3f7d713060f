"""Optimiser states of eight bits: near those of fp32, saved and filled again; and what is said where they cannot be."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.config import ConfigError, check
from fewstep.data.mock import Mock
from fewstep.methods import DMD2
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.optim import Optim, state_of
from fewstep.training.run import Parallel, Run, Trainer


def test_without_torchao_it_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"optim\.states=8bit needs torchao: pip install 'fewstep\[eight-bit\]'"):
        Optim(states="8bit").build([nn.Parameter(torch.zeros(2))])


def steps(optim: Optim, num: int, weight: nn.Parameter, optimizer: Any) -> Tensor:
    target = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
    for _ in range(num):
        weight.grad = (weight.detach() - target) * 2
        optimizer.step()
    return (weight.detach() - target).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchao compiles its step
def test_it_learns_as_fp32_does_and_resumes_from_what_is_saved() -> None:
    pytest.importorskip("torchao")
    made: dict[str, Any] = {}
    for states in ("fp32", "8bit"):
        optim: Any = Optim(lr=0.02, weight_decay=0.0, states=states)
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = optim.build([weight])
        first = steps(optim, 60, weight, optimizer)
        made[states] = (first, weight.detach().clone(), state_of(optimizer, {"w": weight}))
    assert made["8bit"][0] < 1.2 * made["fp32"][0] + 1e-4 < 0.1
    assert (made["8bit"][1] - made["fp32"][1]).abs().max() < 0.05
    saved = {name: t.clone() for name, t in made["8bit"][2].items()}
    assert set(saved) == {"w.step", "w.exp_avg.codes", "w.exp_avg.scale", "w.exp_avg_sq.codes", "w.exp_avg_sq.scale"}
    held = sum(t.nbytes for name, t in saved.items() if "step" not in name)
    assert held < 0.3 * sum(t.nbytes for name, t in made["fp32"][2].items() if "step" not in name)

    optim = Optim(lr=0.02, weight_decay=0.0, states="8bit")
    ends: list[Tensor] = []
    for again in (False, True):
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = optim.build([weight])
        steps(optim, 20, weight, optimizer)
        if again:  # a process that begins from the checkpoint
            kept = {name: t.clone() for name, t in state_of(optimizer, {"w": weight}).items()}
            weight = nn.Parameter(weight.detach().clone())
            optimizer = optim.build([weight])
            for name, tensor in state_of(optimizer, {"w": weight}).items():
                tensor.copy_(kept[name])
        steps(optim, 10, weight, optimizer)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_settings_that_do_not_go_together_are_named() -> None:
    dit = TinySpec("dit", channels=2, width=16, depth=1, num_heads=2)
    run = Run(DMD2(), Networks(dit), Mock((2, 2, 4, 4), None), trainer=Trainer(offload_teacher=True, frozen="8bit"))
    check(run)
    with pytest.raises(ConfigError) as refused:
        check(replace(run, parallel=Parallel("fsdp")))
    assert "trainer.offload_teacher" in str(refused.value) and "trainer.frozen" in str(refused.value)
    warnings = check(replace(run, networks=Networks(dit, Lora(), Lora())))
    assert any("trainer.offload_teacher" in str(warning) for warning in warnings)
