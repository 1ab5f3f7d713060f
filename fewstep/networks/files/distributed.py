"""Distributed checkpoints, as torch.distributed.checkpoint (DCP) writes them, read and written without that package.

    FOLDER/.metadata      a pickle: the shape, the type and the chunks of each tensor, and where each chunk lies
    FOLDER/__0_0.distcp   chunks, one after the other, each as torch.save writes it; one file or more for each process

Importing DCP takes as long as importing torch (it imports DTensor, which imports sympy), and its reader unpickles whatever
`.metadata` says. Here the pickle goes through an unpickler that admits the dozen record classes of the format and nothing else;
the records become plain objects that hold their fields.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import new_file
from fewstep.networks.files.stored import SAFETENSORS_NAMES, Stored

_DAMAGE = (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError, ValueError, RuntimeError)


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
    metadata = read_metadata(folder)
    try:
        others = [name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)]
        if only_tensors and others:
            raise UserError(f"'{folder}': its entry {others[0]} is no tensor, and is not read")
        return _entries(folder, metadata)
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"'{folder / '.metadata'}' is not read: {error}") from error


def _entries(folder: Path, metadata: Any) -> dict[str, Stored]:
    chunks: dict[str, list[Chunk]] = {}
    sizes = {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
        for chunk in about.chunks
    }
    for index, info in (metadata.storage_data or {}).items():
        if Path(info.relative_path).name != info.relative_path:
            raise UserError(f"'{folder}': its table of contents names a file outside of it, {info.relative_path}")
        at = tuple(index.offset or ())
        if (index.fqn, at) in sizes:
            if getattr(info, "transform_descriptors", None):
                raise UserError(f"'{folder}' is compressed ({', '.join(info.transform_descriptors)}), which is not read here")
            chunk = Chunk(at, sizes[index.fqn, at], folder / info.relative_path, info.offset, info.length)
            chunks.setdefault(index.fqn, []).append(chunk)
    tensors: dict[str, Stored] = {}
    for name, about in metadata.state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata):
            shape, dtype = tuple(about.size), about.properties.dtype
            read_part = partial(_read, folder, name, shape, dtype, chunks.get(name, []))
            tensors[name] = Stored(shape, dtype, partial(read_part, [0] * len(shape), shape), read_part)
    return tensors


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
            with chunk.file.open("rb") as file:
                file.seek(chunk.start)
                whole: Tensor = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
            if whole.shape != chunk.sizes:
                raise ValueError(f"a chunk has the shape {tuple(whole.shape)}, where the table of contents says {chunk.sizes}")
            source = whole.detach()[tuple(map(slice, _less(starts, chunk.offsets), _less(ends, chunk.offsets)))]
            result[tuple(map(slice, _less(starts, offsets), _less(ends, offsets)))] = source
    except (*_DAMAGE, OSError) as error:
        raise UserError(f"'{folder}' cannot be read at {name}: {error}") from error
    return result


def _less(places: Sequence[int], offsets: Sequence[int]) -> list[int]:
    return [place - offset for place, offset in zip(places, offsets, strict=True)]


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks share an element. Chunks lie in order along one axis wherever a process has a slice of a tensor."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    axes = (
        [axis for axis in range(len(ordered[0].offsets)) if len({chunk.offsets[axis] for chunk in chunks}) > 1]
        if chunks
        else []
    )
    if len(axes) == 1:
        (axis,) = axes
        return any(a.offsets[axis] + a.sizes[axis] > b.offsets[axis] for a, b in pairwise(ordered))
    return any(_meet(a, b) for number, a in enumerate(ordered) for b in ordered[number + 1 :])


def _meet(a: Chunk, b: Chunk) -> bool:
    extents = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in extents)


def read_metadata(folder: Path) -> Any:  # Any: a record of the format, whose fields are what the file says
    """The table of contents of a distributed checkpoint, without running it."""
    try:
        return _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except _DAMAGE as error:
        raise UserError(f"'{folder / '.metadata'}' is not read: {error}") from error


# --- the records of the format, by the names that they have there


class Record:
    """The fields of a record; `module` is where torch keeps its class."""

    module = "torch.distributed.checkpoint.metadata"

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


class Metadata(Record):
    state_dict_metadata: Mapping[str, Any]
    storage_data: Mapping[Any, Any] | None = None


class TensorStorageMetadata(Record):
    properties: TensorProperties
    size: torch.Size
    chunks: Sequence[ChunkStorageMetadata]


class BytesStorageMetadata(Record):
    pass


class ChunkStorageMetadata(Record):
    offsets: torch.Size
    sizes: torch.Size


class TensorProperties(Record):
    state: tuple[Any, ...]  # dtype, layout, requires_grad, memory format, pin_memory

    def __getstate__(self) -> tuple[Any, ...]:
        return self.state

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    @property
    def dtype(self) -> torch.dtype:
        return self.state[0]


class MetadataIndex(Record):
    fqn: str
    offset: torch.Size | None = None
    index: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetadataIndex) and (self.fqn, self.offset) == (other.fqn, other.offset)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


class StorageMeta(Record):
    pass


class _StorageInfo(Record):
    module = "torch.distributed.checkpoint.filesystem"
    relative_path: str
    offset: int
    length: int


class _MEM_FORMAT_ENCODING(Record):  # noqa: N801  # the name that torch gives it
    value: int

    def __init__(self, value: int):
        super().__init__(value=value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.value,)


_RECORDS = {(record.module, record.__name__): record for record in Record.__subclasses__()}
_GLOBALS = frozenset(
    [
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        *(("torch", str(dtype).removeprefix("torch.")) for dtype in SAFETENSORS_NAMES),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    ]
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which a table of contents has no use for")
        return super().find_class(module, name)


# --- writing


def write_distributed(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint into a folder that exists, as DCP does in a process alone; `dcp.load` reads it in any layout."""
    name_of_file = "__0_0.distcp"
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, start, length in write_chunks(folder / name_of_file, tensors):
        tensor = tensors[name]
        origin = torch.Size([0] * tensor.ndim)
        properties = TensorProperties(state=(tensor.dtype, torch.strided, False, _MEM_FORMAT_ENCODING(0), False))
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
