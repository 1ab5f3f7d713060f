"""Thousands of damaged files and commands that nobody meant, in one warm process: see process.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROCESS = Path(__file__).with_name("process.py")


def run(num: int, seed: int, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(PROCESS), str(num), str(seed), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    failures = report["failures"]
    assert not failures, f"{len(failures)} of {report['num']} cases:\n" + "\n\n".join(failures[:5])
    assert report["num"] >= 0.9 * num
    return report


def test_a_thousand_cases() -> None:
    run(1000, 20261130)


@pytest.mark.slow
def test_many_cases_of_every_verb() -> None:
    """How many, and from which seed: FEWSTEP_HOSTILE=50000 FEWSTEP_SEED=2."""
    report = run(int(os.environ.get("FEWSTEP_HOSTILE", "10000")), int(os.environ.get("FEWSTEP_SEED", "1")), "deep")
    print(json.dumps(report, indent=1))
