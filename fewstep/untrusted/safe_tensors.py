"""Files of tensors in the format of safetensors that others wrote, read as data.

open_safetensors(path, advice)    its tensors, read when they are asked for, and the metadata
read_safetensors(path, advice)    all tensors, and the metadata
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from fewstep.errors import UserError
from fewstep.untrusted.stored import SAFETENSORS_DTYPES, Stored

_MAX_TENSORS = 2**17  # of one file; each costs some 16 us and 1 kB before it is read


def open_safetensors(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """The tensors of a file by name, and its metadata. The file is mapped: a tensor costs memory when its numbers are used.

    Raises UserError, which ends with `advice`, if it is damaged; FileNotFoundError if it is no file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. {advice}")
    try:
        file = safe_open(path, framework="pt")
        names = file.keys()
        if len(names) > _MAX_TENSORS:
            raise UserError(f"{path}: holds {len(names):,} tensors; at most {_MAX_TENSORS:,} are read. {advice}")
        parts = {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}). {advice}") from None
    tensors: dict[str, Stored] = {}
    for name, part in parts.items():
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise UserError(f"{path}: {name} is of type {part.get_dtype()}, which is not known here. {advice}")
        tensors[name] = Stored(tuple(part.get_shape()), dtype, partial(file.get_tensor, name))
    return tensors, file.metadata() or {}


def read_safetensors(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors themselves. Raises as `open_safetensors`."""
    tensors, metadata = open_safetensors(path, advice)
    return {name: one.read() for name, one in tensors.items()}, metadata
