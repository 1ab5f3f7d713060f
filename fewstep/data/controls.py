"""Control signals: what a clip is to follow. Each is one frozen dataclass, and a folder of that name beside videos/.

    edge      Canny                  made from the frames, or edge/STEM.mp4
    vis       blur                   made from the frames, or vis/STEM.mp4
    depth     video of depth         depth/STEM.mp4
    seg       masks of objects       seg/STEM.pickle, painted in flat colours
    keypoint  skeletons              keypoint/STEM.pickle, drawn on black

The numbers of `edge` and `vis` are those with which Cosmos-Transfer1 was trained and is evaluated.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.config import OneOf, kind
from fewstep.data import keypoints, masks, video

Pixels = NDArray[np.uint8]  # T H W 3
Strength = Literal["none", "very_low", "low", "medium", "high", "very_high"]


# Lower and upper threshold of Canny.
CANNY: dict[Strength, tuple[int, int]] = {
    "none": (20, 50),
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
# Shrunk by this while blurred; diameter in px, sigma of colour and of space of the bilateral filter; then down and up by this.
BLUR: dict[Strength, tuple[int, tuple[int, int, int], int]] = {
    "none": (1, (1, 1, 1), 1),
    "very_low": (1, (15, 100, 50), 4),
    "low": (4, (15, 100, 50), 4),
    "medium": (2, (30, 150, 100), 10),
    "high": (1, (50, 300, 150), 16),
    "very_high": (4, (50, 300, 150), 16),
}


@dataclass(frozen=True)
class Span:
    """Which frames of a clip: start, start + stride, ..., `count` of them."""

    start: int = 0
    count: int = 1
    stride: int = 1

    @property
    def places(self) -> range:
        return range(self.start, self.start + self.count * self.stride, self.stride)


class Control(Protocol):
    """A control reads its own files. One that can be made from the frames themselves has `__call__(frames) -> frames` too."""

    folder: ClassVar[str]  # beside videos/, and its key in Condition.control
    suffix: ClassVar[str]  # of its files

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        """Those frames of the signal in a file, at a size (height, width)."""
        ...


AnyControl = Annotated[Control, OneOf("control")]  # a field that holds the configuration of one control


@kind("edge", group="control")
@dataclass(frozen=True)
class Edge:
    """Canny edges of each frame, white on black."""

    folder: ClassVar[str] = "edge"
    suffix: ClassVar[str] = ".mp4"

    preset: Strength = "medium"  # see CANNY; higher shows fewer edges

    def __call__(self, frames: Pixels) -> Pixels:
        import cv2

        lower, upper = CANNY[self.preset]

        def edges(picture: Pixels) -> Pixels:
            return np.repeat(_pixels(cv2.Canny(picture, lower, upper))[..., None], 3, axis=-1)

        return _within_720(frames, edges)

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return _read_video(path, span, size)


@kind("vis", group="control")
@dataclass(frozen=True)
class Vis:
    """A blur of each frame: bilateral, then down and up again, so that only layout and colour remain."""

    folder: ClassVar[str] = "vis"
    suffix: ClassVar[str] = ".mp4"

    preset: Strength = "medium"  # see BLUR

    def __call__(self, frames: Pixels) -> Pixels:
        import cv2

        small, bilateral, factor = BLUR[self.preset]

        def blur(picture: Pixels) -> Pixels:
            height, width = picture.shape[:2]
            if min(height, width) < max(small, factor):
                raise ValueError(
                    f"vis: frames of {height} x {width} are too small for the preset {self.preset!r}: use a lower one"
                )
            picture = _resized(picture, (height // small, width // small), cv2.INTER_AREA)
            picture = _pixels(cv2.bilateralFilter(picture, *bilateral))
            return _down_up(_resized(picture, (height, width), cv2.INTER_LINEAR), factor)

        return _within_720(frames, blur)

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return _read_video(path, span, size)


@kind("depth", group="control")
@dataclass(frozen=True)
class Depth:
    """A depth video as it is, frame by frame the depth of the clip."""

    folder: ClassVar[str] = "depth"
    suffix: ClassVar[str] = ".mp4"

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return _read_video(path, span, size)


@kind("seg", group="control")
@dataclass(frozen=True)
class Seg:
    """The masks of a clip's objects in flat colours, large ones first, so that small ones stay visible."""

    folder: ClassVar[str] = "seg"
    suffix: ClassVar[str] = ".pickle"

    max_objects: int = 100  # Transfer1; the largest are shown

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        import cv2

        found = masks.read(path)
        if found and found[0].shape[0] <= span.places[-1]:
            raise ValueError(f"{path}: its masks have {found[0].shape[0]} frames, but frame {span.places[-1]} is wanted")
        out = paint(found, span.places, self.max_objects) if found else np.zeros((span.count, *size, 3), np.uint8)
        return np.stack([_resized(picture, size, cv2.INTER_NEAREST) for picture in out])


