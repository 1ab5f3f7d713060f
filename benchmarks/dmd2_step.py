"""What an iteration of DMD2 costs beside the calls of networks that it cannot avoid. JSON on the last line.

    python benchmarks/dmd2_step.py [--cycles 7] [--only predict25_full]

Two published dialects on a small Cosmos, each with whole roles and with adapters on one backbone: `predict25` (four steps, of
which one is trained; guidance, no GAN) and `transfer1` (one step on EDM; guidance, GAN on features of the teacher's middle
block), one student turn to four critic turns. `wan_full`: four steps with guidance and such a GAN on a small Wan. An iteration
is all that `fewstep train` does: batch, noise, calls, losses, backward, norm and checks, clipping, step, average, log.

The floor of an iteration are its calls on networks of the benchmark's own, on tensors that are there already, with any loss:

    student turn   the student's calls, the last with its backward; critic; teacher with and without text
                   with a GAN the backward goes on from the head through the teacher's blocks to the student
    critic turn    the student's calls; the critic's with its backward
                   with a GAN the teacher up to the tapped block for a fake and a real sample, the head with its backward

Adapters in the floor are peft's on a backbone of each role's own, and the teacher has none. The step of the optimiser is no
call of a network: `with_step` is the ratio to a floor that has a fused AdamW step as well. Floor and loop take turns, iteration
by iteration (common/interleaved.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common.interleaved import CLOCK, DEVICE, PREPARED, Ratio, Timed, TimedData, now, ratio
from torch import nn

import fewstep
from fewstep.batch import Batch, join
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng, features
from fewstep.methods import DMD2, Gan, Warmup, predict25, transfer1
from fewstep.networks.contract import Network
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.heads import Conv3dSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

BOUND, WARM_UP, RANK = 1.03, 3, 16
LAYERS, HEADS, TOKENS = 6, 3, 512
DATA = Mock((16, 2, 32, 32), (32, 128), num=8)
PARTS = ("predict25_full", "predict25_lora", "transfer1_full", "transfer1_lora", "wan_full")


@dataclass
class Floor:
    """The calls of networks that a turn cannot avoid, and nothing beside them."""

    method: DMD2
    student: Any  # Any: a Denoiser each, as those who count calls have them too
    critic: Any
    teacher: Any
    head: Any
    batch: Batch
    steps: dict[str, Callable[[], None]] = field(default_factory=dict[str, Callable[[], None]])
    step_s: list[float] = field(default_factory=list[float])  # of each turn: how much of it was the optimisers'

    def __post_init__(self) -> None:
        assert self.batch.x0 is not None
        self.x = self.batch.x0
        self.t = torch.full((len(self.x),), 0.7, dtype=torch.float64, device=self.x.device)

    def turn(self, step: int) -> None:
        turn = self.method.turn(step)
        times = len(self.method.student.t_list)
        if self.head is not None:
            self.head.module.requires_grad_("head" in turn.trains)
        # as many as the method draws; with exit_step=last all of them
        calls = 1 + Rng(0, step).shared.integer(times) if self.method.student.exit_step == "random" else times
        (self._student if turn.name == "student" else self._critic)(calls)
        began = now()
        for role in turn.trains:
            self.steps.get(role, lambda: None)()
        self.step_s.append(now() - began)

    def _student(self, calls: int) -> None:
        cond, negative, gan = self.batch.cond, self.batch.negative, self.method.gan
        assert negative is not None
        self._look(self.student, calls - 1)
        sample = self.student(self.x, self.t, cond).velocity
        self._look(self.critic)
        loss = sample.square().mean()
        if gan is None:
            with torch.no_grad():
                self.teacher(torch.cat([self.x, self.x]), torch.cat([self.t, self.t]), join(cond, negative))
        else:
            loss = loss + self.head(self.teacher(sample, self.t, cond, taps=self.head.taps).features).mean()
            with torch.no_grad():
                self.teacher(self.x, self.t, negative)
        loss.backward()

    def _critic(self, calls: int) -> None:
        self._look(self.student, calls)
        self.critic(self.x, self.t, self.batch.cond).velocity.square().mean().backward()
        if self.method.gan is not None:
            with torch.no_grad():
                fake, real = (features(self.teacher, self.x, self.t, self.batch.cond, self.head.taps) for _ in range(2))
            (self.head(fake) - self.head(real)).mean().backward()

    @torch.no_grad()
    def _look(self, network: Any, calls: int = 1) -> None:
        for _ in range(calls):
            network(self.x, self.t, self.batch.cond)


def fused(module: nn.Module) -> Callable[[], None]:
    """One step of AdamW on what is trained in `module`, and its gradients dropped."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_adapters(network: Network) -> Network:
    from peft import LoraConfig, inject_adapter_in_model

    network.module.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(network.traits.lora_targets or ())), network.module
    )
    network.module.to(DEVICE)
    return network


