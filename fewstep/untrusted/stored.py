"""Tensors in files that are not read yet, and as the bytes of a safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    # by offsets and sizes; of distributed checkpoints
    read_part: Callable[[Sequence[int], Sequence[int]], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """A tensor that is in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def encoded(
    tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of its header, the header, then one tensor after the other.

    safetensors' own writer wants all tensors in memory, puts a file of its own in the place of the one that it is given, which
    no other user may read, and orders the header by chance. dtype: of all tensors that are floating-point.
    """
    entries = {name: Stored.of(one) if isinstance(one, Tensor) else one for name, one in tensors.items()}
    if dtype is not None:
        entries = {name: replace(one, dtype=dtype) if one.dtype.is_floating_point else one for name, one in entries.items()}
    entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))  # each lies where its type may be mapped
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name, one in entries.items():
        if one.dtype not in SAFETENSORS_NAMES:
            raise UserError(f"{name} is of type {one.dtype}, which is not written here. Convert it where it was made")
        offsets = [place, place + one.num_bytes]
        header[name] = {"dtype": SAFETENSORS_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for one in entries.values():
        tensor = one.read().detach().to("cpu", one.dtype).contiguous()
        # In this form, because one number that was expanded counts as contiguous, with a stride of 0.
        yield tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