@kind("keypoint", group="control")
@dataclass(frozen=True)
class Keypoint:
    """Skeletons on black: people as OpenPose draws them, things of the toy world as wire frames."""

    folder: ClassVar[str] = "keypoint"
    suffix: ClassVar[str] = ".pickle"

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return keypoints.draw(keypoints.read(path, span.places), *size)


def paint(found: Sequence[masks.Mask], places: Sequence[int], max_objects: int = 100) -> Pixels:
    """(len(places), H, W, 3): an object keeps the colour of its place in the file, in every window of the clip."""
    shown = sorted(zip(found, _colours(len(found)), strict=True), key=lambda pair: -pair[0].area)[:max_objects]
    out = np.zeros((len(places), *found[0].shape[1:], 3), dtype=np.uint8)
    for mask, colour in shown:
        out[mask.frames(places)] = colour
    return out


def grey_of_depth(depth: NDArray[np.floating], near: float, far: float) -> Pixels:
    """(T, H, W) metres to grey frames: 255 at `near`, 0 at `far`, linear in 1 / depth, as depth networks answer."""
    grey = 255 * (1 / np.clip(depth, near, far) - 1 / far) / (1 / near - 1 / far)
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)


def depth_of_grey(frames: Pixels, near: float, far: float) -> NDArray[np.float64]:
    """(T, H, W) metres of what `grey_of_depth` gave; off by at most depth^2 (1 / near - 1 / far) / 510."""
    return 1 / (frames[..., 0] / 255 * (1 / near - 1 / far) + 1 / far)


def _read_video(path: Path, span: Span, size: video.Size) -> Pixels:
    return video.read(path, span.start, span.count, span.stride, size=size).frames


def _colours(num: int) -> list[tuple[int, int, int]]:
    """Colours far apart from one another and from the black of the background, the same ones for every clip."""
    golden = 0.61803398875  # steps of the golden ratio never come near an earlier hue
    wheel = [colorsys.hsv_to_rgb(golden * n % 1, (1.0, 0.55)[n // 2 % 2], (1.0, 0.7)[n // 4 % 2]) for n in range(num)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in wheel]


# Width and height of Transfer1's 720 buckets. Larger frames are shrunk before a signal is made of them: thresholds and
# diameters are in pixels of that size.
_BUCKETS = ((1280, 704), (960, 704), (960, 960), (704, 960), (704, 1280))


def _within_720(frames: Pixels, make: Callable[[Pixels], Pixels]) -> Pixels:
    """`make` of every frame, at the size of the frames; it sees frames that fit the bucket nearest in shape."""
    import cv2

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 T H W 3, not {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    shapes = (16 / 9, 4 / 3, 1, 3 / 4, 9 / 16)
    bucket = _BUCKETS[min(range(5), key=lambda n: abs(shapes[n] - width / height))]
    scale = min(bucket[0] / width, bucket[1] / height)
    if scale >= 1:
        return np.stack([make(picture) for picture in frames])
    small = int(scale * height + 0.5), int(scale * width + 0.5)
    made = [make(_resized(picture, small, cv2.INTER_AREA)) for picture in frames]
    return np.stack([_resized(picture, (height, width), cv2.INTER_LINEAR) for picture in made])


def _resized(picture: Pixels, size: video.Size, how: int) -> Pixels:
    import cv2

    return picture if picture.shape[:2] == size else _pixels(cv2.resize(picture, size[::-1], interpolation=how))


def _pixels(picture: Any) -> Pixels:  # what OpenCV gives: its types do not tell that uint8 stays uint8
    assert picture.dtype == np.uint8, picture.dtype
    return picture


def _down_up(picture: Pixels, factor: int) -> Pixels:
    """Bicubic to 1 / factor of the size and back, filtered against aliasing."""
    import torch
    from torch.nn.functional import interpolate

    height, width = picture.shape[:2]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    for size in ((height // factor, width // factor), (height, width)):
        pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels[0].permute(1, 2, 0).to(torch.uint8).numpy()