def spec_of(part: str) -> CosmosSpec | WanSpec:
    if part.startswith("wan"):
        return WanSpec(num_heads=HEADS, head_dim=64, num_layers=LAYERS, text_dim=128, ffn_dim=4 * 64 * HEADS)
    spec = CosmosSpec(num_heads=HEADS, head_dim=64, num_layers=LAYERS, text_dim=128, adaln_lora_dim=32, max_size=(8, 64, 64))
    return replace(spec, family="edm", sigma_data=0.5) if part.startswith("transfer1") else spec


def run_of(part: str, max_iter: int) -> Run:
    method = replace(predict25(), warmup=Warmup())
    if part.startswith("transfer1"):
        method = transfer1()
    elif part.startswith("wan"):
        method = DMD2(guidance=5.0, gan=Gan(features="teacher"))
    roles = (Full(), Full()) if part.endswith("full") else (Lora(rank=RANK), Lora(rank=RANK))
    head = Conv3dSpec(taps=(LAYERS // 2,), channels=64 * HEADS) if method.gan else None
    return Run(
        job=Job(project="benchmarks", group="dmd2_step", name=part),
        method=method,
        networks=Networks(spec_of(part), *roles, head=head),
        data=TimedData(part),
        trainer=Trainer(max_iter=max_iter, batch_size=1, log_every=10),
        checkpoint=Checkpoint(save_iter=10**9),
    )


def floor_of(part: str, run: Run, batch: Batch) -> Floor:
    assert isinstance(run.method, DMD2)
    student, critic, teacher = (spec_of(part).build() for _ in range(3))
    teacher.module.requires_grad_(False)
    if part.endswith("lora"):
        student, critic = with_adapters(student), with_adapters(critic)
    head = None if run.networks.head is None else run.networks.head.build()
    trained = {"student": student, "critic": critic} | ({} if head is None else {"head": head})
    for network in (teacher, *trained.values()):
        network.module.to(DEVICE)
    steps = {name: fused(network.module) for name, network in trained.items()}
    return Floor(run.method, student, critic, teacher, head, batch.to(DEVICE), steps)


def measure(part: str, cycles: int) -> tuple[Ratio, Ratio]:
    """The loop against the calls alone, and against the calls and the optimisers' steps."""
    per_cycle = DMD2().student_update_freq
    run = run_of(part, cycles * per_cycle + WARM_UP + 1)
    samples = DATA.open().batch(torch.arange(DATA.num))
    floor = floor_of(part, run, samples.rows(slice(0, 1)))
    timed = PREPARED[part] = Timed(samples, floor.turn)
    train(run)
    del PREPARED[part]
    kinds = [run.method.turn(step).name for step in range(len(timed.loop_s))][WARM_UP:]
    whole, loop = timed.bare_s[WARM_UP:], timed.loop_s[WARM_UP:]
    calls = [bare - step for bare, step in zip(whole, floor.step_s[WARM_UP:], strict=False)]
    return ratio(calls, loop, kinds), ratio(whole, loop, kinds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=7)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTPUT_ROOT"] = folder
        for part in asked.only:
            alone, stepped = measure(part, asked.cycles)
            parts[part] = alone.as_json() | {"with_step": round(stepped.value, 4)}
            print(f"{part}: {parts[part]}", file=sys.stderr, flush=True)
    worst = max(parts.values(), key=lambda found: found["value"])
    device = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else f"{platform.machine()}, {asked.threads} thread(s)"
    print(
        json.dumps(
            {
                "name": "dmd2_step",
                "value": worst["value"],
                "unit": "whole iterations / bare network calls",
                "bound": BOUND,
                "better": "lower",
                "runs": worst["runs"],
                "spread": worst["spread"],
                "clock": CLOCK,
                "device": device,
                "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
                "parts": parts,
                "network": f"Cosmos and Wan, {LAYERS} blocks of {64 * HEADS}, {TOKENS} tokens",
            }
        )
    )


if __name__ == "__main__":
    main()
