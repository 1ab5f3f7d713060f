"""Clips of the toy world: pictures, depth, segmentation and keypoints of a scene, with its caption.

    made = clip(World(), seed=0, index=7)  # rgb, exact depth, segmentation, keypoints, state, events, caption

A clip is a function of (seed, index) alone, with equal bits whatever the batch, the order or the process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError
from fewstep.toyworld import raycast
from fewstep.toyworld.captions import caption
from fewstep.toyworld.physics import Event, Scene, Trajectory, World, simulate
from fewstep.toyworld.raycast import Camera
from fewstep.toyworld.scenes import specification
from fewstep.toyworld.workers import spawned


@dataclass(frozen=True)
class Clip:
    """One clip with its ground truth. Image coordinates run from the top left, 0..1."""

    rgb: NDArray[np.uint8]  # (T, H, W, 3)
    depth: NDArray[np.float32]  # (T, H, W), metres along the camera's axis, of the pixel's centre
    segmentation: NDArray[np.uint8]  # (T, H, W), of the pixel's centre: 0 background, n + 1 object n
    keypoints: NDArray[np.float32]  # (T, N, 9, 3): x, y, visible (0 or 1); the centre, then a box's corners or zeros
    positions: NDArray[np.float64]  # (T, N, 3), m
    velocities: NDArray[np.float64]  # (T, N, 3), m/s
    events: tuple[Event, ...]
    scene: Scene
    caption: str
    camera: Camera
    fps: float
    seed: int
    index: int

    @property
    def collides(self) -> bool:
        """Whether two objects collide in view, which the caption then says."""
        return "collide" in self.caption


def clip(world: World, seed: int, index: int, *, gravity: float | None = None) -> Clip:
    """Clip `index` of the endless series `seed`, a pure function of its arguments.

    `gravity` (m/s^2) plays the same start under another gravity than the world's; objects may then leave the picture.
    """
    return render(world, specification(world, seed, index, gravity=gravity), seed=seed, index=index)


def clips(
    world: World, seed: int, indices: Sequence[int], *, gravity: float | Sequence[float] | None = None, workers: int = 0
) -> list[Clip]:
    """The clips of `indices`, in their order; `stream` is for sets larger than memory (140 kB a clip at 32 x 32)."""
    return list(stream(world, seed, indices, gravity=gravity, workers=workers))


def stream(
    world: World, seed: int, indices: Sequence[int], *, gravity: float | Sequence[float] | None = None, workers: int = 0
) -> Iterator[Clip]:
    """Yields the clips of `indices` in their order, rendered by this process or, if `workers` is above 0, by that many.

    Workers are spawned: a script that uses them needs the usual `if __name__ == "__main__"`.
    """
    gravities = list(gravity) if isinstance(gravity, Sequence) else [gravity] * len(indices)
    if len(gravities) != len(indices):
        raise UserError(f"gravity: one number or one for each of the {len(indices)} indices, got {len(gravities)}")
    jobs = [(world, seed, index, g) for index, g in zip(indices, gravities, strict=True)]
    if workers <= 0:
        yield from map(_job, jobs)
        return
    chunk = max(1, min(16, len(jobs) // (4 * workers)))
    with spawned(workers) as pool:
        yield from pool.map(_job, jobs, chunksize=chunk)


def _job(arguments: tuple[World, int, int, float | None]) -> Clip:
    world, seed, index, gravity = arguments
    return clip(world, seed, index, gravity=gravity)


def render(world: World, scene: Scene, *, seed: int = -1, index: int = -1) -> Clip:
    """The clip of a scene of your own; `seed` and `index` are only noted in it."""
    path = simulate(world, scene)
    solids = [raycast.Solid(b.shape, b.size_m, world.paint(b.colour)) for b in scene.bodies]
    frames = raycast.render(world.stage, solids, path.positions)
    return Clip(
        rgb=frames.rgb,
        depth=frames.depth,
        segmentation=frames.segmentation,
        keypoints=_keypoints(world, scene, path),
        positions=path.positions,
        velocities=path.velocities,
        events=path.events,
        scene=scene,
        caption=caption(world, scene, path),
        camera=world.camera,
        fps=world.fps,
        seed=seed,
        index=index,
    )


def _keypoints(world: World, scene: Scene, path: Trajectory) -> NDArray[np.float32]:
    """Projected centres and corners with visibility, see `Clip.keypoints`."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
    offsets = np.array([np.concatenate([np.zeros((1, 3)), signs * b.size_m * (b.shape == "box")]) for b in scene.bodies])
    points = path.positions[:, :, None] + offsets  # (T, N, 9, 3)
    num_frames, num = points.shape[:2]
    solids = [raycast.Solid(b.shape, b.size_m, world.paint(b.colour)) for b in scene.bodies]
    owner, depth = raycast.first_hit(world.stage, solids, path.positions, points.reshape(num_frames, num * 9, 3))
    owner, depth = owner.reshape(num_frames, num, 9), depth.reshape(num_frames, num, 9)
    image = world.camera.project(points)
    visible = depth > points[..., 2] - 2e-3  # a corner is seen when nothing is nearer on its ray
    visible[..., 0] = owner[..., 0] == np.arange(1, num + 1)  # a centre, when its own object is what is seen there
    visible &= ((image >= 0) & (image < 1)).all(-1)
    keypoints = np.concatenate([image, visible[..., None]], axis=-1).astype(np.float32)
    keypoints[:, [b.shape == "sphere" for b in scene.bodies], 1:] = 0
    return keypoints
