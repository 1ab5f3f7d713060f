"""What torch.save writes, by the reader of pickles: the zip archive of today, and the row of pickles of before torch 1.6.

`torch.load`, even with weights_only=True, makes room for what a header claims, unpacks what is compressed without end, and
takes quadratic time for keys with equal hashes. Tensors of a file are mapped: they cost memory when they are used.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fewstep.untrusted.arrays import data_symbols, shape_of
from fewstep.untrusted.pickles import (
    Budget,
    Builder,
    Pending,
    Reader,
    RefusalError,
    Symbols,
    UnsafePickle,
    exactly,
)
from fewstep.untrusted.text import opened

_ELEMENTS = {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64, "Byte": torch.uint8,
    "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_STORAGES: Symbols = {f"torch.{name}Storage": dtype for name, dtype in _ELEMENTS.items()}
_STORAGES |= {"torch.storage.UntypedStorage": torch.uint8}  # of bytes; what is in them is said with each tensor
_MAGIC = 0x1950A86A20F9469CFC6C  # of the old format, which a pickled tensor carries
_VERSION = 1001
_MAX_EXPANDED = 2**20  # elements of a tensor that shows others more than once


class _Storage:
    """The elements of a storage as bytes, until tensors are laid over them."""

    def __init__(self, identity: tuple[torch.dtype, str, int]):
        self.dtype, _, self.num = identity
        self.flat: Tensor | None = None  # uint8

    def fill(self, buffer: mmap.mmap | bytearray, start: int, size: int) -> None:
        """Maps its elements from `size` bytes, which begin at `start`."""
        if size != self.num * self.dtype.itemsize or start + size > len(buffer):
            kind = str(self.dtype).removeprefix("torch.")
            raise RefusalError(f"a torch storage of {self.num:,} {kind} from {min(size, len(buffer) - start):,} bytes")
        self.flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0).byte()


def load_torch(path: str | os.PathLike[str]) -> Any:  # Any: whatever was saved, out of tensors and plain containers
    """What torch.save wrote into a file, its tensors mapped from it. Raises UnsafePickle, or OSError; runs nothing."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UnsafePickle(f"{os.fspath(path)}: is empty. Write or download it again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _load(file, mapped, os.fspath(path), verifies=False)


def load_torch_bytes(content: bytes, name: str) -> Any:  # as load_torch
    """The same of bytes; that they are as they were written is verified."""
    return _load(io.BytesIO(content), bytearray(content), name, verifies=True)


def storage_symbols(name: str, budget: Budget) -> Mapping[str, Builder]:
    """The names of tensors inside of an ordinary pickle, where each carries its storage as torch.save wrote it."""

    def storage(raw: Any) -> _Storage:
        if exactly(raw, bytes).startswith(b"PK"):
            raise RefusalError("a torch storage in a zip archive")
        budget.charge(len(raw))
        root = _old(io.BytesIO(raw), bytearray(raw), f"{name} (torch storage)", budget, _STORAGES)
        if not isinstance(root, _Storage):
            raise RefusalError("a torch object other than one storage")
        return root

    def tensor(data: Any, offset: Any, size: Any, stride: Any, *metadata: Any) -> Tensor:
        view = _tensor(data, offset, size, stride, expanded=0)
        budget.charge(view.numel() * view.itemsize)
        return view.clone(memory_format=torch.contiguous_format)

    return {"torch.storage._load_from_bytes": storage, "torch._utils._rebuild_tensor_v2": tensor}


# --- parts of the above


def _load(file: BinaryIO, buffer: mmap.mmap | bytearray, name: str, verifies: bool) -> Any:
    budget = Budget(len(buffer))
    symbols = {**data_symbols(budget), **_SYMBOLS}
    try:
        if buffer[:2] == b"PK":
            return _zip(file, buffer, name, budget, symbols, verifies)
        return _old(file, buffer, name, budget, symbols)
    except UnsafePickle:
        raise
    except (RefusalError, zipfile.BadZipFile, EOFError, ValueError, LookupError, OverflowError, NotImplementedError) as error:
        problem = f"not tensors that can be read without running code: {str(error) or 'it ends too early'}"
        raise UnsafePickle(f"{name}: {problem}. Write or download it again") from None


