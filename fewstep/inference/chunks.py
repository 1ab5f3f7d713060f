"""Clips longer than what a network makes at once: chunk after chunk, each beginning with the last frames of the one before.

As the Cosmos-Transfer pipelines do it: every chunk has the same length, `overlap` frames of it are those that the chunk before
ended with, decoded and encoded again; the last one is cut. Its control is its own slice of the control video, of which the last
frame stands still beyond the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewstep.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """Frames first .. first + num_frames - 1 of the clip, of pixels."""

    number: int
    first: int
    num_frames: int
    overlap: int  # frames at its beginning that the chunk before has made; of the first one 0

    def of(self, frames: np.ndarray) -> np.ndarray:
        """Its slice of a clip T .., whose last frame is repeated beyond the end."""
        window = frames[self.first : self.first + self.num_frames]
        short = self.num_frames - len(window)
        return window if not short else np.concatenate([window, np.repeat(window[-1:], short, 0)])


def chunks_of(num_frames: int, window: int, overlap: int) -> list[Chunk]:
    """The chunks of a clip; one, where it is no longer than the window."""
    if num_frames <= window:
        return [Chunk(0, 0, num_frames, 0)]
    if not 0 < overlap < window:
        raise UserError(f"--overlap {overlap}: of {window} frames at a time, 1 .. {window - 1} can be taken from those before")
    starts = range(0, num_frames - overlap, window - overlap)
    return [Chunk(i, first, window, overlap if i else 0) for i, first in enumerate(starts)]
