"""The model card: what a person must know before using a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_SCORES = {"step", "samples", "student_updates", "rollbacks", "wall_s", "peak_memory_gib", "num_processes", "memory_gib"}
NOT_SCORES |= {"samples_per_s"}
OF_THE_MACHINE = ("lr/", "grad_norm/", "data/")

_OPENS = {
    "diffusers": (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)  # runs pipeline.py: read it\n'
        'video = pipe("PROMPT").frames[0]\n```'
    ),
    "safetensors": "`student.safetensors` holds the weights; `student.json` tells what they are the weights of.",
    "pt-original": "`model.pt` and its moving averages are in the names of the original Cosmos code.",
    "lora": "`pytorch_lora_weights.safetensors` is for diffusers and peft, `kohya_lora.safetensors` for ComfyUI and others.",
}


def model_card(about: Mapping[str, Any], config: Mapping[str, Any], summary: Mapping[str, Any], form: str) -> str:
    """README.md of an exported student."""
    envelope: Mapping[str, Any] = about.get("envelope") or {}
    job = config.get("job") or {}
    method, data = config.get("method") or {}, config.get("data") or {}
    name = job.get("name", about.get("source", "student"))
    guidance = envelope.get("guidance_in_teacher")
    told = {
        "calls of the network": len(about["times"]),
        "times": ", ".join(f"{time:g}" for time in about["times"]) + f" on {about['path'].get('kind')}",
        "noise between two calls": about["renoise"] if len(about["times"]) > 1 else "none, one call",
        "guidance": f"none at use (guidance_scale 1); w = {guidance:g} of the teacher's is baked in" if guidance else "none",
        "frames": envelope.get("num_frames"),
        "height x width": _size(envelope),
        "latents": None if not envelope.get("latent_shape") else " x ".join(map(str, envelope["latent_shape"])),
        "frames per second": envelope.get("fps"),
    }
    rows = "\n".join(f"| {key} | {value if value is not None else 'not recorded'} |" for key, value in told.items())
    scores = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    scores = {key: v for key, v in scores.items() if key not in NOT_SCORES and not key.startswith(OF_THE_MACHINE)}
    said = "\n".join(f"| {key} | {value:.6g} |" for key, value in sorted(scores.items()))
    scored = f"| last value of the run | |\n|---|---|\n{said}" if said else "The run recorded none."
    source = data.get("dataset_dir") or data.get("kind", "not recorded")
    notes = "".join(f"\n{note}\n" for note in about.get("notes") or ())
    kind = method.get("kind", summary.get("method", "not recorded"))
    return f"""---
library_name: {"diffusers" if form == "diffusers" else "pytorch"}
tags: [distillation, few-step, {kind}]
---
# {name}

A student of {len(about["times"])} network call{"s" if len(about["times"]) > 1 else ""}, distilled with `{kind}` for \
{about.get("step", "?")} iterations; weights: `{about.get("role", "student")}`.

{_OPENS.get(form, "")}
{notes}
## Envelope

Trained in this envelope only. Other frames, sizes or steps may look right and be wrong.

| | |
|---|---|
{rows}

## Data

`{source}`. The licences of the data and of the teacher apply to this student.

## Scores

{scored}
"""


def _size(envelope: Mapping[str, Any]) -> str | None:
    height, width = envelope.get("height"), envelope.get("width")
    return f"{height} x {width}" if height and width else None
