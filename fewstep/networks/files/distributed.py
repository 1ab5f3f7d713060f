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
from operator import sub
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
    result: dict[str, Stored] = {}
    with fault_of(folder / ".metadata"):
        for name, entry in entries.items():
            if entry:
                shape, dtype = shape_of(tuple(entry["size"])), entry["properties"]
                parts = {shape_of(chunk["offsets"]): shape_of(chunk["sizes"]) for chunk in entry["chunks"]}
                chunks = [_chunk(folder, at, parts[at], places[name, at]) for at in parts if (name, at) in places]
                read_part = partial(_read, folder, name, dtype, chunks)
                result[name] = Stored(shape, dtype, partial(read_part, [0] * len(shape), shape), read_part)
    return result


def _chunk(folder: Path, offsets: tuple[int, ...], sizes: tuple[int, ...], place: Mapping[str, Any]) -> Chunk:
    file = plain_name(place["relative_path"], f"'{folder}': its table of contents names the file")
    if place.get("transform_descriptors"):
        raise UserError(f"'{folder}' is compressed ({', '.join(place['transform_descriptors'])}), which is not read here")
    return Chunk(offsets, sizes, folder / file, place["offset"], place["length"])


def _read(
    folder: Path, name: str, dtype: torch.dtype, chunks: Sequence[Chunk], offsets: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """The part of a tensor that begins at `offsets` and has `sizes`; of the chunks only those are read that reach into it."""
    try:
        cuts = [(chunk, *_common(chunk, offsets, sizes)) for chunk in chunks]
        parts = [cut for cut in cuts if all(start < end for start, end in zip(cut[1], cut[2], strict=True))]
        if sum(math.prod(map(sub, ends, starts)) for _, starts, ends in parts) != math.prod(sizes):
            raise ValueError("its chunks are not the whole of it")
        result = torch.empty(tuple(sizes), dtype=dtype)
        filled = torch.zeros(tuple(sizes), dtype=torch.bool)
        for chunk, starts, ends in parts:
            whole: Tensor = exactly(load_torch_bytes(_bytes_of(chunk), name), Tensor)
            if whole.shape != chunk.sizes or whole.dtype != dtype:
                raise ValueError(
                    f"a chunk is {whole.dtype} {tuple(whole.shape)}, where the table of contents says {dtype} {chunk.sizes}"
                )
            place = _slices(starts, ends, offsets)
            if filled[place].any():
                raise ValueError("two of its chunks overlap")
            filled[place] = True
            result[place] = whole.detach()[_slices(starts, ends, chunk.offsets)]
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


def _common(chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where the part that a chunk and a request have in common begins and ends; not after its begin where there is none."""
    ends = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
    return list(map(max, chunk.offsets, offsets)), ends


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - first, end - first) for start, end, first in zip(starts, ends, origin, strict=True))


# The entries by name: size, properties (the type) and chunks of a tensor, () for what is none; and by name and offsets, where
# each chunk lies: relative_path, offset, length.
_Table = tuple[Mapping[str, Mapping[str, Any]], Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]]


def _table(path: Path) -> _Table:
    """The table of contents of a distributed checkpoint, without running it."""
    try:
        content = read_bytes(path, _MAX_METADATA_BYTES)
        budget = Budget(len(content), opcodes=len(content))
        metadata = Reader(io.BytesIO(content), str(path), budget, {**data_symbols(budget), **_SYMBOLS}).run()
        return exactly(metadata["state_dict_metadata"], dict), metadata["storage_data"] or {}
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
