"""The floor of benchmarks/dmd2_step.py asks each network as often as the method does, and what is made of its times."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from common.interleaved import Timed, ratio
from counting import Counting
from dmd2_step import Floor

from fewstep.batch import Batch
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, Nets, Warmup, predict25, transfer1
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.heads import Conv3dSpec

SPEC = CosmosSpec(latent_channels=2, num_heads=1, head_dim=12, num_layers=3, text_dim=8, adaln_lora_dim=4, max_size=(4, 16, 16))
BATCH = Mock((2, 2, 8, 8), (3, 8), num=1).open().batch(torch.arange(1))


def counting(trains: Sequence[str], spec: CosmosSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for role in ("student", "teacher", "critic"):
        network = spec.build()
        network.module.requires_grad_(role in trains)
        found[role] = Counting(network, Counter())
        for block in network.blocks:
            block.attn1.register_forward_hook(lambda *_, seen=found[role].counts: seen.update(blocks=1))
    return found


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("method", [replace(predict25(), warmup=Warmup()), transfer1()], ids=["predict25", "transfer1"])
def test_the_floor_asks_what_the_method_asks(method: DMD2, step: int) -> None:
    spec = SPEC if method.gan is None else replace(SPEC, family="edm", sigma_data=0.5)
    head = None if method.gan is None else Conv3dSpec(taps=(1,), channels=12, hidden=4).build()
    turn = method.turn(step)
    loop, bare = counting(turn.trains, spec), counting(turn.trains, spec)
    for terms in method.losses(turn, Nets({**loop, "head": head}), BATCH, Rng(0, step, (0,))):
        terms.total.backward()
    Floor(method, bare["student"], bare["critic"], bare["teacher"], head, BATCH).turn(step)
    assert {role: net.counts for role, net in bare.items()} == {role: net.counts for role, net in loop.items()}
    for role in ("student", "critic"):
        grads = [{n for n, p in nets[role].inner.module.named_parameters() if p.grad is not None} for nets in (loop, bare)]
        assert grads[0] == grads[1] and bool(grads[0]) == (role in turn.trains)


def test_the_ratio_is_that_of_an_iteration_of_the_mean_kind() -> None:
    """One long turn at 1.2 and four short ones at 1.0 (one of which was disturbed)."""
    found = ratio([4.0, 1.0, 1.0, 1.0, 1.0], [4.8, 1.0, 1.0, 1.0, 9.0], ["student"] + ["critic"] * 4)
    assert found.value == pytest.approx((4.8 + 4.0) / 8.0)
    assert found.bare_s == pytest.approx(8.0 / 5) and found.loop_s == pytest.approx(8.8 / 5) and found.runs == 5
    assert found.spread[0] == pytest.approx(found.value) and found.spread[1] == pytest.approx((4.8 + 4 * 1.0) / 8.0)
    quarters = ratio([1.0] * 8, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], ["critic"] * 8)
    assert quarters.spread == pytest.approx((1.2, 1.5)) and quarters.value == pytest.approx(1.35)


def test_the_data_set_times_bare_and_loop_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("common.interleaved.now", lambda: float(next(clock)))
    did: list[int] = []

    def bare(step: int) -> None:
        did.append(step)
        for _ in range(4):
            next(clock)  # four seconds of calls

    timed = Timed(Batch(x0=torch.arange(3.0)[:, None]), bare)
    index = torch.tensor([2])
    assert timed.batch(index).x0.tolist() == [[2.0]] and did == []  # the look before the run
    for _ in range(3):
        timed.batch(index)
        next(clock)  # the iteration
        next(clock)
    assert did == [0, 1, 2]
    assert timed.bare_s == [5.0] * 3 and timed.loop_s == [3.0] * 2  # the last iteration is seen by no request
