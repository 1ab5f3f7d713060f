"""Keypoints of a clip, in the pickle layout of Cosmos-Transfer1, and the pictures that a network receives.

    {frame: [{"body-keypoints": (133, 3), "hand-keypoints": (42, 3), ...}, ...], ...}        people, COCO-WholeBody
    {frame: [{"phrase": "red box", "object-keypoints": (9, 3)}, ...], ...}                   objects of the toy world

Rows are x, y and a score: x and y from the top left, 0..1. Every frame has an entry, an empty list if nothing is in it. Hands
are rows 91 to 132 of the body's 133; the copy of them under "hand-keypoints" is used where the body stops at 91. Other keys
(boxes, pixel coordinates) are ignored. The toy world's nine points are the centre of an object, then the corners of a box in
the order of the signs of (x, y, z) with z running fastest; a sphere has only its centre. Their score is 1 where they are
visible.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import InstanceOf, StrictInt

from fewstep.data.files.arrays import write_pickle
from fewstep.data.safe_pickle import load as load_pickle
from fewstep.errors import UserError
from fewstep.untrusted.text import typed

_SEEN = 0.6  # a point below this score is not drawn (Transfer1)
_RADIUS, _WIDTH, _AT_HEIGHT = 2, 4, 704  # px, of points and lines, at the height Transfer1 draws them

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Skeleton:
    """Which points there are, which are joined, and in which colours."""

    points: tuple[Colour | None, ...]  # None: never drawn
    links: tuple[tuple[int, int, Colour], ...]


@dataclass(frozen=True)
class Figure:
    """One person or object in one frame."""

    points: NDArray[np.float64]  # (K, 3), the K of its skeleton
    skeleton: Skeleton


def write_objects(path: str | os.PathLike[str], phrases: Sequence[str], keypoints: NDArray[np.float32]) -> None:
    """Writes the toy world's keypoints (T, N, 9, 3) of N objects with their phrases."""
    if keypoints.ndim != 4 or keypoints.shape[1:] != (len(phrases), 9, 3):
        raise UserError(f"{path}: keypoints must be (T, {len(phrases)}, 9, 3), not {keypoints.shape}")
    frames = {
        frame: [{"phrase": phrase, "object-keypoints": points.copy()} for phrase, points in zip(phrases, rows, strict=True)]
        for frame, rows in enumerate(keypoints.astype(np.float32))
    }
    write_pickle(path, frames)


def read_raw(
    path: str | os.PathLike[str],
) -> Mapping[int | np.integer, list[dict[str, Any]]]:  # a table has what its writer put in
    """The tables of a file by frame, with its outer layout checked."""
    advice = "Keypoints are a table from the number of a frame to the list of its figures, each a table"
    return typed(load_pickle(path), str(path), advice, dict[StrictInt | InstanceOf[np.integer], list[dict[str, Any]]])


def read(path: str | os.PathLike[str], frames: Sequence[int]) -> list[list[Figure]]:
    """The figures in each of `frames`; refuses a frame that has no entry."""
    raw = read_raw(path)
    missing = [frame for frame in frames if frame not in raw]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(frames)} frames have no entry (frame {missing[0]}, ...). Every frame needs one: "
            "write an empty list where nobody is seen"
        )
    return [[_figure(Path(path), frame, figure) for figure in raw[frame]] for frame in frames]


def draw(figures: Sequence[Sequence[Figure]], height: int, width: int) -> NDArray[np.uint8]:
    """(T, height, width, 3): the figures of each frame on black, lines over points as Transfer1 draws them."""
    import cv2

    out = np.zeros((len(figures), height, width, 3), dtype=np.uint8)
    scale = min(1.0, height / _AT_HEIGHT)
    radius, thickness = max(0, round(_RADIUS * scale)), max(1, round(_WIDTH * scale))
    for picture, there in zip(out, figures, strict=True):
        for figure in there:
            # A coordinate far outside would overflow the drawing; a point there is not in the picture anyway.
            places = np.clip(figure.points[:, :2] * (width, height), -8 * width, 8 * width).astype(int).tolist()
            visible = figure.points[:, 2] >= _SEEN
            for place, colour, is_visible in zip(places, figure.skeleton.points, visible, strict=True):
                if is_visible and colour is not None:
                    cv2.circle(picture, place, radius, colour, -1)
            for one, two, colour in figure.skeleton.links:
                if visible[one] and visible[two]:
                    cv2.line(picture, places[one], places[two], colour, thickness=thickness)
    return out


def _figure(path: Path, frame: int, raw: Mapping[str, Any]) -> Figure:
    where = f"{path}: frame {frame}"
    if "object-keypoints" in raw:
        phrase = raw.get("phrase")
        return Figure(_points(where, raw, "object-keypoints", (9,)), _thing(phrase if isinstance(phrase, str) else ""))
    body = _points(where, raw, "body-keypoints", (133, 91))
    if len(body) == 91:
        body = np.concatenate([body, _points(where, raw, "hand-keypoints", (42,))])
    return Figure(_openpose(body), PERSON)


def _points(where: str, raw: Mapping[str, Any], key: str, counts: tuple[int, ...]) -> NDArray[np.float64]:
    value = raw.get(key)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.shape not in [(n, 3) for n in counts]:
        value_text = "nothing" if value is None else f"a {getattr(value, 'shape', type(value).__name__)}"
        shapes = " or ".join(map(str, counts))
        raise UserError(f"{where}: {key!r} must be an array ({shapes}, 3) of x, y, score, but is {value_text}")
    points = value.astype(np.float64)
    if not np.isfinite(points).all():
        raise UserError(f"{where}: {key!r} has numbers that are not finite. Give unseen points the score 0")
    return points


def _openpose(coco: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 18 body points of OpenPose, then the 68 of the face, then the 42 of the hands."""
    shoulders = coco[[5, 6]]
    neck = np.array([*shoulders[:, :2].mean(0), shoulders[:, 2].min()])
    rows = [coco[0], neck, *coco[[6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]]]
    return np.concatenate([np.stack(rows), coco[23:]])


def _wheel(num: int) -> list[Colour]:
    """`num` colours around the wheel from red."""
    wheel = [colorsys.hsv_to_rgb(n / num, 1, 1) for n in range(num)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in wheel]


def _person() -> Skeleton:
    """OpenPose's figure: limbs and fingers each in a colour of the wheel, face white, hands blue."""
    body, white, blue = _wheel(18), (255, 255, 255), (0, 0, 255)
    limbs = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0))
    limbs += ((0, 14), (14, 16), (0, 15), (15, 17))
    links = [(one, two, body[n]) for n, (one, two) in enumerate(limbs)]
    for root in (18 + 68, 18 + 68 + 21):
        for finger in range(5):
            joints = [root, *(root + 1 + 4 * finger + n for n in range(4))]
            links += [(joints[n], joints[n + 1], _wheel(20)[4 * finger + n]) for n in range(4)]
    return Skeleton((*body, *[white] * 68, *[blue] * 42), tuple(links))


PERSON = _person()
_EDGES = tuple((1 + a, 1 + a + step) for step in (1, 2, 4) for a in range(8) if not a & step)  # of a box


def _thing(phrase: str) -> Skeleton:
    """A box or sphere of the toy world in the colour its phrase begins with, white if that is none."""
    named = {"red": 0, "yellow": 1, "green": 2, "cyan": 3, "blue": 4, "purple": 5}
    place = named.get(phrase.split(" ")[0])
    colour = (255, 255, 255) if place is None else _wheel(6)[place]
    return Skeleton((colour,) * 9, tuple((one, two, colour) for one, two in _EDGES))
