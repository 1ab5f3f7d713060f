"""What the loop costs beside the network: the time of whole iterations over the time of the bare network calls in them.

    python benchmarks/overhead.py [--cycles 30]

Both are measured in one process and in turns. The data set is the clock: the loop asks it for a batch once per iteration, so
that the time between two requests is one whole iteration as users run it (noise, losses, backward, clipping, checks, step,
average, logging). At the start of each cycle the data set first does the bare calls of that cycle, on networks of its own, and
times them. `finetune`: a cycle is one forward and backward. `dmd2`: a student turn and a critic turn; student forward and
backward, critic and teacher forward; student forward, critic forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import fewstep
from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, Finetune
from fewstep.networks.contract import Network
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

BOUND, GOAL_S, WARM_UP = 1.05, 0.050, 3
NETWORK = TinySpec("dit", channels=4, width=48, depth=1, num_heads=4)
SIDE = 16  # latents are C T SIDE SIDE
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Clock = Callable[[], float]


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Bare:
    """The networks without anything around them."""

    def __init__(self, frames: int):
        self.student, self.critic, self.teacher = (NETWORK.build() for _ in range(3))
        for network in (self.student, self.critic, self.teacher):
            network.module.to(DEVICE)
        self.x = torch.randn(1, 4, frames, SIDE, SIDE, device=DEVICE)
        self.t = torch.full((1,), 0.7, dtype=torch.float64, device=DEVICE)

    @torch.no_grad()
    def look(self, network: Network) -> None:
        network(self.x, self.t, Condition())

    def learn(self, network: Network) -> None:
        network.module.zero_grad()
        network(self.x, self.t, Condition()).velocity.square().mean().backward()

    def cycle(self, name: str) -> None:
        self.learn(self.student)
        if name == "dmd2":
            self.look(self.critic)
            self.look(self.teacher)
            self.look(self.student)
            self.learn(self.critic)


def calibrate() -> int:
    """The least number of frames whose bare forward and backward takes 50 ms here; the fastest of several tries, which no other
    work on the machine makes longer."""
    frames = 1
    while frames < 512:
        bare = Bare(frames)
        times: list[float] = []
        for _ in range(8):
            began = now()
            bare.learn(bare.student)
            times.append(now() - began)
        if min(times) >= GOAL_S:
            break
        frames = max(frames + 1, frames * 9 // 8)
    return frames


class Timed:
    """One data set, and the clock."""

    def __init__(self, name: str, frames: int):
        self.name, self.bare = name, Bare(frames)
        self.samples = Rng(1, 0, range(8)).normal((4, frames, SIDE, SIDE))
        self.per_cycle, self.asked = (
            (1 if name == "finetune" else 2),
            -1,
        )  # the first request is the loop's own look at the data
        self.left = self.cycle_s = 0.0
        self.pairs: list[tuple[float, float]] = []  # bare, loop

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor) -> Batch:
        if self.asked > 0:
            self.cycle_s += now() - self.left
        if self.asked >= 0 and self.asked % self.per_cycle == 0:
            if self.asked > 0:
                self.pairs.append((self.bare_s, self.cycle_s))
            began = now()
            self.bare.cycle(self.name)
            self.bare_s, self.cycle_s = now() - began, 0.0
        self.asked += 1
        self.left = now()
        return Batch(x0=self.samples[index])


OPENED: dict[str, Timed] = {}


@kind("timed", group="data")
@dataclass(frozen=True)
class TimedData:
    fields: ClassVar[frozenset[str]] = frozenset({"x0"})

    name: str
    frames: int

    def open(self) -> Timed:
        OPENED[self.name] = Timed(self.name, self.frames)
        return OPENED[self.name]


def measure(name: str, frames: int, cycles: int) -> list[tuple[float, float]]:
    """Seconds of the bare calls and of the loop, for each cycle."""
    method = Finetune() if name == "finetune" else DMD2(t_list=(1.0,), student_update_freq=2)
    per_cycle = 1 if name == "finetune" else 2
    run = Run(
        job=Job(project="benchmarks", group="overhead", name=name),
        method=method,
        networks=Networks(NETWORK, Full(), Full()),
        data=TimedData(name, frames),
        trainer=Trainer(max_iter=per_cycle * (cycles + WARM_UP) + 1, batch_size=1, log_every=10),
        checkpoint=Checkpoint(save_iter=10**9),
    )
    train(run)
    return OPENED[name].pairs[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    frames = calibrate()
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTPUT_ROOT"] = folder
        for name in ("finetune", "dmd2"):
            pairs = measure(name, frames, options.cycles)
            ratios = sorted(loop / bare for bare, loop in pairs)
            quarter = len(ratios) // 4
            parts[name] = {
                "value": round(statistics.median(ratios), 4),
                "spread": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
                "bare_ms": round(1e3 * statistics.median(bare for bare, _ in pairs), 2),
                "loop_ms": round(1e3 * statistics.median(loop for _, loop in pairs), 2),
            }
            print(f"{name}: {parts[name]}", file=sys.stderr)
    worst = max(parts, key=lambda name: parts[name]["value"])
    device = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else f"{platform.machine()}, {options.threads} thread(s)"
    print(
        json.dumps(
            {
                "name": "loop_overhead",
                "value": parts[worst]["value"],
                "unit": "whole iterations / bare network calls",
                "bound": BOUND,
                "better": "lower",
                "runs": options.cycles,
                "spread": parts[worst]["spread"],
                "device": device,
                "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
                "parts": parts,
                "network": f"tiny dit, {frames * SIDE * SIDE} tokens",
            }
        )
    )


if __name__ == "__main__":
    main()
