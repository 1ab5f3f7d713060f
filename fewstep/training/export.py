"""Weights out: one safetensors file, and beside it how the student is meant to be built and sampled."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.networks.weights import locate, read
from fewstep.training.checkpoint import read_progress, replace_text


def export(address: str, out: Path) -> list[Path]:
    """The files written: student.safetensors, student.json (times, renoise, path, provenance), config.yaml of the run."""
    from safetensors.torch import save_file

    folder, role = locate(address)
    tensors = {name: tensor.contiguous() for name, tensor in read(f"{folder}:{role}").items()}
    run_folder = folder.parent.parent
    # As the run wrote it: its method and network may live in a file of the user's, which is not needed here.
    sampling = json.loads((run_folder / "student.json").read_text())
    about = {"source": str(folder), "role": role, "step": read_progress(folder).step, **sampling}
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "student.safetensors"
    beside = weights.with_suffix(".partial")
    save_file(tensors, beside, metadata={"format": "pt", "fewstep": json.dumps(about)})
    beside.replace(weights)
    replace_text(out / "student.json", json.dumps(about, indent=1) + "\n")
    replace_text(out / "config.yaml", (run_folder / "config.yaml").read_text())
    return [weights, out / "student.json", out / "config.yaml"]
