"""How frames of one size become frames of another: stretched, cut, or padded; and which of several sizes a clip belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.data.files.video import Size

Resize = Literal["stretch", "crop", "pad"]

# Height and width of Transfer1's buckets at 720: 16:9, 4:3, 1:1, 3:4, 9:16.
BUCKETS_720: tuple[Size, ...] = ((704, 1280), (704, 960), (960, 960), (960, 704), (1280, 704))


@dataclass(frozen=True)
class Fit:
    """Frames are scaled to `scaled`; then their middle is cut out, or margins are added, to make `size`."""

    scaled: Size
    size: Size

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Scaled frames T H W 3 at their final size. Margins mirror the picture, as far as there is picture to mirror."""
        for axis, (have, want) in enumerate(zip(self.scaled, self.size, strict=True), 1):
            if have > want:
                first = (have - want) // 2
                frames = np.take(frames, range(first, first + want), axis=axis)
            elif have < want:
                before = (want - have) // 2
                widths = [(0, 0)] * frames.ndim
                widths[axis] = before, want - have - before
                frames = np.pad(frames, widths, mode="reflect" if max(widths[axis]) < have else "edge")
        return frames

    def padding(self) -> NDArray[np.bool_]:
        """(height, width): true for pixels of the margin."""
        out = np.ones(self.size, dtype=bool)
        margins = [max(want - have, 0) // 2 for have, want in zip(self.scaled, self.size, strict=True)]
        out[tuple(slice(margin, margin + have) for margin, have in zip(margins, self.scaled, strict=True))] = False
        return out


def fit(source: Size, target: Size | None, resize: Resize) -> Fit:
    """How frames of size `source` become frames of size `target`; None: they keep their size.

    stretch scales both sides. crop covers the target and cuts the margins. pad keeps the whole picture and adds margins.
    """
    size = target or source
    if resize == "stretch" or size == source:
        return Fit(size, size)
    ratios = [want / have for have, want in zip(source, size, strict=True)]
    scale, bound = (max(ratios), max) if resize == "crop" else (min(ratios), min)
    height, width = (max(bound(round(have * scale), want), 1) for have, want in zip(source, size, strict=True))
    return Fit((height, width), size)


def nearest_shape(source: Size, sizes: Sequence[Size]) -> int:
    """The number of the size whose ratio of width to height is nearest to that of `source`, on a scale of ratios."""
    own = np.log(source[1] / source[0])
    return int(np.argmin([abs(np.log(width / height) - own) for height, width in sizes]))
