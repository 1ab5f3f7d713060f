"""Control signals, which a clip follows. Each is one frozen dataclass, and a folder of that name beside videos/.

    edge      Canny                  made from the frames, or edge/STEM.mp4
    vis       blur                   made from the frames, or vis/STEM.mp4
    depth     video of depth         depth/STEM.mp4
    seg       masks of objects       seg/STEM.pickle, painted in flat colours
    keypoint  skeletons              keypoint/STEM.pickle, drawn on black

The numbers of `edge` and `vis` are those with which Cosmos-Transfer1 is evaluated (the presets) and was trained ("random":
drawn anew for each clip, from a seed that belongs to it, so that the same clip always has the same signal).
"""

from __future__ import annotations

import colorsys
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.config import OneOf, kind
from fewstep.data.files import keypoints, masks, video
from fewstep.data.files.sizes import BUCKETS_720
from fewstep.errors import UserError

Pixels = NDArray[np.uint8]  # T H W 3
Strength = Literal["none", "very_low", "low", "medium", "high", "very_high"]
Preset = Literal[Strength, "random"]


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
# What training draws from: the chance of a bilateral filter, a Gaussian, or the one and then the other. Ranges end before
# their last number, as numpy's do.
BLUR_CHANCES = {("bilateral",): 0.5, ("gaussian",): 0.3, ("bilateral", "gaussian"): 0.2}
_LARGEST_FACTOR = 17


@dataclass(frozen=True)
class Span:
    """Which frames of a clip: start, start + stride, ..., `count` of them."""

    start: int = 0
    count: int = 1
    stride: int = 1

    @property
    def places(self) -> range:
        return range(self.start, self.start + self.count * self.stride, self.stride)


@dataclass(frozen=True)
class Blur:
    """One blur, in numbers: shrink, filter, enlarge; then down and up again."""

    shrink: int  # the size while it is filtered is 1 / shrink
    bilateral: tuple[int, int, int] | None  # diameter in px, sigma of colour, sigma of space
    gaussian: tuple[int, float] | None  # width of the kernel, odd, and sigma, in px
    factor: int  # of down and up
    passes: int = 1  # of the bilateral filter


class Control(Protocol):
    """A control reads its own files. One that can be made from the frames themselves has `__call__(frames, seed=0)` too."""

    folder: ClassVar[str]  # beside videos/, and its key in Condition.control
    suffix: ClassVar[str]  # of its files

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        """Those frames of the signal in a file, at a size (height, width)."""
        ...


class OfVideos:
    """A control whose files are videos."""

    suffix: ClassVar[str] = ".mp4"

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return video.read(path, span.start, span.count, span.stride, size=size).frames


AnyControl = Annotated[Control, OneOf("control")]  # a field that holds the configuration of one control


@kind("edge", group="control")
@dataclass(frozen=True)
class Edge(OfVideos):
    """Canny edges of each frame, white on black."""

    folder: ClassVar[str] = "edge"

    preset: Preset = "medium"  # see CANNY; higher shows fewer edges

    def thresholds(self, seed: int = 0) -> tuple[int, int]:
        """Lower and upper threshold; `seed` matters only for preset=random."""
        if self.preset != "random":
            return CANNY[self.preset]
        rng = np.random.default_rng(seed)
        lower = int(rng.integers(20, 100))
        return lower, min(255, lower + int(rng.integers(50, 150)))

    def __call__(self, frames: Pixels, seed: int = 0) -> Pixels:
        import cv2

        lower, upper = self.thresholds(seed)

        def edges(picture: Pixels) -> Pixels:
            return np.repeat(_pixels(cv2.Canny(picture, lower, upper))[..., None], 3, axis=-1)

        return _within_720(frames, edges)