def _zip(
    file: BinaryIO, buffer: mmap.mmap | bytearray, name: str, budget: Budget, symbols: Symbols, verifies: bool
) -> Any:  # as load_torch
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise RefusalError("it holds two entries of one name")
        packed = next((e for e in entries.values() if e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1), None)
        if packed is not None or sum(entry.file_size for entry in entries.values()) > len(buffer):
            raise RefusalError("its entries are compressed, which torch.save never does")
        starts = [entry.removesuffix("data.pkl") for entry in entries if entry.endswith("/data.pkl")]
        if len(starts) != 1:
            raise RefusalError(f"a zip archive with {len(starts)} data.pkl, which torch.save did not write")
        (start,) = starts
        order = entries.get(f"{start}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise RefusalError("tensors of a big-endian machine")

        storages: dict[str, _Storage] = {}

        def persistent(identity: Any) -> _Storage:
            storage = _identity(identity)
            key = storage[1]
            if key not in storages:
                storages[key] = _Storage(storage)
                storages[key].fill(buffer, *_place(buffer, entries[f"{start}data/{key}"], verifies))
            return storages[key]

        pickled = io.BytesIO(archive.read(f"{start}data.pkl"))
        return Reader(pickled, f"{name} (data.pkl)", budget, symbols, persistent).run()


def _place(buffer: mmap.mmap | bytearray, entry: zipfile.ZipInfo, verifies: bool) -> tuple[int, int]:
    """The first byte of an entry and their number."""
    at = entry.header_offset
    header = buffer[at : at + 30]
    if header[:4] != b"PK\x03\x04":
        raise RefusalError("its table of contents does not fit the archive")
    start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if verifies and zlib.crc32(memoryview(buffer)[start : start + entry.file_size]) != entry.CRC:
        raise RefusalError("its content is not what was written")
    return start, entry.file_size


def _old(file: BinaryIO, buffer: mmap.mmap | bytearray, name: str, budget: Budget, symbols: Symbols) -> Any:  # as load_torch
    """Pickles in a row: a number, a version, the machine, the value, the keys of storages; then their sizes and elements."""
    storages: dict[str, _Storage] = {}

    def persistent(identity: Any) -> _Storage:
        storage = _identity(identity)
        return storages.setdefault(storage[1], _Storage(storage))

    def part(symbols: Symbols) -> Any:
        return Reader(file, name, budget, symbols, persistent).run()

    if part({}) != _MAGIC or part({}) != _VERSION:
        raise RefusalError("no file of torch.save, or one of an unknown format")
    system = part({})
    if type(system) is not dict or system.get("little_endian") is not True:
        raise RefusalError("tensors of a big-endian machine")
    at = file.tell()
    part({**symbols, **_NO_TENSORS})  # which storages there are, by `persistent`; what they hold follows
    keys = part({})
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise RefusalError("its storages are not those that its tensors name")
    place = file.tell()
    for key in keys:
        size = int.from_bytes(buffer[place : place + 8], "little") * storages[key].dtype.itemsize
        storages[key].fill(buffer, place + 8, size)
        place += 8 + size
    file.seek(at)
    return part(symbols)


def _identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """The type, the key and the number of elements of a storage that a stream names."""
    tag, dtype, key, _, num, *view = exactly(identity, tuple)
    if tag != "storage" or any(part is not None for part in view):
        raise RefusalError("a torch object other than a storage")
    return exactly(dtype, torch.dtype), exactly(key, str), exactly(num, int)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None, expanded: int = _MAX_EXPANDED
) -> Tensor:
    """A view of a storage. One that shows elements more than once is small: a byte could claim to be a terabyte."""
    element: torch.dtype = dtype or exactly(storage, _Storage).dtype
    size, stride = shape_of(size), shape_of(stride)
    if storage.flat is None:
        raise RefusalError("a tensor of a storage that is not there")
    num = math.prod(size)
    if num == 0:
        return torch.zeros(size, dtype=element)
    there = len(storage.flat) // element.itemsize
    last = exactly(offset, int) + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or last >= there or num > max(there, expanded):
        raise RefusalError(f"a tensor of shape {size!s:.80} of {element} from {len(storage.flat):,} bytes")
    flat: Tensor = storage.flat
    if flat.data_ptr() % element.itemsize:
        flat = flat.clone()
    flat = flat.ne(0) if element == torch.bool else flat[: there * element.itemsize].view(element)  # a bool must not hold 2
    return flat.as_strided(size, stride, offset)


_NO_TENSORS: Symbols = dict.fromkeys(("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"), lambda *_: None)
_SYMBOLS: Symbols = {
    **_STORAGES,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    "torch._utils._rebuild_tensor_v2": lambda data, offset, size, stride, *_: _tensor(data, offset, size, stride),
    "torch._utils._rebuild_tensor_v3": lambda data, offset, size, stride, gradient, hooks, dtype, *_: _tensor(
        data, offset, size, stride, exactly(dtype, torch.dtype)
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: exactly(data, Tensor),
    "torch.Size": lambda sizes: torch.Size(shape_of(tuple(exactly(sizes, tuple)))),
    **dict.fromkeys(
        ("torch.device", "torch.serialization._get_layout"), lambda *args: args[0] if args else ""
    ),  # as plain data
    "_io.BytesIO": lambda: Pending(lambda state: exactly(exactly(state, tuple)[0], bytes)),  # of Transformer Engine
}
