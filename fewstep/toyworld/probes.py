"""Physics probes: what a clip of the toy world shows, read from its pixels alone.

Pixels are sorted by hue into the six colours, blobs of one colour are tracked from frame to frame, and the tracks are
described: how many objects, of which colour and shape, where to, how smoothly, under which gravity, and whether they stay. The
probes read pixels only, so generated and real clips are measured alike. Lengths are in pixels of a picture 32 high.

A pixel at an object's border is a mix a k object + (1 - a) background. The background is nearly grey, so with
chroma = max - min and r = min / (max - min) of the object's paint

    a = 1 - (min - r chroma) / background                                                                      (1)

whatever the shading k. This coverage a gives centroids a tenth of a pixel good, where a mask gives a third.

Every probe has a floor (what real clips get; the parser is not perfect) and a chance level (real clips with the captions of
others); docs/evaluation.md has both, and no probe means anything without them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fewstep.errors import UserError
from fewstep.toyworld.captions import read_caption
from fewstep.toyworld.features import SHIPPED, Clips, as_clips, read_weights
from fewstep.toyworld.physics import COLOURS, World

NAMES = tuple(COLOURS)  # the order of every axis of colours here
NUM = len(NAMES)
_CHUNK = 64  # clips at a time
_BACKGROUND = 0.72  # brightness of wall and floor in light
_MIN_CHROMA = 0.15
_MIN_COVERAGE = 0.35
_MIN_THICKNESS = 3  # pixels; two objects that touch make a third colour between them, two pixels wide
_MIN_AREA = 4  # pixels; the smallest object has 14
_MIN_SHARE = 0.25  # of the frames: less is an artefact or a mix of two colours that touch, no object

_PAINT = np.array(list(COLOURS.values()), dtype=np.float32)
_RATIO = _PAINT.min(1) / (_PAINT.max(1) - _PAINT.min(1))  # r of (1)

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Parsed:
    """What n clips show, by colour (K = 6, as in COLOURS) and frame (T). Only the rows of present colours mean anything."""

    present: Bools  # (n, K): in a quarter of the frames at least
    extra: NDArray[np.int64]  # (n, K): further objects of a colour that is found
    is_box: Bools  # (n, K)
    area: Floats  # (n, K, T), px; 0 where the colour is not seen
    centre: Floats  # (n, K, T, 2), x and y in px; nan where it is not seen
    box: Floats  # (n, K, T, 4): left, top, right, bottom, in px; nan where it is not seen
    is_inside: Bools  # (n, K, T): seen, and not at the border of the picture

    @property
    def count(self) -> NDArray[np.int64]:
        """Objects in each clip (n,)."""
        return self.present.sum(1) + (self.extra * self.present).sum(1)

    def rows(self, index: slice | NDArray[np.integer]) -> Parsed:
        """The same of some of the clips."""
        return Parsed(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


# ---- pixels to tracks ----------------------------------------------------------------------------------------------


def parse(clips: Clips) -> Parsed:
    """Objects, shapes and tracks of clips (B, T, H, W, 3) uint8. 2 ms a clip of 17 x 32 x 32 on one core."""
    tensor = as_clips(clips)
    num_frames, height, width = tensor.shape[1:4]
    if height % 32 or width % (height // 32) or num_frames < 5:
        raise UserError(
            f"the probes read 5 frames or more, 32 k pixels high and a multiple of k wide, not {num_frames} frames of "
            f"{height} x {width}. Resize the clips, or make longer ones."
        )
    return _stacked([_parse(some.numpy()) for some in tensor.cpu().split(_CHUNK)])


R = TypeVar("R", bound=Parsed)


def _stacked(parts: Sequence[R]) -> R:
    return type(parts[0])(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})


def _parse(rgb: NDArray[np.uint8]) -> Parsed:
    parsed, looks = _tracked(rgb)
    return replace(parsed, is_box=_boxes(looks, parsed.present.shape))


def looks_at(clips: NDArray[np.uint8]) -> Crops:
    """What the shape classifier sees of a few clips, to train it."""
    return _tracked(clips)[1]


def _tracked(rgb: NDArray[np.uint8]) -> tuple[Parsed, Crops]:
    """Everything but the shapes, and crops to read the shapes from."""
    import cv2

    num, num_frames, height, width, _ = rgb.shape
    scale = height // 32
    coverage, colour = coverage_of(rgb.reshape(-1, height, width, 3))
    frames = num * num_frames
    shape = (num, NUM, num_frames)
    area, centre = np.zeros(shape, np.float32), np.full((*shape, 2), np.nan, np.float32)
    box, extra = np.full((*shape, 4), np.nan, np.float32), np.zeros(shape, np.int64)
    # All frames one below the other with an empty row between them: one call finds the blobs of a colour in all of them.
    tall = np.zeros((frames, height + 1, width), np.uint8)
    for k in range(NUM):
        tall[:, :height] = colour == k
        num_blobs, labels, stats, _ = cv2.connectedComponentsWithStats(tall.reshape(-1, width), connectivity=8)
        if num_blobs == 1:
            continue
        labels = labels.reshape(frames, height + 1, width)[:, :height]
        n, y, x = np.nonzero(labels)
        label, weight = labels[n, y, x], coverage[n, y, x]
        mass = np.bincount(label, weight, num_blobs)
        mass[0] = 1
        mx = np.bincount(label, weight * (x + 0.5), num_blobs) / mass
        my = np.bincount(label, weight * (y + 0.5), num_blobs) / mass
        thickness = np.minimum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
        big = np.nonzero((stats[:, cv2.CC_STAT_AREA] >= _MIN_AREA * scale**2) & (thickness >= _MIN_THICKNESS * scale))[0]
        big = big[big > 0]
        frame = stats[big, cv2.CC_STAT_TOP] // (height + 1)
        order = np.argsort(mass[big], kind="stable")  # the largest comes last and stays
        big, frame = big[order], frame[order]
        clip, t = np.divmod(frame, num_frames)
        area[clip, k, t] = mass[big] / scale**2
        centre[clip, k, t] = np.stack([mx[big], my[big]], -1) / scale
        left, top = stats[big, cv2.CC_STAT_LEFT], stats[big, cv2.CC_STAT_TOP] - frame * (height + 1)
        edges = np.stack([left, top, left + stats[big, cv2.CC_STAT_WIDTH], top + stats[big, cv2.CC_STAT_HEIGHT]], -1)
        box[clip, k, t] = edges / scale
        # A second blob of at least half the largest one's size is another object, unless one in front cuts it in two.
        sizeable = mass[big] / scale**2 >= 0.5 * area[clip, k, t]
        extra[:, k] = np.bincount(frame[sizeable], minlength=frames).reshape(num, num_frames) - 1
    is_inside = (box[..., :2] > 0).all(-1) & (box[..., 2] < width / scale) & (box[..., 3] < height / scale)
    visible = area > 0
    present = visible.mean(2) >= _MIN_SHARE
    num_extra = np.round((np.maximum(extra, 0) * visible).sum(2) / np.maximum(visible.sum(2), 1)).astype(np.int64)
    coverage, colour = coverage.reshape(rgb.shape[:4]), colour.reshape(rgb.shape[:4])
    looks = _crops(rgb, coverage, colour, present, visible, centre)
    return Parsed(present, num_extra, np.zeros_like(present), area, centre, box, is_inside), looks


def coverage_of(rgb: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.int8]]:
    """Coverage (1) of pixels (..., 3) by an object, and which colour it has: an index into NAMES, -1 for background."""
    low, high = _extremes(rgb)
    chroma = (high - low).astype(np.float32) / 255
    colour = np.where(chroma > _MIN_CHROMA, _hue_table()[rgb[..., 0] >> 3, rgb[..., 1] >> 3, rgb[..., 2] >> 3], np.int8(-1))
    coverage = 1 - (low.astype(np.float32) / 255 - _RATIO[colour] * chroma) / _BACKGROUND
    coverage = np.clip(coverage, 0, 1) * (colour >= 0)
    return coverage, np.where(coverage > _MIN_COVERAGE, colour, np.int8(-1)).astype(np.int8)


def _extremes(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The least and the largest of the three colours of every pixel: what min(-1) and max(-1) give, in a tenth of the time."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


@functools.cache
def _hue_table() -> NDArray[np.int8]:
    """The colour of nearest hue for each (r, g, b) in steps of 8 levels."""
    level = (np.arange(32, dtype=np.float32) + 0.5) / 32
    hue = _hue(np.stack(np.meshgrid(level, level, level, indexing="ij"), -1))
    apart = np.abs((hue[..., None] - _hue(_PAINT) + 180) % 360 - 180)
    return apart.argmin(-1).astype(np.int8)


def _hue(rgb: Floats) -> Floats:
    """Hue in degrees, as in HSV; 0 for greys."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    high = rgb.max(-1)
    chroma = high - rgb.min(-1)
    safe = np.where(chroma > 0, chroma, 1)
    sixth = np.where(
        high == red, (green - blue) / safe, np.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    return np.where(chroma > 0, 60 * sixth % 360, 0).astype(np.float32)


# ---- shapes --------------------------------------------------------------------------------------------------------

_CROP = 14  # pixels; the nearest box is 10 wide


class ShapeNet(nn.Sequential):
    """(B, 3, 14, 14) crops -> (B, 1), above 0 for a box. 10 k parameters; trained beside the feature network."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, 1, 1),
            nn.SiLU(),
            nn.Conv2d(12, 24, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(24, 32, 3, 2, 1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 1),
        )


@functools.cache
def shape_net(path: Path = SHIPPED) -> ShapeNet:
    """The shape classifier that is stored beside the feature network."""
    net = ShapeNet()
    tensors, _ = read_weights(path)
    net.load_state_dict({k.removeprefix("shape."): v.float() for k, v in tensors.items() if k.startswith("shape.")})
    return net.eval().requires_grad_(False)


class Crops(NamedTuple):
    """Looks at objects: (m, 3, 14, 14) float32, and of which clip and colour each is (m,)."""

    pixels: Floats  # coverage by the object, its brightness, coverage by other objects
    clip: NDArray[np.intp]
    colour: NDArray[np.intp]


def _crops(
    rgb: NDArray[np.uint8],
    coverage: Floats,
    colour: NDArray[np.int8],
    present: Bools,
    visible: Bools,
    centre: Floats,
    every: int = 2,
) -> Crops:
    """Crops around the objects that are found, of every second frame: shapes do not change."""
    scale = rgb.shape[2] // 32
    half = _CROP // 2 * scale
    window = ((0, 0), (0, 0), (half, half), (half, half))
    covered, owner = np.pad(coverage * (colour >= 0), window), np.pad(colour, window, constant_values=-1)
    bright = np.pad(_extremes(rgb)[1], window)
    looked_at = visible & present[:, :, None]
    looked_at[:, :, np.arange(visible.shape[2]) % every > 0] = False
    clip, k, t = np.nonzero(looked_at)
    left, top = np.floor(centre[clip, k, t].T).astype(np.intp)
    y = (scale * top[:, None] + np.arange(scale * _CROP))[:, :, None]
    x = (scale * left[:, None] + np.arange(scale * _CROP))[:, None, :]
    at = (clip[:, None, None], t[:, None, None], y, x)
    of_any = covered[at]
    of_own = of_any * (owner[at] == k[:, None, None])
    own = _pooled(of_own, scale)
    light = _pooled(bright[at] / np.float32(255) * of_own, scale) / _PAINT.max(1)[k][:, None, None]
    pixels = np.stack([own, light, _pooled(of_any, scale) - own], 1).astype(np.float32)
    return Crops(pixels, clip, k)


def _pooled(pictures: Floats, scale: int) -> Floats:
    """(m, H, W) averaged over squares of `scale` pixels."""
    if scale == 1:
        return pictures
    m, h, w = pictures.shape
    return pictures.reshape(m, h // scale, scale, w // scale, scale).mean((2, 4))


def _boxes(looks: Crops, shape: tuple[int, int]) -> Bools:
    """(n, K), by the sum of the classifier's logits over the frames."""
    if not len(looks.clip):
        return np.zeros(shape, np.bool_)
    net = shape_net()
    with torch.inference_mode():
        logits = torch.cat([net(some)[:, 0] for some in torch.from_numpy(looks.pixels).split(1024)]).numpy()
    return (np.bincount(looks.clip * NUM + looks.colour, logits, shape[0] * NUM) > 0).reshape(shape)


# ---- what the caption describes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What n captions ask for, by colour (n, K)."""

    present: Bools
    is_box: Bools
    side: NDArray[np.int64]  # -1 to the left, 1 to the right, 0 neither

    def rows(self, index: NDArray[np.integer]) -> Description:
        """The same of some of the captions, in the order of `index`."""
        return Description(self.present[index], self.is_box[index], self.side[index])


def descriptions(captions: Sequence[str]) -> Description:
    """The contents of captions. Two objects of one colour are a UserError: the probes cannot tell them apart."""
    shape = (len(captions), NUM)
    out = Description(np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.int64))
    for row, caption in enumerate(captions):
        for one in read_caption(caption)[0]:
            k = NAMES.index(one.colour)
            if out.present[row, k]:
                raise UserError(f"caption {caption!r} names two {one.colour} objects; the probes track one of each colour.")
            out.present[row, k], out.is_box[row, k] = True, one.shape == "box"
            out.side[row, k] = 0 if one.side is None else -1 if one.side == "left" else 1
    return out


