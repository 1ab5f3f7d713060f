"""benchmarks/many_clips.py with a tenth of its clips."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import many_clips

pytestmark = pytest.mark.slow


def test_memory_hardly_grows_with_the_number_of_clips_and_a_killed_process_changes_nothing(tmp_path: Path) -> None:
    """1,000 clips over two processes, one of them killed."""
    results = many_clips.measure(tmp_path, 1_000)
    assert (results["divided"]["killed"]["status"], results["divided"]["again"]["status"]) == (-9, 0), results
    assert results["same_protocol"] and results["difference_in_spreads"] < 1e-6, results
    grown = results["whole"]["peak_mib"] - results["tenth"]["peak_mib"]
    assert grown < 60, results  # MiB for 900 more clips: blocks of distances; a thousand clips of 720p have 30 GiB
