"""Files of tensors that others wrote, read as data: safetensors, and what torch.save writes. No code of a file is run.

with safetensors(path, advice) as file: ..       the open file; its tensors are read when they are asked for
read_safetensors(path, advice)                   all tensors, and the metadata
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_TENSORS = 2**17  # of one file; each costs some 16 us and 1 kB before it is read


@contextmanager
def safetensors(path: str | os.PathLike[str], advice: str) -> Iterator[Any]:  # Any: the library's file, which has no type
    """A safetensors file. Raises UserError, which ends with `advice`, if it is damaged; FileNotFoundError if it is no file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()) > _MAX_TENSORS:
                raise UserError(f"{path}: holds {len(file.keys()):,} tensors; at most {_MAX_TENSORS:,} are read. {advice}")
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error}). {advice}") from None


def read_safetensors(path: str | os.PathLike[str], advice: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Raises as `safetensors`."""
    with safetensors(path, advice) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping
