"""Processes that share the tokens of a clip compute what one computes: losses, gradients, tangents; with uneven shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.methods import Finetune
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.tokens import refuse_heads
from fewstep.parallel import Context, join_world
from fewstep.training.run import Parallel, Run

WORKER = Path(__file__).with_name("context_worker.py")
BOUND = 1e-5  # relative; rounding of float32 is 1e-7 to 3e-6 of a gradient here
# METHOD.NETWORK.ROLES; `given`: a time for every frame; `dmd2`: a discriminator; `dmd2_r1`: with its penalty
MATRIX = [
    *(f"{method}.cosmos.{roles}" for method in ("finetune", "kd", "dmd2") for roles in ("full", "lora")),
    *("dmd2_r1.cosmos.full", "dmd2.wan.full", "dmd2.wan.lora", "given.wan.full", "given.cosmos.full"),
    *("given.transfer1.full", "dmd2_edm.transfer1.full", "given.transfer25.full", "dmd2.transfer25.lora"),
    *("scm.cosmos.full", "scm.wan.full", "self_forcing.wan.full", "self_forcing.cosmos.lora"),
]


def records(*words: str) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(WORKER), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def assert_equal(found: list[dict[str, Any]], num_layouts: int, num_settings: int = 4) -> None:
    assert len(found) == num_settings * num_layouts  # with and without recomputed blocks and accumulation
    far = [record for record in found if max(record["loss"], record["gradient"], record["role"]) > BOUND]
    assert not far, far


def test_two_processes_that_share_a_clip_train_what_one_trains() -> None:
    """27 tokens and 3 heads, given frames, control branches, learned positions."""
    assert_equal(records("given.transfer1.full=context", "--quick"), 1, num_settings=2)


@pytest.mark.slow
def test_no_process_of_a_sharded_run_holds_a_network_whole() -> None:
    """Teacher, student and critic from files, halved: at no moment more memory than these three halves."""
    *_, found = records("host")
    assert 1.4 * found["whole"] < found["peak"] < 1.6 * found["whole"], found


@pytest.mark.slow
def test_memory_is_divided_as_planned() -> None:
    """DMD2 with full roles: all under FSDP, activations where tokens are shared; and the plan of both within a tenth."""
    by_layout = {record["layout"]: record for record in records("memory")}
    fsdp, context = by_layout["fsdp"], by_layout["context"]
    assert fsdp["two"] <= 0.6 * fsdp["one"], fsdp
    assert context["saved_of_two"] <= 0.6 * context["saved"], context
    for record in by_layout.values():
        for planned, measured in zip(record["planned"], (record["one"], record["two"]), strict=True):
            assert abs(planned - measured) <= 0.1 * measured, record


@pytest.mark.slow
def test_accumulation_sums_over_replicas_once_an_iteration() -> None:
    (counts,) = records("reductions")
    assert counts["1"] == counts["2"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX)
def test_every_layout_trains_what_one_process_trains(case: str) -> None:
    assert_equal(records(case), 5)


@pytest.mark.parametrize("total", [7, 8, 27])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_are_whole_and_in_order(size: int, total: int) -> None:
    x = torch.arange(total)[None]
    parts = [Context(rank, size).own(x) for rank in range(size)]
    assert torch.equal(torch.cat(parts, 1), x)
    lengths = [part.shape[1] for part in parts]
    assert max(lengths) - min(lengths) <= 1 and lengths == Context(0, size).shares(total)


def test_a_network_without_a_plan_is_refused_by_its_dotted_key() -> None:
    def run(network: Any) -> Run:
        data: Any = None
        return Run(Finetune(), Networks(student=Full(network, init="random")), data, parallel=Parallel(context=2))

    assert not list(run(WanSpec())._problems_of_context())
    ((key, text),) = run(TinySpec())._problems_of_context()
    assert key == "parallel.context" and "the network of the student has no plan for sharing" in text
    with pytest.raises(UserError, match=r"parallel\.context: this network has no plan"):
        TinySpec().build().share_tokens(Context(0, 2))


def test_more_processes_than_heads_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.context=3: this network has 2 heads"):
        refuse_heads(Context(0, 3), 2)


def test_a_context_that_does_not_divide_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"parallel\.context=4 does not divide the 6 processes of this run"):
        join_world("cpu", context=4)
    with pytest.raises(UserError, match=r"parallel\.context=2 does not divide the 3 processes of each of the 2 replicas"):
        join_world("cpu", num_replicas=2, context=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world("cpu", context=4).context is None  # a recipe for many GPUs runs on one
