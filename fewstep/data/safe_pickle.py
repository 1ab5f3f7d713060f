"""Pickles read as data: numbers, texts, lists, tuples and dictionaries, numpy arrays and scalars, dense torch tensors.

Protocols 0 to 5 of Python 3, module paths of numpy 1 and 2. The reader, fewstep/untrusted/pickles.py, runs nothing that a file
says.
"""

from __future__ import annotations

import io
import os
from typing import Any

from fewstep.untrusted.arrays import data_symbols
from fewstep.untrusted.pickles import MAX_OPCODES, Budget, Reader, UnsafePickle
from fewstep.untrusted.text import read_bytes

__all__ = ["MAX_BYTES", "UnsafePickle", "load", "loads"]

MAX_BYTES = 2 << 30

# What a file may be that is no pickle, by its first bytes, and what to do about it.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (torch.save or .npz); read it with torch.load(weights_only=True) or numpy.load"),
    (b"\x93NUMPY", "a .npy array; read it with numpy.load(allow_pickle=False)"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "compressed, by gzip or its kin; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run: git lfs pull"),
)


def load(path: str | os.PathLike[str]) -> Any:
    """The plain data of one pickle; raises UnsafePickle, and never runs anything the file names.

    Tensors come back on the CPU without gradient, arrays writable. Costs about 2 us an opcode (a 14 MB noise file: a few dozen
    opcodes); arrays are copied twice.
    """
    return loads(read_bytes(path, MAX_BYTES), os.fspath(path))


def loads(data: bytes, name: str = "<bytes>", max_opcodes: int = MAX_OPCODES) -> Any:
    """The same of a pickle held in memory; `name` stands for it in messages."""
    for magic, what in _FOREIGN:
        if data.startswith(magic):
            raise UnsafePickle(f"{name}: not a pickle but {what}.")
    stream = io.BytesIO(data)
    budget = Budget(len(data), max_opcodes)
    symbols = data_symbols(budget)
    if b"torch" in data:
        from fewstep.untrusted.torch_files import storage_symbols

        symbols |= storage_symbols(name, budget)
    value = Reader(stream, name, budget, symbols).run()
    if rest := len(data) - stream.tell():
        raise UnsafePickle(f"{name}: damaged, {rest:,} bytes follow the end of the pickle. Write the file again.")
    return value
