"""Arrays in files, in each of the formats that Cosmos, FastGen and this project write; reading never runs code of a file.

| suffix | written by | holds |
|---|---|---|
| .pickle | Cosmos-Transfer1, Cosmos-Predict1 | one numpy array, or a list of one |
| .pth | FastGen | one tensor, or a dictionary of them |
| .npy | anyone | one array |
| .safetensors | this project | named tensors |
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.files import cache
from fewstep.data.safe_pickle import load as load_pickle
from fewstep.errors import UserError
from fewstep.files import write_bytes
from fewstep.untrusted.text import fault_of, opened
from fewstep.untrusted.torch_files import load_torch


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name; an array that has no name is called "". Dtypes stay as they are."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return cache.read(path).tensors
    value = _npy(path) if path.suffix == ".npy" else load_pickle(path) if path.suffix == ".pickle" else load_torch(path)
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise UserError(f"{path}: holds {len(value)} arrays, where one array or a list of one is wanted")
        value = value[0]
    named = dict(value) if isinstance(value, Mapping) else {"": value}
    out: dict[str, Tensor] = {}
    for name, array in named.items():
        tensor = _tensor(array)
        if tensor is None:
            what = f"{array.dtype} values" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise UserError(f"{path}: holds {what}{f' named {name!r}' if name else ''}, not an array of numbers")
        out[str(name)] = tensor
    return out


def read_one(path: str | os.PathLike[str], name: str = "") -> Tensor:
    """The only array of a file, or the one called `name` if there are several."""
    arrays = read(path)
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        raise UserError(f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, but no {name or 'single array'}")
    return arrays[name]


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:  # plain data: what safe_pickle reads back
    """Writes numpy arrays and plain containers as a pickle, for layouts that other programs read."""
    write_bytes(path, pickle.dumps(value, protocol=4))


def _npy(path: Path) -> Any:  # an array of any type
    """A .npy array, mapped: a header that claims more than the file holds is refused before memory is taken for it."""
    opened(path).close()  # refuses what is no file
    with fault_of(path, "Write it again with numpy.save"):  # numpy lets out whatever the parser of its header raises
        return np.lib.format.open_memmap(path, mode="r")


def _tensor(value: Any) -> Tensor | None:  # whatever a file held
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:  # torch has no longer ones
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W", "E"]))
    return value if isinstance(value, Tensor) else None
