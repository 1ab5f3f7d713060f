"""A student's weights less its teacher's: to be added to a teacher that others have tuned, or to be laid on as adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fewstep.errors import UserError, some
from fewstep.files import write_tensors
from fewstep.inference.model import Model
from fewstep.networks.lora import as_diffusers, as_kohya, extract
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.weights.deltas import difference

FILE = "delta.safetensors"


def write_delta(model: Model, networks: Networks, out: Path, rank: int | None) -> tuple[str, ...]:
    """Writes delta.safetensors, and with a rank the adapters nearest to it; returns what a reader must know of them."""
    base, of = _beginning(networks)
    weights = model.network.module.state_dict()
    delta = difference(weights, base)
    write_tensors(out / FILE, delta)
    notes = [
        f"`{FILE}` holds the differences of {len(delta)} of {len(weights)} tensors from `{of}`, in float32. Add them to "
        f"weights that began there: `fewstep convert TUNED OUT --add {FILE}`."
    ]
    if rank is not None:
        layers = [name for name, layer in model.network.module.named_modules() if isinstance(layer, nn.Linear)]
        layers = [name for name in layers if f"{name}.weight" in base]
        near = extract(base, weights, layers, rank)
        for file, tensors in (
            ("pytorch_lora_weights.safetensors", as_diffusers(near.adapters)),
            ("kohya_lora.safetensors", as_kohya(near.adapters)),
        ):
            write_tensors(out / file, tensors)
        note = f"; left out: {some(list(near.left_out), 3)}" if near.left_out else ""
        notes.append(
            f"The adapters are of rank {rank} and miss {near.share:.1%} of the difference of the {len(layers)} linear layers "
            f"(Frobenius norm){note}."
        )
    return tuple(notes)


def _beginning(networks: Networks) -> tuple[Mapping[str, Tensor], str]:
    """The weights of the teacher, or those that a post-trained network began with; and their address."""
    role = networks.student
    if networks.teacher is None and isinstance(role, Full):
        address = None if role.init in ("random", "teacher") else role.init
        networks = Networks(teacher=role.network, teacher_init=address)
    of = None if networks.teacher is None else networks.teacher_init or networks.teacher.source
    if of is None:
        raise UserError(
            "--format delta: this run began with random weights and has no teacher: there is nothing to compare with"
        )
    return build(networks, ("teacher",), 0)["teacher"].module.state_dict(), of
