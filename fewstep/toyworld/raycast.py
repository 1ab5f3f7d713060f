"""Ray casting of spheres and cubes on a checkered floor before a wall, in plain numpy.

Coordinates in metres: x to the right, y up (the floor is y = 0), z away from the camera. The camera looks along z
without pitch; its horizon is moved by the principal point instead, so depth along the axis is simply z, a vertical
stays vertical and an object that keeps its z moves in the image exactly as it moves in the world, times f / z.

What makes it fast: a ray is (u, v, 1), so its parameter is the depth; components are separate arrays, never a trailing
axis of 3; floor, wall and checker do not change, so they are traced once; and only pixels at a silhouette or at the
border of a shadow are supersampled. Only + - * / and sqrt are used, elementwise and on one clip at a time: the same
clip gives the same bits in any batch, order or process.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError

Shape = Literal["sphere", "box"]
Floats = NDArray[np.floating]
Parts = tuple[Floats, ...]  # x, y, z of points, or red, green, blue: three arrays
RGB = tuple[float, float, float]

_NEVER = np.float32(1e9)  # depth of a ray that misses; finite, so that no arithmetic warns
_MAX_SOLIDS = 15  # owner, face and shadow share one byte


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at (0, y_m, 0) that looks along z. Pixel (column i, row j) is centred on (i + 0.5, j + 0.5)."""

    width: int
    height: int
    focal_px: float
    cx_px: float  # principal point, from the left edge
    cy_px: float  # principal point, from the top edge: the row of the horizon
    y_m: float  # height above the floor

    def project(self, points: Floats) -> Floats:
        """Image coordinates (..., 2) of points (..., 3) before the camera: x, y from the top left, in 0..1."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        column = self.cx_px + self.focal_px * x / z
        row = self.cy_px - self.focal_px * (y - self.y_m) / z
        return np.stack([column / self.width, row / self.height], axis=-1)


@dataclass(frozen=True)
class Stage:
    """What does not move: camera, wall, floor, light. Hashable, because its traced background is remembered."""

    camera: Camera
    wall_z_m: float
    cell_m: float  # edge of a cell of the checker
    floor: tuple[RGB, RGB]
    wall: RGB
    light: tuple[float, float, float]  # towards the light; any length
    ambient: float  # share of light that reaches a shadow
    supersample: int  # samples along each axis of a pixel, where it matters; 1 is off


@dataclass(frozen=True)
class Solid:
    """A sphere of radius size_m, or a cube of half edge size_m with its faces along the axes."""

    shape: Shape
    size_m: float
    colour: RGB


@dataclass(frozen=True)
class Frames:
    """What the camera sees."""

    rgb: NDArray[np.uint8]  # (T, H, W, 3), anti-aliased
    depth: NDArray[np.float32]  # (T, H, W), metres along the axis, of the ray through the pixel's centre
    segmentation: NDArray[np.uint8]  # (T, H, W), of the same ray: 0 is floor or wall, n + 1 is solid n


@dataclass(frozen=True)
class _Rays:
    """Rays and what each of them meets when there are no solids; all arrays broadcast against one another."""

    u: Floats
    v: Floats
    inv_u: Floats
    inv_v: Floats
    inv_norm: Floats  # 1 / (u^2 + v^2 + 1)
    depth: Floats
    x: Floats  # of the background point, relative to the foot of the camera
    y: Floats
    lit: Parts  # colour in light
    dark: Parts  # colour in shadow

    def map(self, change: Callable[[Floats], Floats]) -> "_Rays":
        return _Rays(
            u=change(self.u),
            v=change(self.v),
            inv_u=change(self.inv_u),
            inv_v=change(self.inv_v),
            inv_norm=change(self.inv_norm),
            depth=change(self.depth),
            x=change(self.x),
            y=change(self.y),
            lit=(change(self.lit[0]), change(self.lit[1]), change(self.lit[2])),
            dark=(change(self.dark[0]), change(self.dark[1]), change(self.dark[2])),
        )


@dataclass(frozen=True)
class _Seen:
    owner: NDArray[np.uint8]  # 0 background, n + 1 solid n
    depth: Floats
    patch: NDArray[np.uint8]  # differs between two neighbours when an edge runs between them
    rgb: Parts


def render(stage: Stage, solids: Sequence[Solid], positions: Floats) -> Frames:
    """The frames of solids that stand at `positions` (T, N, 3), in metres. Costs some 5 ms for 17 x 32 x 32 on a core.

    Solids may touch but must not hold the camera inside them. At most 15 solids.
    """
    camera = stage.camera
    num_frames = len(positions)
    if positions.shape != (num_frames, len(solids), 3) or len(solids) > _MAX_SOLIDS:
        raise UserError(
            f"positions must be (T, {len(solids)}, 3) for these solids, at most {_MAX_SOLIDS}; got {positions.shape}"
        )
    centre, fine, smooth = _background(stage)
    where = np.asarray(positions, dtype=np.float32)
    columns = [tuple(where[:, n, axis, None] for axis in range(3)) for n in range(len(solids))]
    hits = _trace(stage, centre, solids, columns)

    rgb = np.empty((3, num_frames, camera.height * camera.width), dtype=np.float32)
    for channel in range(3):
        rgb[channel] = hits.rgb[channel]
    frames, pixels = _borders(hits.patch, camera)
    if stage.supersample > 1:
        # Away from borders a background pixel needs only its smoothing across the checker, which is known beforehand.
        plain = np.nonzero(hits.owner == 0)
        shaded = (hits.patch[plain] & 1).astype(bool)
        for channel in range(3):
            rgb[channel][plain] = np.where(shaded, smooth.dark[channel][0, plain[1]], smooth.lit[channel][0, plain[1]])
        gathered = [tuple(where[frames, n, axis, None] for axis in range(3)) for n in range(len(solids))]
        samples = _trace(stage, fine.map(lambda table: np.take(table, pixels, axis=0)), solids, gathered)
        for channel in range(3):
            rgb[channel, frames, pixels] = samples.rgb[channel].sum(axis=1) / np.float32(stage.supersample**2)

    shape = (num_frames, camera.height, camera.width)
    quantised = np.clip(rgb * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)
    return Frames(
        rgb=np.ascontiguousarray(quantised.reshape(3, *shape).transpose(1, 2, 3, 0)),
        depth=np.ascontiguousarray(hits.depth.reshape(shape)),
        segmentation=np.ascontiguousarray(hits.owner.reshape(shape)),
    )


def first_hit(
    stage: Stage, solids: Sequence[Solid], positions: Floats, points: Floats
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Owner and depth of what the ray from the camera through each of `points` (T, K, 3) meets first, both (T, K)."""
    where = np.asarray(positions, dtype=np.float32)
    targets = np.asarray(points, dtype=np.float32)
    u = targets[..., 0] / targets[..., 2]
    v = (targets[..., 1] - np.float32(stage.camera.y_m)) / targets[..., 2]
    rays = _rays(stage, u, v)
    owner, depth, _ = _visible(
        stage.camera, rays, solids, [tuple(where[:, n, axis, None] for axis in range(3)) for n in range(len(solids))]
    )
    return owner, depth


