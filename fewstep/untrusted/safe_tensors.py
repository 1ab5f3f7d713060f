"""Files of tensors in the format of safetensors that others wrote, read as data.

open_safetensors(path, advice)    its tensors, read when they are asked for, and the metadata
read_safetensors(path, advice)    all tensors, and the metadata
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import UserError
from fewstep.untrusted.stored import SAFETENSORS_DTYPES, Stored
from fewstep.untrusted.text import fault_of

_MAX_TENSORS = 2**17  # of one file; each costs some 16 us and 1 kB before it is read


def open_safetensors(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """The tensors of a file by name, and its metadata. Each is read when it is asked for, and leaves memory when it is dropped.

    Raises UserError, which ends with `advice`, if it is damaged; FileNotFoundError if it is no file.
    """
    tensors: dict[str, Stored] = {}
    with _opened(path, advice) as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            part = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise UserError(f"{path}: {name} is of type {part.get_dtype()}, which is not known here. {advice}")
            tensors[name] = Stored(tuple(part.get_shape()), dtype, partial(_read, path, advice, name))
        return tensors, file.metadata() or {}


def read_safetensors(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors themselves, mapped from the file. Raises as `open_safetensors`."""
    with _opened(path, advice) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping


def _read(path: str | os.PathLike[str], advice: str, name: str) -> Tensor:
    with _opened(path, advice) as file:  # again: an open file keeps all that was read of it in memory
        return file.get_tensor(name)


@contextmanager
def _opened(path: str | os.PathLike[str], advice: str) -> Iterator[Any]:  # Any: the library's file, which has no type
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. {advice}")
    with fault_of(path, advice), safe_open(path, framework="pt") as file:
        if len(file.keys()) > _MAX_TENSORS:
            raise UserError(f"{path}: holds {len(file.keys()):,} tensors; at most {_MAX_TENSORS:,} are read. {advice}")
        yield file
