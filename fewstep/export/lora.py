"""A LoRA student as files of adapters: in the names of diffusers/peft, and in those of kohya/ComfyUI."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import UserError
from fewstep.files import write_tensors
from fewstep.networks.lora import Lora, as_diffusers, as_kohya, at_scale_one
from fewstep.networks.roles import Networks
from fewstep.networks.weights.addresses import read

BRANCH = (
    "`{file}` holds the adapters of the control branch, in peft's names. diffusers' class for it does not load adapters: put "
    "them in with `peft.inject_adapter_in_model` and `peft.set_peft_model_state_dict`, or export the student merged."
)
LOW_NOISE_EXPERT = "`{file}` is for the low-noise expert: `load_lora_weights(..., load_into_transformer_2=True)`."


def write_lora(address: str, networks: Networks, out: Path) -> tuple[str, ...]:
    """Writes one file for each module of diffusers that has adapters; returns what a reader must know of them."""
    role = networks.student
    spec = networks.teacher
    if not isinstance(role, Lora) or spec is None:
        raise UserError("--format lora: this run's student is a full network; networks.student=lora trains adapters")
    notes: list[str] = []
    for part, adapters in spec.by_part(at_scale_one(read(address), role.scale_of)).items():
        stem = "" if part == spec.pipeline_part else f"{part}_"
        file = f"{stem}pytorch_lora_weights.safetensors"
        is_branch = part.startswith("controlnet")  # of no class that takes adapters by itself
        prefix = "" if is_branch else spec.pipeline_part
        write_tensors(out / file, as_diffusers(adapters, prefix=prefix))
        if not is_branch:
            write_tensors(out / f"{stem}kohya_lora.safetensors", as_kohya(adapters))
        if stem:
            notes.append((BRANCH if is_branch else LOW_NOISE_EXPERT).format(file=file))
    return tuple(notes)
