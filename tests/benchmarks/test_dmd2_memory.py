"""What benchmarks/dmd2_memory.py makes of a profiler's events."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from dmd2_memory import rise


def test_the_peak_is_the_highest_level_in_the_order_of_time() -> None:
    assert rise([(3, -4), (1, 4), (2, 6), (5, 3), (4, -6)]) == 10
    assert rise([(1, -5), (2, 3)]) == 0  # what was there before is given back: never above the beginning
    assert rise([(1, -5), (2, 8)]) == 3
    assert rise([]) == 0