def _trace(stage: Stage, rays: _Rays, solids: Sequence[Solid], centres: Sequence[Parts]) -> _Seen:
    """What `rays` meet among solids whose centres broadcast against them, with Lambert's law and hard shadows."""
    owner, depth, face = _visible(stage.camera, rays, solids, centres)
    light = _unit(stage.light)
    ambient = np.float32(stage.ambient)
    shadow = np.zeros(owner.shape, dtype=bool)
    for solid, centre in zip(solids, centres, strict=True):
        shadow |= _blocks_light(solid, centre, rays.x, rays.y, rays.depth, light)
    rgb = tuple(np.where(shadow, rays.dark[c], rays.lit[c]) for c in range(3))

    for n, (solid, centre) in enumerate(zip(solids, centres, strict=True)):
        mine = np.nonzero(owner == n + 1)
        if not mine[0].size:
            continue
        distance = depth[mine]
        point = [
            np.broadcast_to(rays.u, owner.shape)[mine] * distance,
            np.broadcast_to(rays.v, owner.shape)[mine] * distance + np.float32(stage.camera.y_m),
            distance,
        ]
        if solid.shape == "sphere":
            lambert = np.zeros_like(distance)
            for axis in range(3):
                offset = point[axis] - np.broadcast_to(centre[axis], owner.shape)[mine]
                lambert += offset * np.float32(light[axis] / solid.size_m)
        else:
            lambert = _face_lambert(light)[face[mine]]
        blocked = lambert <= 0
        for m, (other, place) in enumerate(zip(solids, centres, strict=True)):
            if m != n:
                placed = tuple(np.broadcast_to(axis, owner.shape)[mine] for axis in place)
                blocked |= _blocks_light(other, placed, point[0], point[1], point[2], light)
        shadow[mine] = blocked & (lambert > 0)  # a sphere's own night is a soft border: no reason to supersample it
        strength = ambient + (1 - ambient) * np.where(blocked, np.float32(0), lambert)
        for channel in range(3):
            rgb[channel][mine] = strength * np.float32(solid.colour[channel])
    patch = (owner * np.uint8(16) + face * np.uint8(2) + shadow).astype(np.uint8)
    return _Seen(owner=owner, depth=depth, patch=patch, rgb=rgb)


