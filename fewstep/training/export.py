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
    config = run_folder / "config.yaml"
    about = {"source": str(folder), "role": role, "step": read_progress(folder).step, **sampling(config)}
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "student.safetensors"
    beside = weights.with_suffix(".partial")
    save_file(tensors, beside, metadata={"format": "pt", "fewstep": json.dumps(about)})
    beside.replace(weights)
    replace_text(out / "student.json", json.dumps(about, indent=1) + "\n")
    replace_text(out / "config.yaml", config.read_text())
    return [weights, out / "student.json", out / "config.yaml"]


def sampling(config: Path) -> dict[str, object]:
    """The student's schedule as the run's method defines it: other times or another renoise would be another model."""
    from fewstep.config import dump, from_yaml
    from fewstep.training.run import Run

    run = from_yaml(Run, config)
    student = run.networks.student.network or run.networks.teacher
    path = student.path  # type: ignore[attr-defined]  # every network configuration of ours names its path
    sampler = run.method.sampler(path)
    return {
        "times": list(sampler.times),
        "num_inference_steps": len(sampler.times),
        "renoise": sampler.renoise,
        "path": {"kind": sampler.path.kind, **dump(sampler.path)},  # type: ignore[attr-defined]
        "guidance": 1.0,
        "network": dump(student),
    }
