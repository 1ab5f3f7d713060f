"""Clips as data URIs that every browser plays: small ones exactly, large ones compressed until the page is small enough.

A small clip is a lossless animated WebP: it plays without a script, and the page's script takes its frames apart to show all
clips of a gallery at the same instant, forwards, backwards and one by one. A large one is H.264.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.data.files.video import write

_SMALL = 128 * 128  # pixels; above, lossless costs too much and is not needed to see single pixels


@dataclass(frozen=True)
class Effort:
    """How much a clip may cost."""

    lossless: bool  # of small clips
    width: int  # of large ones, at most
    crf: int  # of large ones


EFFORTS = (Effort(True, 640, 20), Effort(True, 480, 24), Effort(True, 320, 27), Effort(False, 240, 30), Effort(False, 160, 34))


@dataclass(frozen=True)
class Encoded:
    """A clip in the page."""

    mime: Literal["image/webp", "video/mp4"]
    data: bytes
    is_exact: bool
    num_frames: int
    height: int  # of the clip as it was given: the page shows it in this shape
    width: int

    @property
    def uri(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


def encode(films: Sequence[NDArray[np.uint8]], fps: Sequence[float], max_bytes: int) -> list[Encoded]:
    """All clips at the first effort at which their data URIs together take at most `max_bytes`, or at the least effort."""
    clips: list[Encoded] = []
    every = max(1, len(films) // 8)
    for effort in EFFORTS:
        some = [_encode(frames, rate, effort) for frames, rate in zip(films[::every], fps[::every], strict=True)]
        share = len(films) / max(1, len(some))
        if effort is not EFFORTS[-1] and every > 1 and share * sum(len(one.data) for one in some) > 1.2 * max_bytes:
            continue  # eight clips say that it is far too much
        clips = [_encode(frames, rate, effort) for frames, rate in zip(films, fps, strict=True)]
        if sum(len(one.data) for one in clips) * 4 / 3 <= max_bytes:
            break
    return clips


def _encode(frames: NDArray[np.uint8], fps: float, effort: Effort) -> Encoded:
    num, height, width = frames.shape[:3]
    if height * width <= _SMALL:
        return Encoded("image/webp", _webp(frames, fps, effort.lossless), effort.lossless, num, height, width)
    return Encoded("video/mp4", _mp4(frames, fps, effort), False, num, height, width)


def _webp(frames: NDArray[np.uint8], fps: float, lossless: bool) -> bytes:
    """An animated WebP that loops. Equal frames in a row become one picture with a longer stay, and the page knows."""
    import av

    options = {"lossless": "1", "compression_level": "4"} if lossless else {"lossless": "0", "quality": "88"}
    file = io.BytesIO()
    with av.open(file, "w", format="webp", options={"loop": "0"}) as container:
        stream = container.add_stream("libwebp_anim", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgra"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgra")))
        container.mux(stream.encode())
    return file.getvalue()


def _mp4(frames: NDArray[np.uint8], fps: float, effort: Effort) -> bytes:
    """H.264 with even sides, at most `effort.width` wide."""
    import cv2

    height, width = frames.shape[1:3]
    scale = min(1.0, effort.width / width)
    size = (max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2))  # cv2 wants width, height
    if size != (width, height):
        frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write(path, frames, fps, effort.crf)
        return path.read_bytes()