class Adherence(NamedTuple):
    """Shares of clips that show what the caption describes and nothing else."""

    colours: float
    colours_and_shapes: float


def adherence(clips: Clips | Parsed, captions: Sequence[str] | Description) -> Adherence:
    """Shares of clips that show what their caption asks for, and no more.

    colours: each colour of the caption is found, no other one is, and none twice. colours_and_shapes: besides, each of these
    objects is a sphere or a box as described. A colour is present when a blob of it, at least 4 pixels in area and 3 across, is
    in a quarter of the frames. Motion words do not count here.
    """
    parsed, description = _both(clips, captions)
    colours, shapes = colours_match(parsed, description), shapes_match(parsed, description)
    return Adherence(float(colours.mean()), float((colours & shapes).mean()))


def colours_match(parsed: Parsed, description: Description) -> Bools:
    """(n,): the colours found are those of the caption, each once."""
    return (parsed.present == description.present).all(1) & (parsed.count == description.present.sum(1))


def shapes_match(parsed: Parsed, description: Description) -> Bools:
    """(n,): no object of the caption that is found has the wrong shape."""
    return ~(parsed.present & description.present & (parsed.is_box != description.is_box)).any(1)


def _both(clips: Clips | Parsed, captions: Sequence[str] | Description) -> tuple[Parsed, Description]:
    parsed = clips if isinstance(clips, Parsed) else parse(clips)
    description = captions if isinstance(captions, Description) else descriptions(captions)
    if len(parsed.present) != len(description.present):
        raise UserError(f"{len(parsed.present)} clips and {len(description.present)} captions: give each clip its caption.")
    return parsed, description


