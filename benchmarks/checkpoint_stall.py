"""What a checkpoint that is written in the background costs the iterations beside it, by wall clock.

    python benchmarks/checkpoint_stall.py [--every 40] [--saves 8] [--width 512]

One run saves every `--every` iterations with checkpoint.async_write. The half of them that begins with a save is compared with
the other half, in which nothing is written any more. Printed: the ratio of their sums, what a save costs in all and in the
iteration that copies the state, and the median, longest and summed iteration of both halves. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

import fewstep
from fewstep.config import kind
from fewstep.data.mock import Mock
from fewstep.methods import Finetune
from fewstep.methods.contract import Turn
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

BEGINNINGS: list[float] = []  # seconds at which an iteration began


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@kind("clocked", group="method")
@dataclass(frozen=True)
class Clocked(Finetune):
    """Finetune, which notes when the loop asks whose turn it is."""

    def turn(self, step: int) -> Turn:
        BEGINNINGS.append(now())
        return super().turn(step)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    values = {"median": statistics.median(seconds), "longest": max(seconds), "sum": sum(seconds)}
    return {name: round(1e3 * value, 1) for name, value in values.items()}


def measure(every: int, saves: int, width: int) -> dict[str, Any]:
    BEGINNINGS.clear()
    run = Run(
        job=Job(project="benchmarks", name="stall"),
        method=Clocked(),
        networks=Networks(student=Full(TinySpec("dit", channels=4, width=width, depth=2, num_heads=8), "random")),
        data=Mock((4, 2, 12, 12), None),
        trainer=Trainer(max_iter=every * (saves + 1), batch_size=1, log_every=every * (saves + 1)),
        checkpoint=Checkpoint(save_iter=every, async_write=True),
    )
    train(run)
    *_, newest = sorted((run.job.folder() / "checkpoints").glob("iter_*"))
    seconds = [after - before for before, after in pairwise(BEGINNINGS)]
    starts = [every * number - 1 for number in range(1, saves + 1)]  # the iteration that ends with a save
    half = every // 2
    writing = [seconds[start : start + half] for start in starts]
    quiet = [seconds[start + half : start + 2 * half] for start in starts]
    ratios = sorted(sum(one) / sum(other) for one, other in zip(writing, quiet, strict=True))
    usual = statistics.median(value for block in quiet for value in block)
    costs = [sum(one) - sum(other) for one, other in zip(writing, quiet, strict=True)]
    quarter = len(ratios) // 4
    return {
        "name": "checkpoint_stall",
        "value": round(statistics.median(ratios), 4),
        "unit": f"{half} iterations that begin with a save / {half} without",
        "bound": 1.05,
        "better": "lower",
        "runs": saves,
        "spread": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
        "ms_per_save": round(1e3 * statistics.median(costs), 1),
        "ms_of_them_in_the_iteration_that_copies": round(1e3 * statistics.median(block[0] - usual for block in writing), 1),
        "with_ms": milliseconds([value for block in writing for value in block]),
        "without_ms": milliseconds([value for block in quiet for value in block]),
        "state_mib": round(sum(file.stat().st_size for file in newest.iterdir()) / 2**20, 1),
        "clock": "wall clock",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()}, 1 thread",
        "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=40, help="iterations from save to save, an even number")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="of the network; 512: a state of 149 MiB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        os.environ["OUTPUT_ROOT"] = root
        print(json.dumps(measure(options.every, options.saves, options.width)))


if __name__ == "__main__":
    main()
