"""A student in the names and files of the original Cosmos code."""

from __future__ import annotations

from pathlib import Path

from fewstep.files import write_torch
from fewstep.training.checkpoint import read_progress
from fewstep.training.original_files import original_states


def write_original(checkpoint: Path, out: Path) -> None:
    """model.pt: the weights as trained; model_ema_fp32.pt, model_ema_bf16.pt: their moving average; iter_N_full.pt: both."""
    step, states = read_progress(checkpoint).step, original_states(checkpoint)
    write_torch(out / "model.pt", states["weights"])
    if "ema" in states:
        write_torch(out / "model_ema_fp32.pt", {n: t.float() for n, t in states["ema"].items()})
        write_torch(out / "model_ema_bf16.pt", {n: t.bfloat16() for n, t in states["ema"].items()})
    write_torch(out / f"iter_{step:09d}_full.pt", {"model": states["weights"], "ema": states.get("ema"), "iteration": step})