def sides_match(parsed: Parsed, description: Description) -> Floats:
    """(n,): share of the objects described as going left or right that do in the first four frames; nan if there is none.

    An object that is missing, or that moves less than 0.05 px a frame, does not.
    """
    x = parsed.centre[:, :, :4, 0]
    step = np.diff(x)
    speed = np.where(np.isnan(step), 0, step).sum(2) / np.maximum((~np.isnan(step)).sum(2), 1)
    right = (np.sign(speed) == description.side) & (np.abs(speed) > 0.05) & parsed.present
    has_side = description.side != 0
    return ratio((right & has_side).sum(1), has_side.sum(1))


# ---- motion --------------------------------------------------------------------------------------------------------


def second_difference_px(parsed: Parsed) -> Floats:
    """(n,): |c(t+1) - 2 c(t) + c(t-1)| in px, the median over the frames, the mean over the objects; nan without a track.

    A parabola under gravity has 0.23 to 0.35; a frozen clip 0, which is no merit: read it beside gravity and direction.
    """
    bend = np.linalg.norm(np.diff(parsed.centre, 2, axis=2), axis=-1)
    has_track = parsed.present & ~np.isnan(bend).all(2)
    middle = np.nanmedian(np.where(has_track[..., None], bend, 0), axis=2)
    return ratio((middle * has_track).sum(1), has_track.sum(1))


