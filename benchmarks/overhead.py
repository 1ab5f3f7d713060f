"""What the loop costs beside the network: the time of whole iterations over the time of the bare network calls in them.

    python benchmarks/overhead.py [--cycles 30]

Loop and bare calls take turns in one process (common/interleaved.py). An iteration is one as users run it: noise, losses,
backward, clipping, checks, step, average, logging. `finetune`: one forward and backward. `dmd2`: a student turn and a critic
turn; student forward and backward, critic and teacher forward; student forward, critic forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from typing import Any

import torch
from common.interleaved import CLOCK, DEVICE, PREPARED, Ratio, Timed, TimedData, now, ratio

import fewstep
from fewstep.batch import Batch, Condition
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, Finetune, StudentSample
from fewstep.networks.contract import Network
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

BOUND, GOAL_S, WARM_UP = 1.03, 0.050, 4
NETWORK = TinySpec("dit", channels=4, width=48, depth=1, num_heads=4)
SIDE = 16  # latents are C T SIDE SIDE


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

    def turn(self, name: str) -> None:
        if name == "critic":
            self.look(self.student)
            self.learn(self.critic)
            return
        self.learn(self.student)
        if name == "student":
            self.look(self.critic)
            self.look(self.teacher)


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


def measure(name: str, frames: int, cycles: int) -> Ratio:
    method = Finetune() if name == "finetune" else DMD2(student=StudentSample((1.0,)), student_update_freq=2)
    per_cycle = 1 if name == "finetune" else 2
    kinds = [name if name == "finetune" else method.turn(step).name for step in range(per_cycle * cycles + WARM_UP)]
    run = Run(
        job=Job(project="benchmarks", group="overhead", name=name),
        method=method,
        networks=Networks(NETWORK, Full(), Full()),
        data=TimedData(name),
        trainer=Trainer(max_iter=len(kinds) + 1, batch_size=1, log_every=10),
        checkpoint=Checkpoint(save_iter=10**9),
    )
    bare = Bare(frames)
    samples = Batch(x0=Rng(1, 0, range(8)).normal((4, frames, SIDE, SIDE)))
    timed = PREPARED[name] = Timed(samples, lambda step: bare.turn(kinds[min(step, len(kinds) - 1)]))
    train(run)
    del PREPARED[name]
    return ratio(timed.bare_s[WARM_UP:], timed.loop_s[WARM_UP:], kinds[WARM_UP:])


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
            parts[name] = measure(name, frames, options.cycles).as_json()
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
                "clock": CLOCK,
                "device": device,
                "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
                "parts": parts,
                "network": f"tiny dit, {frames * SIDE * SIDE} tokens",
            }
        )
    )


if __name__ == "__main__":
    main()
