"""The model card: what a person must know before using a student, or a teacher that was post-trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fewstep.diffusion import Sampler, StudentSampler, TeacherSampler
from fewstep.inference.card import Envelope, StudentCard

NOT_SCORES = {"step", "samples", "student_updates", "rollbacks", "wall_s", "peak_memory_gib", "num_processes", "memory_gib"}
NOT_SCORES |= {"samples_per_s"}
OF_THE_MACHINE = ("lr/", "grad_norm/", "data/")
_VIDEO, _PICTURE = {"result": "video", "field": "frames"}, {"result": "picture", "field": "images"}  # that a pipeline returns

_OPENS = {
    "diffusers": (
        "```python\n{imports}from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER"{code}\n'
        '{control}{result} = pipe("PROMPT"{argument}).{field}[0]\n```'
    ),
    "safetensors": "`student.safetensors` holds the weights; `student.json` tells what they are the weights of.",
    "pt-original": "`model.pt` and its moving averages are in the names of the original Cosmos code.",
    "lora": "`pytorch_lora_weights.safetensors` is for diffusers and peft, `kohya_lora.safetensors` for ComfyUI and others.",
    "delta": "`delta.safetensors` is what distillation changed, for `fewstep convert TUNED OUT --add delta.safetensors`.",
}


def model_card(
    card: StudentCard, config: Mapping[str, Any], summary: Mapping[str, Any], form: str, pipeline: str | None
) -> str:
    """README.md of an exported student. pipeline: the class of diffusers that samples it; None: the folder's own."""
    envelope, sampler = card.envelope, card.sampler
    job = config.get("job") or {}
    method, data = config.get("method") or {}, config.get("data") or {}
    name = job.get("name", card.source)
    guidance = envelope.guidance_in_teacher
    is_teacher = isinstance(sampler, TeacherSampler)
    opens = _OPENS[form]
    if form == "diffusers":
        code = ")" if pipeline else ", trust_remote_code=True)  # runs pipeline.py: read it"
        branches = () if pipeline else card.spec().control_branches
        call = _of_upstream(pipeline, card) if pipeline else _of_control(branches[0] if branches else None)
        opens = opens.format(code=code, **call)
    facts = {
        **(_of_teacher(sampler) if isinstance(sampler, TeacherSampler) else _of_student(sampler, guidance)),
        "frames": envelope.num_frames,
        "height x width": _size(envelope),
        "latents": " x ".join(map(str, envelope.latent_shape)) if envelope.latent_shape else None,
        "frames per second": envelope.fps,
    }
    rows = "\n".join(f"| {key} | {value if value is not None else 'not recorded'} |" for key, value in facts.items())
    scores = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    scores = {key: v for key, v in scores.items() if key not in NOT_SCORES and not key.startswith(OF_THE_MACHINE)}
    lines = "\n".join(f"| {key} | {value:.6g} |" for key, value in sorted(scores.items()))
    scored = f"| last value of the run | |\n|---|---|\n{lines}" if lines else "The run recorded none."
    source = data.get("dataset_dir") or data.get("kind", "not recorded")
    notes = "".join(f"\n{note}\n" for note in card.notes)
    kind = method.get("kind", summary.get("method", "not recorded"))
    return f"""---
library_name: {"diffusers" if form == "diffusers" else "pytorch"}
tags: [{"post-training" if is_teacher else "distillation, few-step"}, {kind}]
---
# {name}

{_title(sampler, kind)} for {card.step} iteration{"" if card.step == 1 else "s"}; weights: `{card.role}`.

{opens}
{notes}
## Envelope

Trained in this envelope only. Other frames, sizes or steps may look right and be wrong.

| | |
|---|---|
{rows}

## Data

`{source}`. The licences of the data and of the teacher apply to this {"model" if is_teacher else "student"}.

## Scores

{scored}
"""


def _of_control(name: str | None) -> dict[str, str]:
    """The lines that read the video of a control and give it to pipeline.py; none for a model without one."""
    if name is None:
        return {"imports": "", "control": "", "argument": "", **_VIDEO}
    return {
        **_VIDEO,
        "imports": "import av\nimport numpy as np\nimport torch\n",
        "control": (
            f'frames = [frame.to_ndarray(format="rgb24") for frame in av.open("{name.upper()}.mp4").decode(video=0)]\n'
            f"{name} = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1  # 1 3 T H W, -1 to 1\n"
        ),
        "argument": f", control={name}",
    }


def _of_upstream(pipeline: str, card: StudentCard) -> dict[str, str]:
    """A call with the student's steps and size: by default the class takes those of its published model, and guidance."""
    import diffusers

    takes = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    values = {"num_frames": card.envelope.num_frames, "height": card.envelope.height, "width": card.envelope.width}
    if isinstance(card.sampler, StudentSampler):
        values |= {"num_inference_steps": len(card.sampler.times), "guidance_scale": 1.0}
    argument = "".join(f", {key}={value}" for key, value in values.items() if value is not None and key in takes)
    return {"imports": "", "control": "", "argument": argument, **(_VIDEO if "num_frames" in takes else _PICTURE)}


def _title(sampler: Sampler, kind: str) -> str:
    if isinstance(sampler, TeacherSampler):
        return f"A many-step model, a teacher: it takes guidance and any number of steps. Trained with `{kind}`"
    calls = len(sampler.times)
    return f"A student of {calls} network call{'s' if calls > 1 else ''}, distilled with `{kind}`"


def _of_student(sampler: StudentSampler, guidance: float | None) -> dict[str, Any]:
    path: Any = sampler.path  # Any: @kind gives it the attribute
    return {
        "calls of the network": len(sampler.times),
        "times": ", ".join(f"{time:g}" for time in sampler.times) + f" on {path.kind}",
        "noise between two calls": sampler.renoise if len(sampler.times) > 1 else "none, one call",
        "guidance": f"none at use (guidance_scale 1); w = {guidance:g} of the teacher's is baked in" if guidance else "none",
    }


def _of_teacher(sampler: TeacherSampler) -> dict[str, Any]:
    shift = f", shift {sampler.shift:g}" if sampler.grid == "flow" else ""
    return {
        "solver": f"{sampler.solver}, {sampler.num_steps} steps, grid {sampler.grid}{shift}",
        "guidance": "as for the model that it was trained from; w = 1 (off) by default in fewstep",
    }


def _size(envelope: Envelope) -> str | None:
    return f"{envelope.height} x {envelope.width}" if envelope.height and envelope.width else None