def permanence(parsed: Parsed) -> Floats:
    """(n,): share of frames in which an object that is ever found is seen, or may be hidden; nan without an object.

    It may be hidden where it was last seen (or will next be) at the border of the picture, or behind another object.
    """
    visible = parsed.area > 0
    num_frames = visible.shape[2]
    frame = np.arange(num_frames)
    last = np.maximum.accumulate(np.where(visible, frame, -1), axis=2)
    following = np.minimum.accumulate(np.where(visible, frame, num_frames)[:, :, ::-1], axis=2)[:, :, ::-1]
    excused = np.zeros_like(visible)
    for near in (last, following):
        inside = (near >= 0) & (near < num_frames)
        index = np.clip(near, 0, num_frames - 1)
        c = np.take_along_axis(parsed.centre, index[..., None], axis=2)
        excused |= inside & ~np.take_along_axis(parsed.is_inside, index, axis=2)
        for k in range(NUM):  # behind the object of colour k in this very frame; comparisons with nan are false
            b = parsed.box[:, k : k + 1]
            behind = ((c > b[..., :2] - 2) & (c < b[..., 2:] + 2)).all(-1)
            excused |= inside & behind & (np.arange(NUM)[:, None] != k)
    there = (visible | excused) & parsed.present[..., None]
    return ratio(there.sum((1, 2)), parsed.present.sum(1) * num_frames)


