"""Depth, masks and keypoints of clips of the toy world, from their pixels: the controls of a generated clip.

What the probes see (probes.py): pixels of an object's colour, its centre, and the lane on whose floor it stands or bounces; of
one that never touches the floor, the lane in which an object of its apparent size has the most usual size. Floor and wall are
those of the world. What real clips lose by this stands beside every score as an anchor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.config import kind
from fewstep.data.controls import Pixels
from fewstep.errors import UserError
from fewstep.evaluation.annotators import Annotator, Figures, Masks
from fewstep.toyworld import features, probes, raycast
from fewstep.toyworld.dataset import depth_range_m, grey_of_depth
from fewstep.toyworld.physics import World

_SIGNS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)  # of a box's corners


@kind("toyworld", group="annotator")
@dataclass(frozen=True)
class ToyAnnotator(Annotator):
    """Depth, masks and keypoints of the toy world's objects, from their pixels."""

    label = "probes of the toy world"

    def suits(self, clip: Pixels, caption: str) -> bool:
        try:
            probes.descriptions([caption])
        except UserError:
            return False
        return clip.shape[:3] == features.shipped().size

    def depth(self, clip: Pixels) -> Pixels:
        world, out = World(), np.repeat(_background()[None], len(clip), axis=0)
        for one in _objects(clip):
            # On average a sphere's surface is 2/3 of its radius before its centre; of a box one sees the front.
            out[one.mask] = np.minimum(out, one.z_m - one.size_m * (1.0 if one.is_box else 2 / 3))[one.mask]
        return grey_of_depth(out, *depth_range_m(world))

    def seg(self, clip: Pixels) -> Masks:
        return [(f"{one.colour} {'box' if one.is_box else 'sphere'}", one.mask) for one in _objects(clip)]

    def keypoint(self, clip: Pixels) -> Figures:
        objects = _objects(clip)
        return [[one.points(frame) for one in objects if one.is_seen(frame)] for frame in range(len(clip))]


@dataclass(frozen=True)
class _Object:
    colour: str
    is_box: bool
    mask: NDArray[np.bool_]  # T H W
    centre: NDArray[np.floating]  # (T, 2), x and y in 0..1; nan where it is not seen
    z_m: float

    @property
    def size_m(self) -> float:
        """Radius or half edge: that of a usual object."""
        return float(np.mean(World().box_sizes_m if self.is_box else World().sphere_sizes_m))

    def is_seen(self, frame: int) -> bool:
        return bool(np.isfinite(self.centre[frame]).all())

    def points(self, frame: int) -> NDArray[np.float64]:
        """(9, 3): the centre, and the corners of a box about it."""
        camera, out = World().camera, np.zeros((9, 3))
        out[0] = (*self.centre[frame], 1.0)
        if self.is_box:
            per_m = camera.focal_px / self.z_m
            x = (self.centre[frame, 0] * camera.width - camera.cx_px) / per_m
            y = camera.y_m - (self.centre[frame, 1] * camera.height - camera.cy_px) / per_m
            out[1:] = np.concatenate([camera.project((x, y, self.z_m) + self.size_m * _SIGNS), np.ones((8, 1))], axis=1)
        return out


def _objects(clip: Pixels) -> list[_Object]:
    """The objects of a clip, the farthest first."""
    parsed = probes.parse(clip[None])
    coverage, colour = probes.coverage_of(clip)
    lanes = probes.lane_depths(parsed)[0]
    out: list[_Object] = []
    for k in np.nonzero(parsed.present[0])[0]:
        is_box = bool(parsed.is_box[0, k])
        z = float(lanes[k]) if np.isfinite(lanes[k]) else _depth_of_size(parsed.area[0, k], parsed.is_inside[0, k], is_box)
        out.append(_Object(probes.NAMES[k], is_box, (colour == k) & (coverage > 0.5), parsed.centre[0, k] / 32, z))
    return sorted(out, key=lambda one: -one.z_m)


def _depth_of_size(area: NDArray[np.floating], is_inside: NDArray[np.bool_], is_box: bool) -> float:
    """The lane in which an object of that area in px has the size nearest to the usual one."""
    world = World()
    lanes = np.array(world.lanes_m)
    size = np.mean(world.box_sizes_m if is_box else world.sphere_sizes_m)
    side = world.camera.focal_px * 32 / world.camera.height * size / lanes
    usual = (2 * side) ** 2 * 1.15 if is_box else np.pi * side**2  # of a box one sees some of the top, too
    visible = area[is_inside] if is_inside.any() else area[area > 0]
    return float(lanes[np.abs(np.log(usual / max(float(np.median(visible)), 1.0))).argmin()])


@functools.cache
def _background() -> NDArray[np.float64]:
    """(H, W) metres: floor and wall, without objects."""
    return raycast.render(World().stage, [], np.zeros((1, 0, 3))).depth[0].astype(np.float64)
