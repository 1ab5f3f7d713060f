"""Checkpoints as files of the original Cosmos code, beside those of the run (checkpoint.original).

    iter_N_reg_model.pt, iter_N_ema_model.pt     the student's weights and their moving average
    iter_N_model.pt                              of adapters: both, {"model": .., "ema": ..}, merged into the base

The names of the tensors are those of the released files.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from fewstep.files import remove, write_torch
from fewstep.inference.model import networks_of, of_run
from fewstep.networks.files.distributed import open_distributed
from fewstep.networks.lora import Lora

NAME = re.compile(r"(iter_\d{9})_(reg_model|ema_model|model)\.pt")


def original_states(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The student's "weights" and, where the run keeps one, their average "ema", in the original names."""
    averages = any(name.startswith("student.ema.") for name in open_distributed(checkpoint))
    parts = ("weights", "ema") if averages else ("weights",)
    return {part: of_run(f"{checkpoint}:student.{part}").network.in_original_names() for part in parts}


def write_original_files(checkpoint: Path) -> list[Path]:
    """Writes the files of a whole checkpoint beside its folder, and removes those of checkpoints that are gone."""
    folder = checkpoint.parent
    for file in folder.glob("iter_*_*model.pt"):
        match = NAME.fullmatch(file.name)
        if match and not (folder / match[1]).is_dir():
            remove(file)
    states = original_states(checkpoint)
    if isinstance(networks_of(folder.parent).student, Lora):
        content = {"model": states["weights"]} | ({"ema": states["ema"]} if "ema" in states else {})
        return [_write(folder / f"{checkpoint.name}_model.pt", content)]
    suffixes = {"weights": "reg_model", "ema": "ema_model"}
    return [_write(folder / f"{checkpoint.name}_{suffixes[part]}.pt", state) for part, state in states.items()]


def _write(path: Path, state: object) -> Path:
    write_torch(path, state)
    return path
