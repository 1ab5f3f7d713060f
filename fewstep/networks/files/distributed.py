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
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import new_file, plain_name
from fewstep.untrusted.arrays import data_symbols, shape_of
from fewstep.untrusted.pickles import (
    Budget,
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
    entries, places = _table(folder / ".metadata")
    others = [name for name, entry in entries.items() if not entry]
    if only_tensors and others:
        raise UserError(f"'{folder}': its entry {others[0]} is no tensor, and is not read")
    with fault_of(folder / ".metadata"):
        tensors = {name: entry for name, entry in entries.items() if entry}
        sizes = {(name, shape_of(c["offsets"])): shape_of(c["sizes"]) for name, e in tensors.items() for c in e["chunks"]}
        chunks: dict[str, list[Chunk]] = {name: [] for name in tensors}
        for (name, offsets), info in places.items():
            file = plain_name(info["relative_path"], f"'{folder}': its table of contents names the file")
            if (name, offsets) in sizes:
                if info.get("transform_descriptors"):
                    kinds = ", ".join(info["transform_descriptors"])
                    raise UserError(f"'{folder}' is compressed ({kinds}), which is not read here")
                chunk = Chunk(offsets, sizes[name, offsets], folder / file, info["offset"], info["length"])
                chunks[name].append(chunk)
        result: dict[str, Stored] = {}
        for name, entry in tensors.items():
            shape, dtype = shape_of(tuple(entry["size"])), entry["properties"]
            read_part = partial(_read, folder, name, shape, dtype, chunks[name])
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
            result[_slices(starts, ends, offsets)] = whole.detach()[_slices(starts, ends, chunk.offsets)]
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


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - first, end - first) for start, end, first in zip(starts, ends, origin, strict=True))


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks share an element. Chunks lie in order along one axis wherever a process has a slice of a tensor."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    axes = [axis for axis, starts in enumerate(zip(*(chunk.offsets for chunk in chunks), strict=True)) if len(set(starts)) > 1]
    pairs = pairwise(ordered) if len(axes) == 1 else combinations(ordered, 2)
    extents = (zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True) for a, b in pairs)
    return any(all(start < other + m and other < start + n for start, n, other, m in each) for each in extents)


# The entries by name: size, properties (the type) and chunks of a tensor, () for what is none; and by name and offsets, where
# each chunk lies: relative_path, offset, length.
_Table = tuple[Mapping[str, Mapping[str, Any]], Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]]


def _table(path: Path) -> _Table:
    """The table of contents of a distributed checkpoint, without running it."""
    try:
        content = read_bytes(path, _MAX_METADATA_BYTES)
        budget = Budget(len(content), 4 * len(content))
        metadata = Reader(io.BytesIO(content), str(path), budget, {**data_symbols(budget), **_SYMBOLS}).run()
        check_result(metadata, str(path))
        return exactly(metadata["state_dict_metadata"], dict), metadata["storage_data"] or {}
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
    **{f"{_METADATA}.{name}": _record for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "StorageMeta")},
    f"{_FILES}._StorageInfo": _record,
    f"{_METADATA}.BytesStorageMetadata": _plain,
    f"{_METADATA}.TensorProperties": _properties,
    f"{_METADATA}.MetadataIndex": _index,
    f"{_METADATA}._MEM_FORMAT_ENCODING": _plain,
    "torch.Size": lambda sizes: shape_of(sizes),
    "torch.serialization._get_layout": _plain,
    "pathlib.PosixPath": _plain,
    "pathlib._local.PosixPath": _plain,
    **{str(dtype): dtype for dtype in SAFETENSORS_NAMES},
}


# --- writing


@dataclass(frozen=True, eq=False)
class _Record:
    """An object of a class of the format, made with `args`, its fields or whatever its class makes of `state`."""

    kind: str
    state: Any = None
    args: tuple[Any, ...] = ()


_PICKLER: Any = pickle._Pickler  # the one in Python: it can name a class without importing it; typeshed leaves it out


class _Pickler(_PICKLER):
    def save_record(self, record: _Record) -> None:
        module, _, name = record.kind.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.save(record.args)
        self.write(pickle.REDUCE if record.args else pickle.NEWOBJ)
        if record.state is not None:
            self.save(record.state)
            self.write(pickle.BUILD)

    dispatch: ClassVar[dict[type, Any]] = {**_PICKLER.dispatch, _Record: save_record}


def write_distributed(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint into a folder that exists, as DCP does in a process alone; `dcp.load` reads it in any layout."""
    file = "__0_0.distcp"
    entries: dict[str, _Record] = {}
    places: dict[_Record, _Record] = {}
    for name, start, length in write_chunks(folder / file, tensors):
        tensor = tensors[name]
        origin = torch.Size([0] * tensor.ndim)
        form = tensor.dtype, torch.strided, False, _Record(f"{_METADATA}._MEM_FORMAT_ENCODING", args=(0,)), False
        chunk = _Record(f"{_METADATA}.ChunkStorageMetadata", {"offsets": origin, "sizes": tensor.shape})
        entry = {"properties": _Record(f"{_METADATA}.TensorProperties", form), "size": tensor.shape, "chunks": [chunk]}
        entries[name] = _Record(f"{_METADATA}.TensorStorageMetadata", entry)
        place = _Record(f"{_METADATA}.MetadataIndex", {"fqn": name, "offset": origin, "index": 0})
        places[place] = _Record(f"{_FILES}._StorageInfo", {"relative_path": file, "offset": start, "length": length})
    fields = {"state_dict_metadata": entries, "planner_data": {name: (name,) for name in entries}, "storage_data": places}
    with new_file(folder / ".metadata") as metadata:
        record = _Record(f"{_METADATA}.Metadata", fields | {"storage_meta": None, "version": "1.0.0"})
        _Pickler(metadata, protocol=4).dump(record)


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
