"""A student in the names and files of the original Cosmos code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.inference.model import Model, of_run
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
        states[part] = in_original_names(model)
    torch.save(states["weights"], out / "model.pt")
    if "ema" in states:
        torch.save({n: t.float() for n, t in states["ema"].items()}, out / "model_ema_fp32.pt")
        torch.save({n: t.bfloat16() for n, t in states["ema"].items()}, out / "model_ema_bf16.pt")
    torch.save({"model": states["weights"], "ema": states.get("ema"), "iteration": step}, out / f"iter_{step:09d}_full.pt")


def in_original_names(model: Model) -> dict[str, Tensor]:
    """The weights of a Cosmos network, named as in the released files."""
    from fewstep.networks.families.cosmos.keys import original_names, refuse_apart
    from fewstep.networks.families.cosmos.network import Cosmos

    if not isinstance(model.network, Cosmos):
        raise UserError(f"--format pt-original: {type(model.network).__name__} is no Cosmos network, and has no such names")
    state = model.network.module.state_dict()
    names = original_names(state, "1" if model.network.family == "edm" else "2")
    refuse_apart({name: (lambda tensor=tensor: tensor) for name, tensor in state.items()})
    return {names[name]: tensor.contiguous().clone() for name, tensor in state.items() if name in names}
