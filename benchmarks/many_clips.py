"""Does `fewstep evaluate` score 10,000 clips in bounded memory, over two processes, one of them killed and started again?

    python benchmarks/many_clips.py --out many                 some minutes of two cores; finished parts are not made again

Writes small clips, scores a tenth and all of them in one process, then all over two processes, of which the second is killed
and started again. Prints the peak memory of each process, and by how much scores differ from those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.files import video

FRAMES, SIZE = 3, 16


def write(folder: Path, num: int, seed: int) -> None:
    """Clips of a soft pattern that drifts, each of its own colours and speed."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    there = {path.name for path in folder.glob("*.mp4")}
    for n in range(num):
        if f"{n:06d}.mp4" in there:
            continue
        rng = np.random.default_rng((seed, n))
        (fy, fx), phase, colours = rng.uniform(1, 3, 2), rng.uniform(0, 6.3, 3), rng.uniform(30, 120, 3)
        wave = [np.sin(6.3 * (fy * y + fx * x)[..., None] + phase + 0.5 * t * phase[0]) for t in range(FRAMES)]
        noise = rng.normal(0, 4, (FRAMES, SIZE, SIZE, 3))
        clip = np.clip(128 + colours * np.stack(wave) + noise, 0, 255).astype(np.uint8)
        video.write(folder / f"{n:06d}.mp4", clip, 8.0, quality="lossless")


def started(root: Path, name: str, num: int, rank: int = 0, ranks: int = 1) -> subprocess.Popen[bytes]:
    real = root / "real" / ("0" * (6 - len(str(num - 1))) + "*.mp4")  # as many as are scored
    command = [sys.executable, "-m", "fewstep", "evaluate", str(root / "made"), "--real", str(real), "--num", str(num)]
    command += ["--sets", "1", "--features", "descriptors", "--out", str(root / name / "scores.json"), "--keep", "1"]
    return subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"})


def ended(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """The exit status of a process and the peak of its memory."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {"status": process.returncode, "peak_mib": round(usage.ru_maxrss / 1024)}


def undisturbed(root: Path, name: str, num: int) -> dict[str, float]:
    began = time.monotonic()
    end = ended(started(root, name, num))
    if end["status"]:
        sys.exit(f"{name}: fewstep evaluate ended with {end['status']}")
    return {"clips": num, **end, "seconds": round(time.monotonic() - began)}


def divided(root: Path, name: str, num: int) -> dict[str, Any]:
    """Two processes; the second is killed once something has been kept, and started again."""
    began = time.monotonic()
    first, second = started(root, name, num, 0, 2), started(root, name, num, 1, 2)
    with ThreadPoolExecutor(1) as pool:
        of_first = pool.submit(ended, first)
        while not list((root / name).glob("**/*.safetensors")):
            time.sleep(0.2)
        time.sleep(1)  # what it measures meanwhile is lost
        os.kill(second.pid, signal.SIGKILL)
        after = round(time.monotonic() - began)
        parts = {"killed": ended(second) | {"after_s": after}, "again": ended(started(root, name, num, 1, 2))}
        parts["first"] = of_first.result()
    return {"clips": num, **parts, "seconds": round(time.monotonic() - began)}


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the values and the spreads of two records, relative to the spreads."""
    pairs = [(row, other["scores"][name]) for name, row in one["scores"].items() if row["value"] is not None and row["spread"]]
    return max(abs(a[key] - b[key]) / a["spread"] for a, b in pairs for key in ("value", "spread"))


def measure(root: Path, num: int) -> dict[str, Any]:
    """The numbers of the report above; those that RESULTS.json has are not measured again."""
    write(root / "made", num, 0)
    write(root / "real", num, 1)
    path = root / "RESULTS.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    steps = {
        "tenth": lambda: undisturbed(root, "tenth", num // 10),
        "whole": lambda: undisturbed(root, "whole", num),
        "divided": lambda: divided(root, "divided", num),
    }
    for name, step in steps.items():
        if name not in results:
            results[name] = step()
            path.write_text(json.dumps(results))
            print(name, results[name], flush=True)
    one, two = (json.loads((root / name / "scores.json").read_text()) for name in ("whole", "divided"))
    results["same_protocol"] = one["protocol"] == two["protocol"]
    results["difference_in_spreads"] = largest_difference(one, two)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=10_000)
    given = parser.parse_args()
    print(json.dumps(measure(given.out, given.num), indent=1))
