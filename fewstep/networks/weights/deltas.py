"""What a training changed, apart from the weights it began with: to be added to other weights of the same network.

A delta names the difference of the tensor NAME `NAME.diff`, so that no file of it can be taken for weights. Files of adapters
(LoRA) as diffusers and peft name them are added in the same way; they add B A.

    added(tuned, "student/delta.safetensors")        the student's delta on a tuned teacher
    added(student, "lora.safetensors:0.8")           adapters of its teacher on a student, at .8 of their strength
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fewstep.errors import UserError, some
from fewstep.networks.files.tensor_files import open_tensors
from fewstep.networks.lora import DOWN, UP
from fewstep.untrusted.stored import Stored

SUFFIX = ".diff"
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "unet.")  # of adapters, by those who read them


def difference(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NAME.diff -> weights - base in float32, of the tensors that differ. Raises UserError for another network's."""
    odd = sorted(weights.keys() ^ base.keys()) or sorted(n for n in base if weights[n].shape != base[n].shape)
    if odd:
        raise UserError(f"a delta is between weights of one network; these differ in {some(odd, 3)}")
    changed = (name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.equal(tensor, base[name]))
    return {name + SUFFIX: (weights[name].double() - base[name].double()).float() for name in changed}


def added(tensors: Mapping[str, Stored], address: str) -> dict[str, Stored]:
    """The tensors with what FILE or FILE:SCALE holds, a delta or adapters, added when they are read."""
    place, scale = _scaled(address)
    change = open_tensors(place).tensors
    sums = _sums(change, place) or _products(change, place)
    foreign = [name for name, (shape, _) in sums.items() if name not in tensors or tensors[name].shape != shape]
    if foreign:
        raise UserError(
            f"--add {place}: is of another network: {len(foreign)} of its {len(sums)} tensors do not fit these weights "
            f"({some(foreign, 3)})"
        )
    return {name: _with(tensor, sums[name][1], scale) if name in sums else tensor for name, tensor in tensors.items()}


def _scaled(address: str) -> tuple[str, float]:
    place, _, number = address.rpartition(":")
    if not place:
        return address, 1.0
    try:
        return place, float(number)
    except ValueError:
        return address, 1.0


_Sum = tuple[tuple[int, ...], tuple[Stored, ...]]  # the shape of a change, and its factors


def _sums(change: Mapping[str, Stored], place: str) -> dict[str, _Sum]:
    whole = {name.removesuffix(SUFFIX): tensor for name, tensor in change.items() if name.endswith(SUFFIX)}
    if whole and len(whole) != len(change):
        raise UserError(f"--add {place}: holds differences ({SUFFIX}) beside other tensors")
    return {name: (tensor.shape, (tensor,)) for name, tensor in whole.items()}


def _products(change: Mapping[str, Stored], place: str) -> dict[str, _Sum]:
    downs = [name.removesuffix(DOWN) for name in change if name.endswith(DOWN)]
    if not downs or any(layer + UP not in change for layer in downs) or len(change) != 2 * len(downs):
        raise UserError(
            f"--add {place}: is neither a delta (fewstep export RUN --format delta) nor adapters as diffusers and peft name "
            "them (fewstep export RUN --format lora). Weights cannot be added to weights"
        )
    out: dict[str, _Sum] = {}
    for layer in downs:
        prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
        up, down = change[layer + UP], change[layer + DOWN]
        if up.shape[1:] != down.shape[:1]:
            raise UserError(f"--add {place}: the two halves of the adapter of {layer} do not fit: {up.shape} and {down.shape}")
        out[f"{layer.removeprefix(prefix)}.weight"] = (up.shape[0], *down.shape[1:]), (up, down)
    return out


def _with(tensor: Stored, factors: tuple[Stored, ...], scale: float) -> Stored:
    return replace(tensor, read=partial(_sum, tensor, factors, scale), read_part=None)


def _sum(tensor: Stored, factors: tuple[Stored, ...], scale: float) -> Tensor:
    change = factors[0].read().double()
    for factor in factors[1:]:
        change = change @ factor.read().double()
    return torch.add(tensor.read().double(), change, alpha=scale).to(tensor.dtype)
