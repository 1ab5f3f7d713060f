"""benchmarks/checkpoint_stall.py puts each save at the beginning of the half that it calls so."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import checkpoint_stall

from fewstep.training.checkpoint import Checkpoints


def test_the_iterations_that_it_compares_are_those_beside_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a save takes 100 s and everything else nothing."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    clock, save = [0.0], Checkpoints.save

    def slow_save(*arguments: Any) -> None:
        clock[0] += 100
        save(*arguments)

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(Checkpoints, "save", slow_save)
    monkeypatch.setattr(checkpoint_stall, "now", tick)
    record = checkpoint_stall.measure(every=4, saves=3, width=32)
    assert record["ms_per_save"] == record["ms_of_them_in_the_iteration_that_copies"] == 100e3
    assert record["value"] == 51 and record["without_ms"]["longest"] == 1e3 and record["with_ms"]["sum"] == 306e3
