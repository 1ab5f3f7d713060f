"""A student in the names and files of the original Cosmos code."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.training.checkpoint import read_progress
from fewstep.training.original_files import original_states


def write_original(checkpoint: Path, out: Path) -> None:
    """model.pt: the weights as trained; model_ema_fp32.pt, model_ema_bf16.pt: their moving average; iter_N_full.pt: both."""
    step, states = read_progress(checkpoint).step, original_states(checkpoint)
    torch.save(states["weights"], out / "model.pt")
    if "ema" in states:
        torch.save({n: t.float() for n, t in states["ema"].items()}, out / "model_ema_fp32.pt")
        torch.save({n: t.bfloat16() for n, t in states["ema"].items()}, out / "model_ema_bf16.pt")
    torch.save({"model": states["weights"], "ema": states.get("ema"), "iteration": step}, out / f"iter_{step:09d}_full.pt")
