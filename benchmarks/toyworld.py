"""Clips a second of the toy world, rendered by worker processes. The last line is one JSON object.

python benchmarks/toyworld.py                 # 32 x 32, two workers
python benchmarks/toyworld.py --size 64 --workers 0
"""

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np

from fewstep.toyworld import clips, physics

_BOUND = 50.0  # clips a second at 32 x 32 on two cores: what the demo's ten minutes allow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="pixels along each side")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 renders in this one")
    parser.add_argument("--num", type=int, default=512, help="clips in a run")
    parser.add_argument("--runs", type=int, default=5)
    wanted = parser.parse_args()
    world = physics.World(height=wanted.size, width=wanted.size)
    rates = []
    for run in range(wanted.runs):
        start = time.perf_counter()
        num = sum(1 for _ in clips.stream(world, run, range(wanted.num), workers=wanted.workers))
        rates.append(num / (time.perf_counter() - start))  # with the start of the workers
        print(f"run {run}: {rates[-1]:.1f} clips/s", flush=True)
    result = {
        "name": f"toyworld_clips_per_s_{wanted.size}px_{wanted.workers}workers",
        "value": round(statistics.median(rates), 1),
        "unit": "clips/s",
        "bound": _BOUND if wanted.size == 32 and wanted.workers == 2 else None,
        "better": "higher",
        "runs": wanted.runs,
        "spread": round(max(rates) - min(rates), 1),
        "device": f"{platform.machine()} cpu, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