class Flights(NamedTuple):
    """Stretches of free flight (m,)."""

    clip: NDArray[np.intp]
    pull_px: Floats  # downward acceleration, px/frame^2
    gravity: Floats  # the same in m/s^2, where the object's depth is known from its touching the floor; else nan


_LENGTHS = range(9, 5, -1)  # frames of a stretch; the longest first


def flights(parsed: Parsed, fps: float = 16.0) -> Flights:
    """The stretches of 6 to 9 frames in which an object moves vertically on a parabola, none overlapping another of its track.

    Such a stretch has the object off the border, a pixel away from all others and equally large (-20 to +25 %) throughout, a
    vertical range above 2 px, and a root mean square residual of the fit below 0.2 px. No acceleration is refused for its
    value. On real clips three of four are within 5 % of the truth, a few span a bounce: state the law by the median.
    """
    y = parsed.centre[..., 1]
    whole = parsed.present[..., None] & parsed.is_inside
    for k in range(NUM):
        other = parsed.box[:, k : k + 1]
        touches = ((parsed.box[..., :2] < other[..., 2:] + 1) & (parsed.box[..., 2:] > other[..., :2] - 1)).all(-1)
        whole &= ~(touches & (np.arange(NUM)[:, None] != k))
    depth = lane_depths(parsed)
    busy = np.zeros_like(whole)
    parts: list[Flights] = []
    camera = World().camera
    for length in _LENGTHS:
        if length > y.shape[2]:
            continue
        t = np.arange(length) - (length - 1) / 2
        basis = np.stack([np.ones(length), t, t * t], 1)
        fit = np.linalg.pinv(basis)
        for start in range(y.shape[2] - length + 1):
            span = slice(start, start + length)
            rows, sizes = np.nan_to_num(y[..., span]), parsed.area[..., span]
            middle = np.maximum(np.median(sizes, axis=2), 1e-6)
            steady = (sizes.min(2) > 0.8 * middle) & (sizes.max(2) < 1.25 * middle)
            coefficients = rows @ fit.T
            residual = np.sqrt(((rows - coefficients @ basis.T) ** 2).mean(2))
            good = whole[..., span].all(2) & ~busy[..., span].any(2) & steady & (np.ptp(rows, axis=2) > 2) & (residual < 0.2)
            clip, k = np.nonzero(good)
            busy[clip, k, span] = True
            pull = 2 * coefficients[clip, k, 2]
            parts.append(Flights(clip, pull, pull * fps**2 * depth[clip, k] / (camera.focal_px * 32 / camera.height)))
    clip = np.concatenate([p.clip for p in parts])
    order = np.argsort(clip, kind="stable")
    return Flights(*(np.concatenate([getattr(p, name) for p in parts])[order] for name in Flights._fields))


def lane_depths(parsed: Parsed) -> Floats:
    """(n, K): depth in m of the lane on whose floor the object is seen to bounce or to come to rest; nan for others."""
    world = World()
    camera, lanes = world.camera, np.array(world.lanes_m)
    per_m = camera.focal_px * 32 / camera.height
    horizon = camera.cy_px * 32 / camera.height
    ball, cube = np.mean(world.sphere_sizes_m), np.mean(world.box_sizes_m)
    # Rows of the lowest visible points: the tangent ray to a sphere, the lower front edge of a box.
    slope = np.arctan((camera.y_m - ball) / lanes) + np.arcsin(ball / np.hypot(camera.y_m - ball, lanes))
    rows = horizon + per_m * np.stack([np.tan(slope), camera.y_m / (lanes - cube)])
    y, bottom = np.nan_to_num(parsed.centre[..., 1], nan=-1.0), np.nan_to_num(parsed.box[..., 3], nan=-1.0)
    lowest = y.argmax(2)
    # In free flight nothing is lowest in between: it was the floor. Nor does anything stay at its lowest.
    is_inner = (lowest > 0) & (lowest < y.shape[2] - 1)
    rests = (np.abs(np.diff(y[:, :, -3:], axis=2)) < 0.15).all(2) & (y[:, :, -1] > y.max(2) - 0.3)
    lane = np.abs(bottom.max(2)[..., None] - rows[parsed.is_box.astype(int)]).argmin(-1)
    return np.where(is_inner | rests, lanes[lane], np.nan)


def ratio(part: NDArray[np.floating] | NDArray[np.integer], whole: NDArray[np.integer]) -> Floats:
    """part / whole, nan where whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan).astype(np.float32)
