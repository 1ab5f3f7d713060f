"""Segmentations of whole clips, in the pickle layout of Cosmos-Transfer1.

    [{"phrase": "red sphere",
      "segmentation_mask_rle": {"data": {"size": [T*H*W, 1], "counts": b"..."}, "mask_shape": (T, H, W)}}, ...]

`data` is COCO's compressed run-length code of the clip laid out as one column. The prose that came with the layout says
`data` is bytes and `mask_shape` is (height, width); the code that reads it says otherwise, and so do the files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import Strict

from fewstep.data.files.arrays import write_pickle
from fewstep.data.safe_pickle import load as load_pickle
from fewstep.errors import UserError
from fewstep.untrusted.text import Count, typed

_MAX_GROUPS = 8  # of 5 bits in one number: 2^39 pixels; more is damage
_MAX_PIXELS = 2**36  # of a clip: 18 hours of 1080p at 1 fps; more is damage
Length = Annotated[int, Ge(1), Strict()]


@dataclass(frozen=True)
class Mask:
    """Where one object is, in every frame of its clip."""

    phrase: str
    shape: tuple[int, int, int]  # T H W
    ends: NDArray[np.int64]  # of the runs, in pixels from the first; runs are outside, inside, outside, ...

    @property
    def area(self) -> int:
        """Pixels inside, over all frames."""
        return int(np.diff(self.ends, prepend=0)[1::2].sum())

    def frames(self, places: Sequence[int]) -> NDArray[np.bool_]:
        """(len(places), H, W): unpacks these frames alone, so that a long clip never stands in memory."""
        pixels = self.shape[1] * self.shape[2]
        out = np.empty((len(places), *self.shape[1:]), dtype=bool)
        for row, place in enumerate(places):
            out[row] = _unpack(self.ends, place * pixels, (place + 1) * pixels).reshape(self.shape[1:])
        return out


@dataclass(frozen=True)
class _Code:
    size: tuple[Count, Count]
    counts: bytes | list[Count]


@dataclass(frozen=True)
class _Packed:
    data: _Code
    mask_shape: tuple[Length, Length, Length]


@dataclass(frozen=True)
class _Row:
    phrase: str
    segmentation_mask_rle: _Packed


_LAYOUT = (
    "A segmentation is a list with one entry for each object, {'phrase': text, 'segmentation_mask_rle': {'data': {'size': "
    "[pixels, 1], 'counts': bytes}, 'mask_shape': (frames, height, width)}}: one code holds the whole clip"
)


def write(path: str | os.PathLike[str], pairs: Iterable[tuple[str, NDArray[np.bool_]]]) -> None:
    """Writes (phrase, bool mask T H W) of each object."""
    rows = [
        {"phrase": phrase, "segmentation_mask_rle": {"data": encode(mask), "mask_shape": tuple(int(n) for n in mask.shape)}}
        for phrase, mask in pairs
    ]
    write_pickle(path, rows)


def read(path: str | os.PathLike[str]) -> list[Mask]:
    """The masks of a file, still packed; refuses every other layout by name."""
    out: list[Mask] = []
    for number, row in enumerate(typed(load_pickle(path), str(path), _LAYOUT, list[_Row])):
        packed = row.segmentation_mask_rle
        try:
            out.append(Mask(row.phrase, packed.mask_shape, _ends(packed.data, math.prod(packed.mask_shape))))
        except UserError as error:
            raise UserError(f"{path}: object {number} ({row.phrase[:40]!r}): {error}") from None
    shapes = {mask.shape for mask in out}
    if len(shapes) > 1:
        raise UserError(f"{path}: its objects have masks of different shapes: {', '.join(map(str, sorted(shapes)))}")
    return out


# ---- COCO's code ---------------------------------------------------------------------------------------------------


def encode(mask: NDArray[np.bool_]) -> dict[str, Any]:  # the layout of pycocotools: a list and bytes
    """The run-length code of all of `mask` as one column, as pycocotools.mask.encode gives it."""
    flat = np.ascontiguousarray(mask).reshape(-1).astype(bool)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([changes, [flat.size]])
    lengths = np.diff(ends, prepend=0)
    if flat.size and flat[0]:
        lengths = np.concatenate([[0], lengths])  # the first run is always one of outside
    return {"size": [int(flat.size), 1], "counts": _to_text(lengths.astype(np.int64))}


def _ends(code: _Code, pixels: int) -> NDArray[np.int64]:
    """Where each run ends, checked: as many pixels as there must be, no run of negative length."""
    if code.size != (pixels, 1) or pixels > _MAX_PIXELS:
        raise UserError(f"the size of its code is {list(code.size)}, not [{pixels}, 1]: the whole clip as one column")
    lengths = _from_text(code.counts) if isinstance(code.counts, bytes) else np.array(code.counts, np.int64)
    if (lengths < 0).any() or (lengths > pixels).any() or int(lengths.sum()) != pixels:
        raise UserError(f"its runs do not add up to the {pixels} pixels of mask_shape: damaged, or of another clip")
    return lengths.cumsum()


def _unpack(ends: NDArray[np.int64], start: int, stop: int) -> NDArray[np.bool_]:
    first, last = np.searchsorted(ends, [start, stop - 1], side="right")
    lengths = np.diff(np.minimum(ends[first : last + 1], stop), prepend=start)
    return np.repeat(np.arange(first, last + 1) % 2 == 1, lengths)


# A number is written in groups of five bits, lowest first: bit 5 says that more follow, bit 4 of the last is the sign, and 48
# makes it a letter. From the fourth number on, what is written is the difference to the number two places before.


def _to_text(lengths: NDArray[np.int64]) -> bytes:
    left = lengths.copy()
    left[3:] -= lengths[1:-2]
    columns: list[NDArray[np.int64]] = []
    going = np.ones(len(left), dtype=bool)
    while going.any():
        group = left & 31
        left >>= 5
        more = np.where(group & 16, left != -1, left != 0)
        columns.append(np.where(going, group + 32 * more + 48, 0))
        going &= more
    table = np.stack(columns, axis=1)
    return table[table > 0].astype(np.uint8).tobytes()


def _from_text(text: bytes) -> NDArray[np.int64]:
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups) or (groups < 0).any() or (groups > 63).any() or groups[-1] & 32:
        raise UserError("its counts are not COCO's run-length code, or are cut off")
    is_last = groups & 32 == 0
    number = np.concatenate([[0], np.cumsum(is_last)[:-1]])  # which number a group belongs to
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    place = np.arange(len(groups)) - starts[number]
    if place.max() >= _MAX_GROUPS:
        raise UserError("its counts have a run longer than any clip")
    values = np.zeros(int(number[-1]) + 1, dtype=np.int64)
    np.add.at(values, number, (groups & 31) << (5 * place))
    top = groups[is_last]
    values -= np.where(top & 16, np.int64(1) << (5 * (place[is_last] + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
