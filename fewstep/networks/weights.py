"""Weights are addresses, resolved here and nowhere else.

    PATH                         a folder or file as it is
    RUN@latest:student.ema       of a run folder (absolute, or below the output root): the EMA of its student
    RUN@500:critic               the critic after 500 iterations; without :ROLE the student.ema, without @ITER the latest

Loading is strict: a missing, extra or misshapen tensor is refused by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def output_root() -> Path:
    return Path(os.environ.get("OUTPUT_ROOT") or "checkpoints")


def read(address: str) -> dict[str, Tensor]:
    """Name -> tensor for the address, on the CPU."""
    if address.endswith(".safetensors"):
        from safetensors.torch import load_file

        if not Path(address).is_file():
            raise ValueError(f"no weights at '{address}': there is no such file")
        return load_file(address)
    folder, role = locate(address)
    name, _, part = role.partition(".")
    return read_tensors(folder, f"{name}.{part or 'weights'}.", f"{name}.buffers.")


def locate(address: str) -> tuple[Path, str]:
    """The checkpoint folder and the role that a run address names."""
    place, _, role = address.partition(":")
    place, _, iteration = place.partition("@")
    role = role or "student.ema"
    run = next((root for root in (Path(place), output_root() / place) if root.is_dir()), None)
    if run is None:
        raise ValueError(f"no weights at '{address}': neither '{place}' nor '{output_root() / place}' is a folder")
    if (run / ".metadata").is_file():  # the checkpoint folder itself
        return run, role
    checkpoints = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if iteration and iteration != "latest":
        name = f"iter_{int(iteration):09d}" if iteration.isdigit() else iteration
    else:
        pointer = checkpoints / "latest_checkpoint.txt"
        if not pointer.is_file():
            raise ValueError(f"no weights at '{address}': {run} holds no finished checkpoint yet")
        name = pointer.read_text().strip()
    if not (checkpoints / name / ".metadata").is_file():
        have = sorted(path.name for path in checkpoints.glob("iter_*") if path.is_dir())
        raise ValueError(f"no weights at '{address}': {checkpoints} has no {name}; it has {', '.join(have) or 'none'}")
    return checkpoints / name, role


def read_tensors(folder: Path, prefix: str, *more: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, and those with the prefixes of `more` where there are
    any, named without them; sharded ones come whole."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: about for name, about in found.items() if isinstance(about, TensorStorageMetadata)}
    wanted = {name: about for name, about in tensors.items() if name.startswith((prefix, *more))}
    if not any(name.startswith(prefix) for name in wanted):
        parts = sorted({".".join(name.split(".")[:2]) for name in found if ".optim." not in name})
        raise ValueError(f"{folder} holds no '{prefix[:-1]}'; it holds {', '.join(parts)}")
    state = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return {next(name.removeprefix(p) for p in (prefix, *more) if name.startswith(p)): t for name, t in state.items()}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> int:
    """Puts every tensor into `module` and returns their number; refuses unless names and shapes match exactly."""
    own = module.state_dict()
    problems = [f"  missing in the weights: {name}" for name in own if name not in tensors]
    problems += [f"  not in the network: {name}" for name in tensors if name not in own]
    problems += [
        f"  {name}: the network wants {tuple(own[name].shape)}, the weights have {tuple(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if problems:
        shown = "\n".join(problems[:12]) + (f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"the weights at '{source}' do not fit the network:\n{shown}")
    module.load_state_dict(dict(tensors), strict=True)
    return len(own)
