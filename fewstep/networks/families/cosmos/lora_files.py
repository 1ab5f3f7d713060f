"""Adapters (LoRA) that lie beside the weights in an original Cosmos file: found, and added into the weights.

to_q_lora.net.0, to_q_lora.net.1          Predict1's own: down, up; beside to_q.0
q_proj.lora_A.default, q_proj.lora_B.default   PEFT, in Predict2 and 2.5: down, up; beside q_proj.base_layer

W' = W + scale up down        the scale is a setting of the training (Predict1: scale, PEFT: alpha / rank), and in no file
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.untrusted.stored import Stored

_OWN = re.compile(r"(?P<layer>.*\.to_(?:q|k|v|out))_lora\.net\.(?P<side>[01])\.weight$")
_PEFT = re.compile(r"(?P<layer>.*)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    weight: str  # the name of the weight it changes, as that is called without adapters
    entry: str  # the name under which the file holds that weight
    down: str
    up: str


def adapters(tensors: Mapping[str, Stored]) -> list[Adapter]:
    """The adapters among the tensors of a file that also holds the weights they change; half an adapter is refused.

    A file of adapters alone has none: it is what a role of adapters starts from.
    """
    sides: dict[tuple[str, str], dict[int, str]] = {}
    for name in tensors:
        if match := _OWN.match(name):
            sides.setdefault((f"{match['layer']}.0.weight", f"{match['layer']}.0.weight"), {})[int(match["side"])] = name
        elif match := _PEFT.match(name):
            entry = f"{match['layer']}.base_layer.weight"
            entry = entry if entry in tensors else f"{match['layer']}.weight"
            sides.setdefault((f"{match['layer']}.weight", entry), {})["AB".index(match["side"])] = name
    result: list[Adapter] = []
    for (weight, entry), pair in sides.items():
        if entry not in tensors:
            continue
        if len(pair) < 2:
            raise UserError(f"the adapter {next(iter(pair.values()))} lacks its other half")
        result.append(Adapter(weight, entry, pair[0], pair[1]))
    return result


def merged(tensors: Mapping[str, Stored], scale: float) -> dict[str, Stored]:
    """The tensors with their adapters added in, and named as if there had never been any."""
    by_weight = {adapter.entry: adapter for adapter in adapters(tensors)}
    beside = {name for adapter in by_weight.values() for name in (adapter.down, adapter.up)}
    plain: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name in beside:
            continue
        adapter = by_weight.get(name)
        if adapter is None:
            plain[name.replace(".base_layer.", ".")] = tensor
            continue
        down, up = tensors[adapter.down], tensors[adapter.up]
        if up.shape[:1] + down.shape[1:] != tensor.shape or down.shape[0] != up.shape[1]:
            raise UserError(
                f"the adapter of {adapter.weight} does not fit it: {up.shape} times {down.shape} for {tensor.shape}"
            )
        plain[adapter.weight] = Stored(tensor.shape, tensor.dtype, partial(_added, tensor, down, up, scale))
    return plain


def _added(weight: Stored, down: Stored, up: Stored, scale: float) -> Tensor:
    low = up.read().double() @ down.read().double()
    return torch.add(weight.read().double(), low, alpha=scale).to(weight.dtype)
