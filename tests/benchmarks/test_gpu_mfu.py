"""The FLOPs that benchmarks/gpu_mfu.py counts, against a count by hand; and its tiny setting."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)

from gpu_mfu import Flops, main  # noqa: E402


def test_each_phase_is_counted_apart() -> None:
    """A product of (5, 7) and (7, 3) takes 2 * 5 * 7 * 3; a backward has two of each. The last one need not run again."""
    first, second = 2 * 5 * 7 * 3, 2 * 5 * 3 * 4
    block, x = nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 4)), torch.randn(5, 7, requires_grad=True)
    with Flops() as flops:
        with torch.no_grad():
            block(x)
        checkpoint(block, x, use_reentrant=False).sum().backward()
    whole = first + second
    assert flops.counts == {"forward": whole, "frozen": whole, "recompute": first, "backward": 2 * whole}


def test_attention_is_two_products() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    with Flops() as flops, torch.no_grad():
        nn.functional.scaled_dot_product_attention(query, key, key)
    assert flops.counts["frozen"] == 2 * (2 * 2 * 3 * 4 * 6 * 8)


def test_the_tiny_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = main(
        ["--tiny", "--cycles", "1", "--only", "wan_1_3b/finetune", "predict25_2b/dmd2", "--out", str(tmp_path / "x.json")]
    )
    rows = {row["name"]: row["tflop"] for row in record["rows"]}
    assert (tmp_path / "x.json").is_file() and "TFLOP of an iteration" in capsys.readouterr().out
    # Blocks run again up to their last product. A backward is two forwards, of attention two and a half.
    finetune = rows["wan_1_3b/finetune"]
    assert finetune["frozen"] == 0 and 0.7 * finetune["forward"] < finetune["recompute"] < finetune["forward"]
    assert 1.8 * finetune["forward"] < finetune["backward"] < 2.2 * finetune["forward"]
    assert (
        rows["predict25_2b/dmd2"]["frozen"] > rows["predict25_2b/dmd2"]["forward"] > 0
    )  # four of five turns: roll-out, critic
