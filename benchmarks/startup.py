"""How long commands take to start, in units of `python -c "import torch"` on the same machine.

    python benchmarks/startup.py [--runs 5]

Whole processes by the wall clock, in turns, the median of all runs. `value` is the worst part over its own bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version

import fewstep

FEWSTEP = (sys.executable, "-m", "fewstep")
RUN = ("experiment=analytic_finetune", "trainer.max_iter=1", "optim.warmup_iters=0")
HELP, FIRST, WHOLE, DRY = 0.4, 1.3, 1.6, 2.7  # bounds, in imports of torch
WRONG = {  # one wrong use of every verb
    "train": "experiment=nothing",
    "plan": "experiment=nothing",
    "export": "run",
    "convert": "a b --dtype int8",
    "generate": "model --promt x",
    "ls": "nothing",
    "pairs": "model",
    "evaluate": "model --out x --sampler y",
    "demo": "--quick --long",
    "prepare toyworld": "--num 3",
    "prepare text": "folder",
    "prepare controls": "folder --type x",
    "prepare shards": "folder",
    "prepare latents": "folder --codec x --resize y",
    "check data": "--html x.html",
}


def seconds(*command: str, status: int = 0, until: str | None = None) -> tuple[float, float]:
    """From the start of a process to the first line of its messages that begins with `until`, and to its end."""
    began = time.perf_counter()
    seen: float | None = None
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if until is not None and seen is None and line.startswith(until):
                seen = time.perf_counter() - began
    whole = time.perf_counter() - began
    assert process.returncode == status, (command, process.returncode, lines[-5:])
    assert until is None or seen is not None, lines
    return seen or whole, whole


def measured() -> dict[str, float]:
    """One run of everything, in imports of torch."""
    torch_s = seconds(sys.executable, "-c", "import torch")[1]
    found = {"--help": seconds(*FEWSTEP, "--help")[1]}
    for verb, words in WRONG.items():
        found[f"{verb} --help"] = seconds(*FEWSTEP, *verb.split(), "--help")[1]
        found[f"{verb} {words}"] = seconds(*FEWSTEP, *verb.split(), *words.split(), status=2)[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OUTPUT_ROOT"] = folder
        found["train, first iteration"], found["train, one iteration"] = seconds(*FEWSTEP, "train", *RUN, until="step 1/1")
        found["train --dryrun"] = seconds(*FEWSTEP, "train", "--dryrun", *RUN)[1]
    return {"import torch, seconds": torch_s} | {name: value / torch_s for name, value in found.items()}


def bound_of(name: str) -> float:
    return {"train, first iteration": FIRST, "train, one iteration": WHOLE, "train --dryrun": DRY}.get(name, HELP)


def part(values: Sequence[float], bound: float) -> dict[str, float | list[float]]:
    spread = [round(min(values), 3), round(max(values), 3)]
    return {"value": round(statistics.median(values), 3), "spread": spread, "bound": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    measured()  # warms the disk's cache, and the byte code where Python keeps it
    runs: list[dict[str, float]] = []
    for _ in range(options.runs):
        runs.append(measured())
    torch_s = [run.pop("import torch, seconds") for run in runs]
    parts = {name: part([run[name] for run in runs], bound_of(name)) for name in runs[0]}
    for name, row in parts.items():
        print(f"{name:40} {row['value']}  (bound {row['bound']})", file=sys.stderr)
    worst = {name: statistics.median(run[name] for run in runs) / bound_of(name) for name in parts}
    name = max(worst, key=lambda name: worst[name])
    ends = [run[name] / bound_of(name) for run in runs]
    print(
        json.dumps(
            {
                "name": "startup",
                "value": round(worst[name], 3),
                "unit": "worst time over its bound; times in imports of torch",
                "bound": 1.0,
                "better": "lower",
                "runs": options.runs,
                "spread": [round(min(ends), 3), round(max(ends), 3)],
                "device": f"{platform.machine()}, {os.cpu_count()} cores",
                "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": version("torch")},
                "worst": name,
                "byte_code": "compiled at every start" if sys.dont_write_bytecode else "kept",
                "import_torch_s": round(statistics.median(torch_s), 2),
                "parts": parts,
            }
        )
    )


if __name__ == "__main__":
    main()
