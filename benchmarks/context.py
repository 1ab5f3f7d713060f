"""What it gains that two processes share the tokens of a clip, and what the hooks for it cost by themselves.

    python benchmarks/context.py [--tokens 4096] [--rounds 5]

A student's two calls on a Cosmos network, where attention dominates, in turns: by one process while the other one waits, and by
two together (gloo). On a busy machine the wall clock says little: beside it stands the CPU time of one process, which is its
share of the work and of the exchanges. `hooks`: the same calls of one process with the hooks of a context of one, which no run
has: with one process they are not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import fewstep
from fewstep.batch import Condition
from fewstep.diffusion import RectifiedFlow, Rng, StudentSampler
from fewstep.networks.contract import Network
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.parallel import Context, join_world, leave_world

BOUND = 0.65
FRAMES = 4
SAMPLER = StudentSampler((1.0, 0.6), RectifiedFlow())


def network(side: int) -> Network:
    torch.manual_seed(0)
    spec = CosmosSpec(
        latent_channels=4, num_heads=4, head_dim=32, num_layers=2, mlp_ratio=2.0, text_dim=16, adaln_lora_dim=8,
        max_size=(FRAMES, side, side), padding_mask=False,
    )  # fmt: skip
    built = spec.build()
    built.module.eval().requires_grad_(False)
    return built


def calls(built: Network, side: int) -> Callable[[], None]:
    rng, cond = Rng(0, 0, range(1)), Condition(text=torch.randn(1, 8, 16))
    noise = rng.normal((4, FRAMES, side, side))

    def run() -> None:
        with torch.no_grad():
            SAMPLER(built, noise, cond, Rng(0, 0, range(1)))

    return run


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Of the wall, and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(side: int, rounds: int) -> dict[str, Any]:
    """Ratios of rank 0: of both clocks, two processes over one; and of the CPU, with hooks over without."""
    world = join_world("cpu", timeout_s=600.0, context=2)
    assert world.context is not None
    alone, hooked, shared = (network(side) for _ in range(3))
    hooked.share_tokens(Context(0, 1))
    shared.share_tokens(world.context)
    one, with_hooks, together = (calls(built, side) for built in (alone, hooked, shared))
    found: dict[str, list[float]] = {"wall": [], "cpu": [], "hooks": [], "one_s": []}
    for number in range(rounds + 1):
        times: dict[str, tuple[float, float]] = {}
        if world.is_main:
            times = {"one": seconds(one), "hooks": seconds(with_hooks)}
        dist.barrier()
        times["two"] = seconds(together)
        dist.barrier()
        if world.is_main and number:  # the first round warms up
            found["wall"].append(times["two"][0] / times["one"][0])
            found["cpu"].append(times["two"][1] / times["one"][1])
            found["hooks"].append(times["hooks"][1] / times["one"][1])
            found["one_s"].append(times["one"][0])
    leave_world()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    side = 2 * round((options.tokens / FRAMES) ** 0.5)
    network(2)  # imports what the two would each import
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
    found = measure(side, options.rounds)
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    medians = {name: statistics.median(values) for name, values in found.items()}
    versions = {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__}
    print(
        json.dumps(
            {
                "name": "context",
                "value": medians["wall"],
                "unit": "wall clock, two processes / one",
                "bound": BOUND,
                "better": "lower",
                "runs": options.rounds,
                "spread": [min(found["wall"]), max(found["wall"])],
                "cpu_of_one_of_two": {"value": medians["cpu"], "spread": [min(found["cpu"]), max(found["cpu"])]},
                "hooks": {
                    "value": medians["hooks"],
                    "spread": [min(found["hooks"]), max(found["hooks"])],
                },
                "seconds_of_one": medians["one_s"],
                "network": f"Cosmos, 2 blocks, 4 heads of 32, {FRAMES * (side // 2) ** 2} tokens",
                "device": f"{platform.machine()}, gloo, 1 thread each",
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
