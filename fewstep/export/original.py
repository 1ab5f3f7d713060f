"""A student in the names and files of the original Cosmos code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewstep.inference.model import of_run
from fewstep.training.checkpoint import read_progress


def write_original(checkpoint: Path, role: str, out: Path) -> None:
    """model.pt: the weights as trained; model_ema_fp32.pt, model_ema_bf16.pt: their moving average; iter_N_full.pt: both."""
    student = role.partition(".")[0]
    step = read_progress(checkpoint).step
    states: dict[str, dict[str, Tensor]] = {}
    for part in ("weights", "ema"):
        try:
            model = of_run(f"{checkpoint}:{student}.{part}")
        except ValueError:
            if part == "weights":
                raise
            continue  # a run without a moving average
        states[part] = model.network.in_original_names()
    torch.save(states["weights"], out / "model.pt")
    if "ema" in states:
        torch.save({n: t.float() for n, t in states["ema"].items()}, out / "model_ema_fp32.pt")
        torch.save({n: t.bfloat16() for n, t in states["ema"].items()}, out / "model_ema_bf16.pt")
    torch.save({"model": states["weights"], "ema": states.get("ema"), "iteration": step}, out / f"iter_{step:09d}_full.pt")