@kind("vis", group="control")
@dataclass(frozen=True)
class Vis(OfVideos):
    """A blur of each frame: a filter, then down and up again, so that only layout and colour remain."""

    folder: ClassVar[str] = "vis"

    preset: Preset = "medium"  # see BLUR; random: see BLUR_CHANCES

    def blur(self, seed: int = 0) -> Blur:
        """The numbers of the blur; `seed` matters only for preset=random."""
        if self.preset != "random":
            shrink, bilateral, factor = BLUR[self.preset]
            return Blur(shrink, bilateral, None, factor)
        rng = np.random.default_rng(seed)
        name = list(BLUR_CHANCES)[int(rng.choice(len(BLUR_CHANCES), p=list(BLUR_CHANCES.values())))]
        numbers = Blur(int(rng.integers(1, 5)), None, None, int(rng.integers(4, _LARGEST_FACTOR + 1)))
        if "bilateral" in name:
            diameter, colour, space, passes = (int(rng.integers(*r)) for r in ((15, 50), (100, 300), (50, 150), (1, 4)))
            numbers = replace(numbers, bilateral=(diameter, colour, space), passes=passes)
        if "gaussian" in name:
            numbers = replace(numbers, gaussian=(int(rng.integers(21, 30)) // 2 * 2 + 1, float(rng.uniform(10.5, 14.5))))
        return numbers

    def __call__(self, frames: Pixels, seed: int = 0) -> Pixels:
        import cv2

        numbers = self.blur(seed)
        # The same for every clip of a data set, whatever is drawn for it.
        smallest = _LARGEST_FACTOR if self.preset == "random" else max(numbers.shrink, numbers.factor)

        def blur(picture: Pixels) -> Pixels:
            height, width = picture.shape[:2]
            if min(height, width) < smallest:
                raise UserError(
                    f"vis: frames of {height} x {width} are too small for the preset {self.preset!r}: use a lower one"
                )
            picture = _resized(picture, (height // numbers.shrink, width // numbers.shrink), cv2.INTER_AREA)
            for _ in range(numbers.passes if numbers.bilateral else 0):
                assert numbers.bilateral is not None
                picture = _pixels(cv2.bilateralFilter(picture, *numbers.bilateral))
            if numbers.gaussian:
                width_px, sigma = numbers.gaussian
                picture = _pixels(cv2.GaussianBlur(picture, (width_px, width_px), sigma))
            return _down_up(_resized(picture, (height, width), cv2.INTER_LINEAR), numbers.factor)

        return _within_720(frames, blur)


@kind("depth", group="control")
@dataclass(frozen=True)
class Depth(OfVideos):
    """A depth video as it is, frame by frame the depth of the clip."""

    folder: ClassVar[str] = "depth"


@kind("seg", group="control")
@dataclass(frozen=True)
class Seg:
    """The masks of a clip's objects in flat colours, large ones first, so that small ones stay visible."""

    folder: ClassVar[str] = "seg"
    suffix: ClassVar[str] = ".pickle"

    max_objects: int = 100  # Transfer1; the largest are shown

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        import cv2

        objects = masks.read(path)
        if objects and objects[0].shape[0] <= span.places[-1]:
            raise UserError(f"{path}: its masks have {objects[0].shape[0]} frames, but frame {span.places[-1]} is wanted")
        out = paint(objects, span.places, self.max_objects) if objects else np.zeros((span.count, *size, 3), np.uint8)
        return np.stack([_resized(picture, size, cv2.INTER_NEAREST) for picture in out])


@kind("keypoint", group="control")
@dataclass(frozen=True)
class Keypoint:
    """Skeletons on black: people as OpenPose draws them, objects of the toy world as wire frames."""

    folder: ClassVar[str] = "keypoint"
    suffix: ClassVar[str] = ".pickle"

    def read(self, path: Path, span: Span, size: video.Size) -> Pixels:
        return keypoints.draw(keypoints.read(path, span.places), *size)


def seed_of(stem: str, start: int = 0) -> int:
    """The seed of a clip's own draws, the same on every machine, rank and run."""
    return int.from_bytes(hashlib.sha256(f"{stem}@{start}".encode()).digest()[:8], "big")


def made_of(control: Control, frames: Pixels, seed: int) -> Pixels:
    """The signal of `frames`, for controls that can be made from them."""
    make: Any = control  # Control does not promise __call__
    if "seed" in inspect.signature(make).parameters:  # one of the user's own may draw nothing
        return make(frames, seed)
    return make(frames)


def paint(objects: Sequence[masks.Mask], places: Sequence[int], max_objects: int = 100) -> Pixels:
    """(len(places), H, W, 3): an object keeps the colour of its place in the file, in every window of the clip."""
    largest = sorted(zip(objects, _colours(len(objects)), strict=True), key=lambda pair: -pair[0].area)[:max_objects]
    out = np.zeros((len(places), *objects[0].shape[1:], 3), dtype=np.uint8)
    for mask, colour in largest:
        out[mask.frames(places)] = colour
    return out


def _colours(num: int) -> list[tuple[int, int, int]]:
    """Colours far apart from one another and from the black of the background, the same ones for every clip."""
    golden = 0.61803398875  # steps of the golden ratio never come near an earlier hue
    wheel = [colorsys.hsv_to_rgb(golden * n % 1, (1.0, 0.55)[n // 2 % 2], (1.0, 0.7)[n // 4 % 2]) for n in range(num)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in wheel]


def _within_720(frames: Pixels, make: Callable[[Pixels], Pixels]) -> Pixels:
    """`make` of every frame, at the size of the frames; it receives frames that fit Transfer1's bucket nearest in shape.

    Larger frames are shrunk before: thresholds and diameters are in pixels of that size.
    """
    import cv2

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(f"frames must be uint8 T H W 3, not {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    shapes = (16 / 9, 4 / 3, 1, 3 / 4, 9 / 16)
    bucket = BUCKETS_720[min(range(5), key=lambda n: abs(shapes[n] - width / height))]
    scale = min(bucket[0] / height, bucket[1] / width)
    if scale >= 1:
        return np.stack([make(picture) for picture in frames])
    small = int(scale * height + 0.5), int(scale * width + 0.5)
    signals = [make(_resized(picture, small, cv2.INTER_AREA)) for picture in frames]
    return np.stack([_resized(picture, (height, width), cv2.INTER_LINEAR) for picture in signals])


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
