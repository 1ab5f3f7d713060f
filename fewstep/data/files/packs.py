"""Packs: thousands of small samples in a few memory-mapped files, made once, read in microseconds.

    DIR/latents/packs/00000.safetensors     one tensor `data`, rows one after another; the header says what each row is

    with open_writer(folder, {"codec": "9f2c...", "dtype": "float16"}) as writer:
        for label in labels:
            writer.put(label, lambda: encode(label))           # not called for rows that are there
    packs = open_packs(folder, made_from={"codec": "9f2c..."})   # ValueError if another codec made it
    packs.read(0), packs.rows[0].stem

A label identifies a row: sample, first frame, and the hash of the bytes it was made from. So a clip that changed is encoded
again, and a clip that only moved is not. Rows that wait for a full pack lie in `.making/`, each whole or not there: a command
that is killed and run again makes no row twice, and its packs have the same bytes as those of one that was never killed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import MinLen
from pydantic import with_config
from torch import Tensor

from fewstep.data.files import cache, video
from fewstep.errors import UserError
from fewstep.files import lock, remove, write_tensors
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.text import Amount, Count, Name, parse_json

FOLDER, MAKING, LOCK = "packs", ".making", ".lock"
_AGAIN = "Delete it and prepare it again"


@with_config({"extra": "forbid"})  # a row of a file with other keys is refused
@dataclass(frozen=True)
class Label:
    """The sample of a row, and the content it was made from."""

    stem: Name  # files are named after it
    content: str  # hash of the bytes it was made from
    start: Count = 0  # first frame of its window in the file; 0 for whole clips and texts
    facts: Mapping[str, Amount] = field(default_factory=dict[str, float])  # what a reader wants to know: fps, num_frames

    @property
    def key(self) -> tuple[str, int, str]:
        return self.stem, self.start, self.content


@dataclass(frozen=True)
class Packs:
    """The rows of all packs of a folder, in the order of (stem, start). Opening reads headers alone."""

    folder: Path
    made_from: Mapping[str, str]
    rows: tuple[Label, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each row
    _places: tuple[tuple[_Pack, int], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Tensor:
        """A row, in the precision of the file: C T H W for latents, tokens D for texts."""
        pack, number = self._places[row]
        return pack.row(number).reshape(self.shapes[row]).clone()

    def video_size(self) -> video.Size | None:
        """The height and width that its clips were resized to; None: each kept its own."""
        size = self.made_from.get("video_size", "own")
        if size == "own":
            return None
        numbers = [int(number) for number in re.findall(r"\d{1,9}", size)]
        if len(numbers) != 2:
            raise UserError(f"{self.folder}: damaged, its video_size is {size!r}. {_AGAIN}")
        video.refuse_size(self.folder, *numbers)
        return numbers[0], numbers[1]

    def by_stem(self) -> dict[str, list[int]]:
        """The rows of each sample; a clip with several windows has as many."""
        out = defaultdict[str, list[int]](list)
        for number, row in enumerate(self.rows):
            out[row.stem].append(number)
        return dict(out)


def has_packs(folder: str | os.PathLike[str]) -> bool:
    """Whether a part of a data set, DIR/latents for instance, is packed."""
    return bool(_files(Path(folder) / FOLDER))


def open_packs(folder: str | os.PathLike[str], made_from: Mapping[str, str] | None = None) -> Packs:
    """The packs of a part; refuses damaged ones, two of different origin, and those not made from what `made_from` says."""
    place = Path(folder) / FOLDER
    files = _files(place)
    if not files:
        raise FileNotFoundError(f"{place}: no packs there")
    packs = [_Pack.open(file) for file in files]
    for pack in packs:
        _refuse_other(pack, packs[0].index.made_from | dict(made_from or {}))
    order = sorted(
        ((label.stem, label.start), pack.path, number, pack) for pack in packs for number, label in enumerate(pack.index.rows)
    )
    twice = [here[0][0] for here, after in pairwise(order) if here[0] == after[0]]
    if twice:
        raise UserError(f"{place}: holds two rows of {twice[0]}. Run the same `fewstep prepare` again: it drops the stale one")
    return Packs(
        folder=Path(folder),
        made_from=packs[0].index.made_from,
        rows=tuple(pack.index.rows[number] for _, _, number, pack in order),
        shapes=tuple(pack.row_shape(number) for _, _, number, pack in order),
        _places=tuple((pack, number) for _, _, number, pack in order),
    )


@contextmanager
def open_writer(
    folder: str | os.PathLike[str], made_from: Mapping[str, str], *, pack_bytes: int = 2**28, lengths_differ: bool = False
) -> Iterator[Writer]:
    """Adds rows to the packs of a folder, one process at a time; what is there already is not made again.

    Rows go into packs in the order of `put`, rows of one shape together, about `pack_bytes` to a pack. With `lengths_differ`
    the first axis of a row counts tokens, and rows of different lengths share a pack.
    """
    place = Path(folder) / FOLDER
    with lock(place / LOCK):
        writer = Writer(place, dict(made_from), pack_bytes, lengths_differ)
        yield writer
        writer.finish()


class Writer:
    """What `open_writer` gives."""

    def __init__(self, place: Path, made_from: dict[str, str], pack_bytes: int, lengths_differ: bool):
        self.place, self.made_from, self.pack_bytes, self.lengths_differ = place, made_from, pack_bytes, lengths_differ
        self.new = 0  # rows that `put` had to make
        self._waiting = defaultdict[tuple[int, ...], list[Label]](list)  # by shape of a row
        self._waiting_bytes = Counter[tuple[int, ...]]()
        packs = [_Pack.open(file) for file in _files(place)]
        for pack in packs:
            _refuse_other(pack, dict.fromkeys(pack.index.made_from, "left out") | made_from)
        self._packed = {label.key for pack in packs for label in pack.index.rows}

    def finish(self) -> None:
        """Writes the rows that wait."""
        for group in list(self._waiting):
            self._write(group)
        remove(self.place / MAKING)

    def has(self, label: Label) -> bool:
        """Whether a row is packed, or waits for a full pack."""
        return label.key in self._packed or self._loose(label).is_file()

    def keep_only(self, labels: Collection[Label]) -> int:
        """Drops every packed row that is none of `labels`: clips that changed or are gone. How many there were."""
        keys, dropped = {label.key for label in labels}, 0
        for file in _files(self.place):
            pack = _Pack.open(file)
            live = [number for number, label in enumerate(pack.index.rows) if label.key in keys]
            if len(live) == len(pack.index.rows):
                continue
            dropped += len(pack.index.rows) - len(live)
            if live:
                rows = [pack.row(number).clone() for number in live]
                _write_pack(file, [pack.index.rows[number] for number in live], rows, self.made_from, pack.index.lengths_differ)
            else:
                remove(file)
        self._packed &= keys
        return dropped

    def put(self, label: Label, make: Callable[[], Tensor]) -> None:
        """A row, made by `make` unless it is there. Refuses numbers that are not finite (an overflow of 16 bits, too)."""
        if label.key in self._packed:
            return
        path, origin, shape = self._loose(label), self.made_from | {"content": label.content}, None
        with suppress(OSError, UserError, KeyError):  # a damaged or foreign file there is ours alone: it is made again
            shape = cache.read(path, made_from=origin).shapes["data"]
        if shape is None:
            tensor = make()
            if num := int((~torch.isfinite(tensor)).sum()):
                raise UserError(f"{label.stem}: {num} of {tensor.numel()} numbers are not finite in {tensor.dtype}")
            cache.write(path, {"data": tensor}, made_from=origin, facts=label.facts)
            self.new += 1
            shape = tuple(tensor.shape)
        group = shape[1:] if self.lengths_differ else shape
        self._waiting[group].append(label)
        self._waiting_bytes[group] += path.stat().st_size
        self._packed.add(label.key)
        if self._waiting_bytes[group] >= self.pack_bytes:
            self._write(group)

    def _write(self, group: tuple[int, ...]) -> None:
        """Writes the waiting rows of a group as the next pack."""
        labels = self._waiting.pop(group)
        del self._waiting_bytes[group]
        parts = [cache.read(self._loose(label)).tensors["data"] for label in labels]
        if not self.lengths_differ:
            parts = [part[None] for part in parts]
        number = max((int(file.stem) for file in _files(self.place)), default=-1) + 1
        _write_pack(self.place / f"{number:05d}.safetensors", labels, parts, self.made_from, self.lengths_differ)
        for label in labels:
            remove(self._loose(label))

    def _loose(self, label: Label) -> Path:
        return self.place / MAKING / f"{label.stem}.{label.start}.safetensors"


# ---- one file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """The metadata of a pack."""

    made_from: dict[str, str]
    rows: Annotated[tuple[Label, ...], MinLen(1)]
    spans: tuple[tuple[int, int], ...]  # of each row along the first axis
    lengths_differ: bool  # a row is several entries of the first axis, and not just one


@dataclass(frozen=True)
class _Pack:
    path: Path
    index: _Index
    data: Tensor  # mapped: a row costs memory while it is used

    def row(self, number: int) -> Tensor:
        return self.data[slice(*self.index.spans[number])]

    def row_shape(self, number: int) -> tuple[int, ...]:
        begin, end = self.index.spans[number]
        return (end - begin, *self.data.shape[1:]) if self.index.lengths_differ else tuple(self.data.shape[1:])

    @classmethod
    def open(cls, path: Path) -> _Pack:
        tensors, metadata = read_safetensors(path, _AGAIN)
        data = tensors.get("data", torch.empty(0))
        index = parse_json(metadata.get("pack", ""), f"{path}: damaged or no pack", _AGAIN, _Index)
        num, lengths = len(data) if data.ndim else 0, [end - begin for begin, end in index.spans]
        right = len(lengths) == len(index.rows) and all(0 <= begin < end <= num for begin, end in index.spans)
        if not right or not (index.lengths_differ or set(lengths) == {1}) or not data.is_floating_point():
            raise UserError(f"{path}: damaged, its index does not fit its data {tuple(data.shape)}. {_AGAIN}")
        return cls(path, index, data)


def _write_pack(
    path: Path, labels: Sequence[Label], parts: Sequence[Tensor], made_from: Mapping[str, str], lengths_differ: bool
) -> None:
    """One file of rows: `parts` are joined along their first axis, equal content once."""
    places, spans, unique, end = dict[tuple[str, int], tuple[int, int]](), list[tuple[int, int]](), list[Tensor](), 0
    for label, part in zip(labels, parts, strict=True):
        key = label.content, label.start
        if key not in places:
            places[key] = end, end + len(part)
            end += len(part)
            unique.append(part)
        spans.append(places[key])
    index = _Index(dict(made_from), tuple(labels), tuple(spans), lengths_differ)
    write_tensors(path, {"data": torch.cat(unique)}, {"pack": json.dumps(asdict(index), sort_keys=True)})


def _refuse_other(pack: _Pack, expected: Mapping[str, str]) -> None:
    advice = f"Ask for what it was made from, or remove {pack.path.parent}"
    cache.refuse_other(pack.path, pack.index.made_from, dict(sorted(expected.items())), advice)


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*.safetensors") if path.stem.isdigit() and path.is_file())
