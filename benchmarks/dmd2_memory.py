"""Memory of DMD2 with student and critic as adapters on the teacher, against three full copies. JSON on the last line.

    python benchmarks/dmd2_memory.py [--layers 10 --width 768] [--tokens 512]

Each layout trains in a process of its own: a Cosmos teacher of about 100 M parameters, one student turn and one critic turn,
twice. Measured is the peak of resident memory (on a GPU: of what torch allocated) above what the process held before it built a
network; the plan of the same run stands beside it. Checkpointing is on, as in every recipe that needs the memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.methods import DMD2
from fewstep.methods.contract import Nets
from fewstep.networks.cosmos import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build, wholes
from fewstep.parallel import World
from fewstep.training import loop
from fewstep.training.plan import plan
from fewstep.training.role import TrainedRole
from fewstep.training.run import Run, Trainer

BOUND, PLAN_BOUND = 0.45, 0.10


def run_of(layout: str, layers: int, width: int, tokens: int) -> Run:
    teacher = CosmosSpec(num_heads=width // 64, head_dim=64, num_layers=layers, text_dim=256, adaln_lora_dim=64)
    roles = (Full(), Full()) if layout == "full" else (Lora(rank=16), Lora(rank=16))
    side = int((tokens / 2) ** 0.5)
    return Run(
        method=DMD2(t_list=(1.0, 0.7), guidance=4.0, student_update_freq=2, exit_step="last"),
        networks=Networks(teacher, *roles),
        data=Mock((16, 2, 2 * side, 2 * side), (64, 256)),
        trainer=Trainer(batch_size=1, checkpointing=True),
    )


def resident() -> tuple[int, int]:
    """Bytes now and at the peak."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


def measure(run: Run) -> dict[str, Any]:
    from diffusers import CosmosTransformer3DModel  # noqa: F401  what is imported is not what is measured
    from peft import inject_adapter_in_model  # noqa: F401

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    warm = torch.nn.Linear(64, 64, device=device)  # libraries' workspaces, threads
    warm(torch.zeros(8, 64, device=device)).sum().backward()
    before, _ = resident()
    nets: dict[str, Any] = dict(build(run.networks, run.method.roles, 0))
    for whole in wholes(nets):
        loop._place(run, whole, World(0, 1, device, None))
    roles = {
        name: TrainedRole(name, net, run.optim_of(name), run.ema if name == "student" else None)
        for name, net in nets.items()
        if name != "teacher"
    }
    batch = run.data.open().batch(torch.arange(1)).to(device)
    for step in range(4):
        turn = run.method.turn(step)
        for name, role in roles.items():
            role.take_turn(name in turn.trains)
        for terms in run.method.losses(turn, Nets(nets), batch, Rng(0, step, (0,), device)):
            terms.total.backward()
            del terms
        for name in turn.trains:
            roles[name].step(1e-6, torch.tensor(1e9), step)
    numbers = sum(p.numel() for p in nets["teacher"].module.parameters() if not p.requires_grad)
    return {"bytes": resident()[1] - before, "parameters": numbers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--measure", choices=("full", "shared"))
    asked = parser.parse_args()
    sizes = (asked.layers, asked.width, asked.tokens)
    torch.set_num_threads(1)
    if asked.measure:
        print(json.dumps(measure(run_of(asked.measure, *sizes))))
        return
    found: dict[str, dict[str, Any]] = {}
    for layout in ("full", "shared"):
        words = [sys.executable, __file__, "--measure", layout, *sys.argv[1:]]
        told = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found[layout] = json.loads(told)
        planned = sum(plan(run_of(layout, *sizes)).parts.values())
        found[layout]["planned"] = planned
        found[layout]["plan_error"] = planned / found[layout]["bytes"] - 1
        print(f"{layout}: {found[layout]['bytes'] / 2**20:.0f} MiB measured, {planned / 2**20:.0f} MiB planned", flush=True)
    worst = max(abs(one["plan_error"]) for one in found.values())
    print(
        json.dumps(
            {
                "name": "dmd2_memory",
                "value": found["shared"]["bytes"] / found["full"]["bytes"],
                "unit": "of three full copies",
                "bound": BOUND,
                "better": "lower",
                "runs": 1,
                "spread": 0.0,
                "plan_error": worst,
                "plan_bound": PLAN_BOUND,
                "measured": found,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
                "versions": {"torch": torch.__version__, "fewstep": fewstep.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
