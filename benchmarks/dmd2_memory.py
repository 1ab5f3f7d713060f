"""Memory of DMD2 with student and critic as adapters on the teacher, against three full copies. JSON on the last line.

    python benchmarks/dmd2_memory.py [--layers 10 --width 768] [--tokens 512] [--heap]

Each layout trains in a process of its own, as the loop does it: a Cosmos teacher of about 100 M parameters, a student turn and
a critic turn, with the optimisers' states there from the start, as in a run that goes on. Two numbers are read:

    bytes     on a CPU the peak of the process's resident memory (VmHWM) less what it held before: interpreter, libraries, and
              what these take at the first step of a network of one small block. On a GPU what torch allocated at most.
    tensors   the most that tensors held, after torch's profiler, in two more turns. On a GPU the same number as `bytes`.

Blocks of 1 MiB and more are mapped apart, so that the process holds what its tensors hold, and small ones' gaps. With `--heap`
they lie in glibc's heap as `train` sets it for speed, and the holes between blocks that stay are resident as well.

The plan (`fewstep plan`) of the same run is made in a third process. Checkpointing is on, as in every recipe that needs the
memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.batch import Batch
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, StudentSample
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.parallel import World
from fewstep.training import iteration
from fewstep.training.crew import assemble
from fewstep.training.heap import keep_freed_memory
from fewstep.training.run import Run, Trainer

BOUND, PLAN_BOUND = 0.45, 0.10
MMAP_THRESHOLD = -3  # of mallopt(3)
LAYOUTS = ("full", "shared")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def run_of(layout: str, layers: int, width: int, tokens: int) -> Run:
    teacher = CosmosSpec(num_heads=width // 64, head_dim=64, num_layers=layers, text_dim=256, adaln_lora_dim=64)
    roles = (Full(), Full()) if layout == "full" else (Lora(rank=16), Lora(rank=16))
    side = int((tokens / 2) ** 0.5)
    return Run(
        method=DMD2(student=StudentSample((1.0, 0.7), exit_step="last"), guidance=4.0, student_update_freq=2),
        networks=Networks(teacher, *roles),
        data=Mock((16, 2, 2 * side, 2 * side), (64, 256)),
        trainer=Trainer(batch_size=1, checkpointing=True),
    )


class Step:
    """The networks, roles and batch of a run, and its iterations."""

    def __init__(self, run: Run):
        self.run, self.world = run, World(0, 1, DEVICE, None)
        self.crew = assemble(run, build(run.networks, run.method.roles, 0), self.world)
        for name, tensor in self.crew.state().items():
            if ".optim." in name:
                tensor.zero_()  # zeros that were never written lie in no memory yet
        self.batch: Batch = run.data.open().batch(torch.arange(1)).to(DEVICE)

    def take(self, steps: Iterable[int]) -> None:
        for step in steps:
            turn = self.run.method.turn(step)
            part = iteration.Part(self.batch, Rng(0, step, (0,), DEVICE), 1.0)
            for _ in iteration.gradients(self.run, self.crew, turn, [part]):
                pass
            sizes = {name: float(norm) for name, norm in iteration.norms(self.crew, turn, self.world).items()}
            iteration.step(self.run, self.crew, sizes, step, step)

    def held(self) -> int:
        """Bytes of all tensors there are between two turns, each storage once."""
        tensors = [t for net in self.crew.networks.values() for t in (*net.module.parameters(), *net.module.buffers())]
        tensors += self.crew.state().values()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def resident() -> tuple[int, int]:
    """Bytes now and at the peak."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


def rise(events: Iterable[tuple[int, int]]) -> int:
    """The highest level above the first, from (time, bytes taken or given back) in any order."""
    level = peak = 0
    for _, size in sorted(events):
        level += size
        peak = max(peak, level)
    return peak


def in_tensors(step: Step, steps: Iterable[int]) -> int:
    """Bytes of tensors at the worst moment of these iterations, after torch's own profiler."""
    from torch.profiler import ProfilerActivity, profile

    worst = 0
    for number in steps:
        for role in step.roles.values():
            role.take_turn(False)  # gradients that are there already would be taken for ones that stay
        held = step.held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step.take([number])
        results: Any = seen.profiler and seen.profiler.kineto_results
        worst = max(worst, held + rise((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"))
    return worst


def measure(run: Run, heap: bool) -> dict[str, int]:
    libc = ctypes.CDLL("libc.so.6")
    if heap:
        keep_freed_memory()
    else:
        libc.mallopt(MMAP_THRESHOLD, 1 << 20)
    small = replace(run.networks.teacher, num_heads=1, num_layers=1)  # type: ignore[type-var]  # a CosmosSpec
    Step(replace(run, networks=replace(run.networks, teacher=small))).take(range(2))
    gc.collect()
    libc.malloc_trim(0)
    before, _ = resident()
    step = Step(run)
    step.take(range(2))
    found = {"bytes": resident()[1] - before, "before": before}
    found["tensors"] = in_tensors(step, range(2, 4)) if DEVICE.type == "cpu" else found["bytes"]
    weights = step.nets["teacher"].module.named_parameters()
    found["parameters"] = sum(p.numel() for name, p in weights if ".lora_" not in name)  # of the teacher
    return found


def planned(run: Run) -> dict[str, int]:
    from fewstep.training.plan.plan import plan

    return {"planned": sum(plan(run).parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heap", action="store_true", help="leave glibc's heap as `train` sets it")
    parser.add_argument("--part", nargs=2, metavar=("measure|plan", "|".join(LAYOUTS)), help="one process of the benchmark")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part:
        what, layout = asked.part
        run = run_of(layout, asked.layers, asked.width, asked.tokens)
        print(json.dumps(measure(run, asked.heap) if what == "measure" else planned(run)))
        return
    found: dict[str, dict[str, Any]] = {}
    for layout in LAYOUTS:
        one: dict[str, Any] = {}
        for what in ("measure", "plan"):
            words = [sys.executable, __file__, *sys.argv[1:], "--part", what, layout]
            one |= json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        one["plan_error"] = {name: round(one["planned"] / one[name] - 1, 4) for name in ("bytes", "tensors")}
        found[layout] = one
        sizes = ", ".join(f"{name} {one[name] / 2**20:.0f} MiB" for name in ("bytes", "tensors", "planned"))
        print(f"{layout}: {sizes}", file=sys.stderr, flush=True)
    worst = max((error for one in found.values() for error in one["plan_error"].values()), key=abs)
    print(
        json.dumps(
            {
                "name": "dmd2_memory",
                "value": round(found["shared"]["bytes"] / found["full"]["bytes"], 4),
                "unit": "of three full copies",
                "bound": BOUND,
                "better": "lower",
                "runs": 1,
                "spread": 0.0,
                "plan_error": worst,
                "plan_bound": PLAN_BOUND,
                "measured": found,
                "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()}, 1 thread",
                "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
