"""Distributed checkpoints, as torch.distributed.checkpoint (DCP) writes them, read and written without that package.

    FOLDER/.metadata      a pickle: the shape, the type and the chunks of each tensor, and where each chunk lies
    FOLDER/__0_0.distcp   chunks, one after the other, each as torch.save writes it; one file or more for each process

Importing DCP takes as long as importing torch (it imports DTensor, which imports sympy), and its reader unpickles whatever
`.metadata` says. Here the pickle is read by fewstep/untrusted/pickles.py, which admits the dozen record classes of the format
and nothing else, as plain data.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import new_file
from fewstep.untrusted.arrays import data_symbols, shape_of
from fewstep.untrusted.pickles import (
    Budget,
    Constant,
    Object,
    Pending,
    Reader,
    Symbols,
    UnsafePickle,
    check_result,
    exactly,
)
from fewstep.untrusted.stored import SAFETENSORS_NAMES, Stored
from fewstep.untrusted.text import fault_of, opened, read_bytes
from fewstep.untrusted.torch_files import load_torch_bytes

_MAX_METADATA_BYTES = 2**28


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def open_distributed(folder: Path, only_tensors: bool = False) -> dict[str, Stored]:
    """The tensors of a checkpoint by their names in it; read when asked for, whole or a part of each.

    Entries that are no tensors are pickles; they are left out, or with `only_tensors` refused. Raises UserError.
    """
    table = read_metadata(folder)
    others = [name for name, entry in table.tensors.items() if not entry]
    if only_tensors and others:
        raise UserError(f"'{folder}': its entry {others[0]} is no tensor, and is not read")
    with fault_of(folder / ".metadata"):
        return _entries(folder, table)


def _entries(folder: Path, table: Table) -> dict[str, Stored]:
    tensors = {name: entry for name, entry in table.tensors.items() if entry}
    sizes = {(name, shape_of(c["offsets"])): shape_of(c["sizes"]) for name, entry in tensors.items() for c in entry["chunks"]}
    chunks: dict[str, list[Chunk]] = {}
    for (name, offsets), info in table.places.items():
        if Path(info["relative_path"]).name != info["relative_path"]:
            raise UserError(f"'{folder}': its table of contents names a file outside of it, {info['relative_path']}")
        if (name, offsets) in sizes:
            if info.get("transform_descriptors"):
                raise UserError(
                    f"'{folder}' is compressed ({', '.join(info['transform_descriptors'])}), which is not read here"
                )
            chunk = Chunk(offsets, sizes[name, offsets], folder / info["relative_path"], info["offset"], info["length"])
            chunks.setdefault(name, []).append(chunk)
    result: dict[str, Stored] = {}
    for name, entry in tensors.items():
        shape, dtype = shape_of(tuple(entry["size"])), entry["properties"]
        read_part = partial(_read, folder, name, shape, dtype, chunks.get(name, []))
        result[name] = Stored(shape, dtype, partial(read_part, [0] * len(shape), shape), read_part)
    return result


def _read(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    chunks: Sequence[Chunk],
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """The part of a tensor that begins at `offsets` and has `sizes`; of the chunks only those are read that reach into it."""
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape) or _overlap(chunks):
        raise UserError(f"'{folder}' cannot be read at {name}: its chunks are not the whole of it")
    try:
        result = torch.empty(tuple(sizes), dtype=dtype)
        for chunk in chunks:
            starts = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
            if any(end <= start for start, end in zip(starts, ends, strict=True)):
                continue
            whole: Tensor = exactly(load_torch_bytes(_bytes_of(chunk), name), Tensor)
            if whole.shape != chunk.sizes or whole.dtype != dtype:
                raise ValueError(
                    f"a chunk is {whole.dtype} {tuple(whole.shape)}, where the table of contents says {dtype} {chunk.sizes}"
                )
            source = whole.detach()[tuple(map(slice, _less(starts, chunk.offsets), _less(ends, chunk.offsets)))]
            result[tuple(map(slice, _less(starts, offsets), _less(ends, offsets)))] = source
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"'{folder}' cannot be read at {name}: {error}") from error
    return result


def _bytes_of(chunk: Chunk) -> bytes:
    with opened(chunk.file) as file:
        size = os.fstat(file.fileno()).st_size
        if not 0 <= chunk.start <= chunk.start + chunk.length <= size:
            raise UserError(f"{chunk.file.name} has {size:,} bytes, and its last one here is {chunk.start + chunk.length:,}")
        file.seek(chunk.start)
        return file.read(chunk.length)


def _less(places: Sequence[int], offsets: Sequence[int]) -> list[int]:
    return [place - offset for place, offset in zip(places, offsets, strict=True)]


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks share an element. Chunks lie in order along one axis wherever a process has a slice of a tensor."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    axes = [axis for axis, starts in enumerate(zip(*(chunk.offsets for chunk in chunks), strict=True)) if len(set(starts)) > 1]
    return any(_meet(a, b) for a, b in (pairwise(ordered) if len(axes) == 1 else combinations(ordered, 2)))


def _meet(a: Chunk, b: Chunk) -> bool:
    extents = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in extents)


@dataclass(frozen=True)
class Table:
    """The table of contents of a checkpoint, as plain data."""

    tensors: Mapping[str, Mapping[str, Any]]  # size, properties (the type), chunks; {} for what is no tensor
    places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]  # by name and offsets: relative_path, offset, length


def read_metadata(folder: Path) -> Table:
    """The table of contents of a distributed checkpoint, without running it."""
    path = folder / ".metadata"
    try:
        content = read_bytes(path, _MAX_METADATA_BYTES)
        budget = Budget(len(content), 4 * len(content))
        metadata = Reader(str(path), budget, {**data_symbols(budget), **_SYMBOLS}).run(io.BytesIO(content))
        check_result(metadata, str(path))
        return Table(exactly(metadata["state_dict_metadata"], dict), metadata["storage_data"] or {})
    except UnsafePickle as error:
        reason = f"it wants to load {error.wants}, which a table of contents has no use for" if error.wants else str(error)
        raise UserError(f"'{path}' is not read: {reason}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not read: it lacks {error}") from None


def _record() -> Pending:
    """An object whose fields follow; as plain data, a mapping of them."""
    return Pending(lambda fields: exactly(fields, dict))


def _properties() -> Pending:
    return Pending(lambda state: exactly(exactly(state, tuple)[0], torch.dtype))


def _index() -> Pending:
    return Pending(lambda fields: (exactly(fields["fqn"], str), tuple(fields.get("offset") or ())))


def _plain(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_SYMBOLS: Symbols = {
    **{
        f"{_METADATA}.{name}": Object(_record)
        for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "StorageMeta")
    },
    f"{_FILES}._StorageInfo": Object(_record),
    f"{_METADATA}.BytesStorageMetadata": Object(dict),
    f"{_METADATA}.TensorProperties": Object(_properties),
    f"{_METADATA}.MetadataIndex": Object(_index),
    f"{_METADATA}._MEM_FORMAT_ENCODING": _plain,
    "torch.Size": lambda sizes: shape_of(sizes),
    "torch.serialization._get_layout": _plain,
    "pathlib.PosixPath": _plain,
    "pathlib._local.PosixPath": _plain,
    **{str(dtype): Constant(dtype) for dtype in SAFETENSORS_NAMES},
}


# --- writing: the records of the format, by the names that they have there


class Record:
    """The fields of a record; `module` is where torch keeps its class."""

    module = "torch.distributed.checkpoint.metadata"

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


class Metadata(Record): ...


class TensorStorageMetadata(Record): ...


class ChunkStorageMetadata(Record): ...


class MetadataIndex(Record): ...


class TensorProperties(Record):
    state: tuple[Any, ...]  # dtype, layout, requires_grad, memory format, pin_memory

    def __getstate__(self) -> tuple[Any, ...]:
        return self.state


class _StorageInfo(Record):
    module = "torch.distributed.checkpoint.filesystem"


class _MEM_FORMAT_ENCODING(Record):  # noqa: N801  # the name that torch gives it
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.__dict__["value"],)


def write_distributed(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint into a folder that exists, as DCP does in a process alone; `dcp.load` reads it in any layout."""
    name_of_file = "__0_0.distcp"
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, start, length in write_chunks(folder / name_of_file, tensors):
        tensor = tensors[name]
        origin = torch.Size([0] * tensor.ndim)
        properties = TensorProperties(state=(tensor.dtype, torch.strided, False, _MEM_FORMAT_ENCODING(value=0), False))
        chunk = ChunkStorageMetadata(offsets=origin, sizes=tensor.shape)
        entries[name] = TensorStorageMetadata(properties=properties, size=tensor.shape, chunks=[chunk])
        place = MetadataIndex(fqn=name, offset=origin, index=0)
        places[place] = _StorageInfo(relative_path=name_of_file, offset=start, length=length)
    keys = {name: (name,) for name in entries}
    metadata = Metadata(state_dict_metadata=entries, planner_data=keys, storage_data=places, storage_meta=None, version="1.0.0")
    with new_file(folder / ".metadata") as file:
        _Pickler(file, protocol=4).dump(metadata)


def write_chunks(path: Path, tensors: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """Writes the tensors one after the other; returns the name, the start and the length of each."""
    places: list[tuple[str, int, int]] = []
    with new_file(path) as file:
        for name, tensor in tensors.items():
            start = file.tell()
            whole = tensor.detach().cpu()
            if whole.untyped_storage().nbytes() != whole.numel() * whole.element_size():
                whole = whole.clone()  # torch.save writes all of the memory of which a view shows a part
            torch.save(whole, file)
            places.append((name, start, file.tell() - start))
    return places


_PICKLER: Any = pickle._Pickler  # the one in Python: it can name a class without importing it; typeshed leaves it out


class _Pickler(_PICKLER):
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Record):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.__name__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)