def _visible(
    camera: Camera, rays: _Rays, solids: Sequence[Solid], centres: Sequence[Parts]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Owner, depth and face (of boxes: 0 front, 1 left, 2 right, 3 top, 4 bottom) of the nearest hit of each ray."""
    shape = np.broadcast_shapes(rays.u.shape, *(axis.shape for centre in centres for axis in centre))
    depth = np.broadcast_to(rays.depth, shape).astype(np.float32)
    owner = np.zeros(shape, dtype=np.uint8)
    face = np.zeros(shape, dtype=np.uint8)
    for n, (solid, (x, y, z)) in enumerate(zip(solids, centres, strict=True)):
        rise = y - np.float32(camera.y_m)
        size = np.float32(solid.size_m)
        if solid.shape == "sphere":
            # Distance from the centre to the ray, not the textbook discriminant: float32 keeps the silhouette exact.
            nearest = (rays.u * x + rays.v * rise + z) * rays.inv_norm
            inside = size * size - (nearest * rays.u - x) ** 2 - (nearest * rays.v - rise) ** 2 - (nearest - z) ** 2
            hit = nearest - np.sqrt(np.maximum(inside, np.float32(0)) * rays.inv_norm)
            nearer = (inside > 0) & (hit < depth)
            which = np.uint8(0)
        else:
            # Slabs: a ray is inside the cube while it is inside all three pairs of planes.
            middle_x, half_x = x * rays.inv_u, size * np.abs(rays.inv_u)
            middle_y, half_y = rise * rays.inv_v, size * np.abs(rays.inv_v)
            enter_x, enter_y, enter_z = middle_x - half_x, middle_y - half_y, z - size
            hit = np.maximum(np.maximum(enter_x, enter_y), enter_z)
            leave = np.minimum(np.minimum(middle_x + half_x, middle_y + half_y), z + size)
            nearer = (hit < leave) & (hit < depth)
            side = np.where(rays.u > 0, np.uint8(1), np.uint8(2))
            level = np.where(rays.v < 0, np.uint8(3), np.uint8(4))
            which = np.where(enter_x >= hit, side, np.where(enter_y >= hit, level, np.uint8(0)))
        depth = np.where(nearer, hit, depth)
        face = np.where(nearer, which, face)
        owner = np.where(nearer, np.uint8(n + 1), owner)
    return owner, depth, face


def _blocks_light(
    solid: Solid, centre: Parts, x: Floats, y: Floats, z: Floats, light: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """True where `solid` stands between the point (x, y, z) and the light."""
    dx, dy, dz = centre[0] - x, centre[1] - y, centre[2] - z
    size = np.float32(solid.size_m)
    lx, ly, lz = (np.float32(a) for a in light)
    if solid.shape == "sphere":
        along = dx * lx + dy * ly + dz * lz
        apart = (along * lx - dx) ** 2 + (along * ly - dy) ** 2 + (along * lz - dz) ** 2
        return (apart < size * size) & (along > 0)
    enter, leave = None, None
    for offset, direction in ((dx, lx), (dy, ly), (dz, lz)):
        inverse = np.float32(1) / (direction if direction != 0 else np.float32(1e-9))
        middle, half = offset * inverse, size * np.abs(inverse)
        enter = middle - half if enter is None else np.maximum(enter, middle - half)
        leave = middle + half if leave is None else np.minimum(leave, middle + half)
    return (enter < leave) & (leave > np.float32(1e-4))


def _borders(patch: NDArray[np.uint8], camera: Camera) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(frame, pixel) of every pixel that differs from one of its eight neighbours."""
    grid = patch.reshape(-1, camera.height, camera.width)
    edge = np.zeros(grid.shape, dtype=bool)
    right = grid[:, :, 1:] != grid[:, :, :-1]
    down = grid[:, 1:] != grid[:, :-1]
    fall = grid[:, 1:, 1:] != grid[:, :-1, :-1]
    climb = grid[:, 1:, :-1] != grid[:, :-1, 1:]
    edge[:, :, 1:] |= right
    edge[:, :, :-1] |= right
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    edge[:, 1:, 1:] |= fall
    edge[:, :-1, :-1] |= fall
    edge[:, 1:, :-1] |= climb
    edge[:, :-1, 1:] |= climb
    frames, pixels = np.nonzero(edge.reshape(patch.shape))
    return frames, pixels


@functools.lru_cache(maxsize=8)
def _background(stage: Stage) -> tuple[_Rays, _Rays, _Rays]:
    """Rays through the pixels' centres (1, P), their samples (P, S * S), the first with mean colours of the second."""
    camera = stage.camera

    def grid(samples: int) -> _Rays:
        offsets = (np.arange(samples) + 0.5) / samples
        columns = np.arange(camera.width)[None, :] + offsets[:, None]
        rows = np.arange(camera.height)[None, :] + offsets[:, None]
        u = (columns - camera.cx_px) / camera.focal_px
        v = (camera.cy_px - rows) / camera.focal_px
        full = (samples, samples, camera.height, camera.width)
        u = np.broadcast_to(u[None, :, None, :], full).reshape(samples * samples, -1)
        v = np.broadcast_to(v[:, None, :, None], full).reshape(samples * samples, -1)
        return _rays(stage, u.T.astype(np.float32, order="C"), v.T.astype(np.float32, order="C"))

    centre, fine = grid(1).map(np.transpose), grid(stage.supersample)

    def mean(colours: Parts) -> Parts:
        red, green, blue = ((c.sum(axis=1) / np.float32(c.shape[1]))[None].astype(np.float32) for c in colours)
        return red, green, blue

    smooth = replace(centre, lit=mean(fine.lit), dark=mean(fine.dark))
    return centre, fine, smooth


def _rays(stage: Stage, u: NDArray[np.float32], v: NDArray[np.float32]) -> _Rays:
    """The rays (u, v, 1) with the floor or wall each of them ends on."""
    camera = stage.camera
    one, tiny = np.float32(1), np.float32(1e-9)
    inv_u = one / np.where(np.abs(u) < tiny, tiny, u)
    inv_v = one / np.where(np.abs(v) < tiny, tiny, v)
    wall_z = np.float32(stage.wall_z_m)
    to_floor = np.where(v < 0, np.float32(-camera.y_m) * inv_v, _NEVER)
    on_floor = to_floor < wall_z
    depth = np.where(on_floor, to_floor, wall_z)
    x = u * depth
    y = np.where(on_floor, np.float32(0), np.float32(camera.y_m) + v * depth)
    cell = np.float32(stage.cell_m)
    odd = (np.floor(x / cell) + np.floor(depth / cell)) % 2 == 1
    light = _unit(stage.light)
    lit, dark = [], []
    for channel in range(3):
        tiles = np.where(odd, np.float32(stage.floor[1][channel]), np.float32(stage.floor[0][channel]))
        albedo = np.where(on_floor, tiles, np.float32(stage.wall[channel]))
        lambert = np.where(on_floor, np.float32(max(light[1], 0)), np.float32(max(-light[2], 0)))
        lit.append(albedo * (np.float32(stage.ambient) + np.float32(1 - stage.ambient) * lambert))
        dark.append(albedo * np.float32(stage.ambient))
    return _Rays(
        u=u,
        v=v,
        inv_u=inv_u,
        inv_v=inv_v,
        inv_norm=one / (u * u + v * v + one),
        depth=depth,
        x=x,
        y=y,
        lit=(lit[0], lit[1], lit[2]),
        dark=(dark[0], dark[1], dark[2]),
    )


def _face_lambert(light: tuple[float, float, float]) -> NDArray[np.float32]:
    """Lambert's cosine of the faces front, left, right, top, bottom."""
    return np.array([-light[2], -light[0], light[0], light[1], -light[1]], dtype=np.float32)


def _unit(vector: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = vector
    length = (x * x + y * y + z * z) ** 0.5
    return x / length, y / length, z / length
