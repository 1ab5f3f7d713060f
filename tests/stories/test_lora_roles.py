"""Student and critic as adapters learn what full copies learn: the benchmark, whole, from a world it renders itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_adapters_come_as_near_as_full_copies(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/lora_roles.py",
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--iters",
        "300",
        "--batch",
        "16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    start, full = (found["measured"][name]["value"] for name in ("start", "full"))
    assert full < 0.5 * start, found  # there was something to learn
    assert found["value"] <= found["bound"] == 1.15, found
