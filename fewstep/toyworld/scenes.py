"""Scenes for the toy world, drawn until one shows what its caption says: a pure function of (seed, index)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import get_args

import numpy as np

from fewstep.errors import UserError
from fewstep.toyworld.captions import in_view
from fewstep.toyworld.physics import COLOURS, Body, Colour, Motion, Scene, SceneError, Trajectory, World, simulate
from fewstep.toyworld.raycast import Shape

_MAX_DRAWS = 2000
_MOTIONS: dict[Shape, tuple[Motion, ...]] = {  # first motions of a lone object, equally likely
    "sphere": ("thrown", "thrown", "thrown", "rolls", "rolls", "dropped", "dropped", "tossed"),
    "box": ("thrown", "thrown", "thrown", "slides", "slides", "slides", "dropped", "tossed"),
}


def specification(world: World, seed: int, index: int, *, gravity: float | None = None) -> Scene:
    """The scene of clip (seed, index), without rendering it: about 2 ms.

    Scenes are drawn until one is presentable under the world's own gravity: every object moves visibly, stays in the
    picture, does as its word says, and starts apart from the others. Another gravity plays the same scene.
    """
    if seed < 0 or index < 0:
        raise UserError(f"seed and index: not negative, got {seed}, {index}")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    low, high = world.gravity_scale
    factor = low * (high / low) ** rng.random()
    actual = world.gravity * factor if gravity is None else float(gravity)
    # Drawn once, so that crowded scenes, which fail more often, do not become rarer.
    num_objects = int(rng.integers(world.min_objects, world.max_objects + 1))
    meets = num_objects > 1 and rng.random() < world.meeting_share and world.num_frames >= 9  # shorter: no time to meet
    shapes: list[Shape] = [get_args(Shape)[n] for n in rng.integers(2, size=num_objects)]
    names = [get_args(Colour)[n] for n in rng.permutation(len(COLOURS))[:num_objects]]
    for _ in range(_MAX_DRAWS):
        bodies = _draw(world, rng, shapes, names, meets)
        if bodies is None:
            continue
        scene = Scene(bodies, world.gravity)
        try:
            if not _presentable(world, scene, simulate(world, scene), meets):
                continue
            if actual != world.gravity:
                scene = replace(scene, gravity=actual)
                simulate(world, scene)  # might pile up under this gravity only
        except SceneError:
            continue
        return scene
    raise UserError(
        f"no presentable scene of {num_objects} objects in {_MAX_DRAWS} draws for {world}: "
        "use a gravity, duration or picture nearer to the default ones, or fewer objects"
    )


def _half_width_m(world: World, lane: int, size_m: float) -> float:
    """How far from the middle the centre of an object may be while all of it is in the picture."""
    camera = world.camera
    return (world.lanes_m[lane] - size_m) * camera.cx_px / camera.focal_px - size_m


def _draw(
    world: World, rng: np.random.Generator, shapes: Sequence[Shape], names: Sequence[Colour], meets: bool
) -> tuple[Body, ...] | None:
    """Bodies placed so that each alone would stay in view; two of them, if they are to meet, touch at some frame."""
    num = len(shapes)
    lanes = [int(lane) for lane in rng.permutation(len(world.lanes_m))[:num]]
    order = rng.permutation(num)  # so that not always the first two named objects meet
    if meets:
        lanes[1] = lanes[0]
    loose: list[Body] = [
        _draw_body(world, rng, shapes[n], names[n], lane, may_stand=meets and k == 1)
        for k, (n, lane) in enumerate(zip(order, lanes, strict=True))
    ]
    alone = [simulate(world, Scene((b,), world.gravity)).positions[:, 0, :2] for b in loose]
    shift = [0.0] * num
    if meets:
        a, b = loose[0], loose[1]
        frame = int(rng.integers(world.num_frames // 4, max(world.num_frames * 3 // 4, world.num_frames // 4 + 1)))
        dx, dy = (float(d) for d in alone[1][frame] - alone[0][frame])
        closing = dx - (alone[1][frame - 1] - alone[0][frame - 1])[0]
        reach = a.size_m + b.size_m
        if abs(dy) > 0.8 * reach or closing == 0:
            return None
        shift[1] = -math.copysign(reach * rng.uniform(0.7, 1.0), closing) - dx
    groups = [(0, 1), *((n,) for n in range(2, num))] if meets else [(n,) for n in range(num)]
    placed: dict[int, Body] = {}
    for group in groups:
        room = [_half_width_m(world, loose[n].lane, loose[n].size_m) for n in group]
        left = max(-r - alone[n][:, 0].min() - shift[n] for n, r in zip(group, room, strict=True))
        right = min(r - alone[n][:, 0].max() - shift[n] for n, r in zip(group, room, strict=True))
        if left >= right:
            return None
        start = float(rng.uniform(left, right))
        for n in group:
            placed[int(order[n])] = replace(loose[n], position=(start + shift[n], loose[n].position[1]))
    return tuple(placed[n] for n in range(num))


def _draw_body(world: World, rng: np.random.Generator, shape: Shape, colour: Colour, lane: int, *, may_stand: bool) -> Body:
    """A body at x = 0 with a first motion that suits its shape and the time there is."""
    sizes = world.sphere_sizes_m if shape == "sphere" else world.box_sizes_m
    size = rng.uniform(*sizes)
    choices = (*_MOTIONS[shape], "stands", "stands", "stands") if may_stand else _MOTIONS[shape]
    motion = choices[rng.integers(len(choices))]
    sign = 1.0 if rng.random() < 0.5 else -1.0
    way = 2 * _half_width_m(world, lane, size) * rng.uniform(0.3, 0.95)  # to cover within the clip, m
    duration = max(world.duration_s, 1 / world.fps)
    slowing = world.gravity * world.box_friction
    x, y, vx, vy = 0.0, size, 0.0, 0.0
    if motion == "thrown":
        y, vx, vy = size + rng.uniform(0.2, 1.3), way / duration, rng.uniform(0.3, 4.2)
    elif motion == "tossed":
        y, vy = size + rng.uniform(0.1, 0.8), rng.uniform(2.5, 4.6)
    elif motion == "dropped":
        y = size + rng.uniform(1.0, 2.3)
    elif motion == "rolls":
        vx = way / duration
    elif motion == "slides":  # the speed that covers the way just before the end, or stops after it
        vx = max(math.sqrt(2 * slowing * way), way / duration + slowing * duration / 2)
        vx = math.sqrt(2 * slowing * way) if vx > slowing * duration else vx
    return Body(shape, colour, size, lane, (x, y), (sign * vx, vy))


def _presentable(world: World, scene: Scene, path: Trajectory, meets: bool) -> bool:
    """True for a scene that shows what its caption says; lengths are in heights of the picture."""
    camera = world.camera
    aspect = camera.width / camera.height
    centre = camera.project(path.positions) * (aspect, 1.0)
    half = np.array([camera.focal_px * b.size_m / (world.lanes_m[b.lane] - b.size_m) / camera.height for b in scene.bodies])
    first = centre[0]
    if (first - half[:, None] < 0).any() or (first + half[:, None] > (aspect, 1.0)).any():
        return False
    if (centre < 0.02).any() or (centre > (aspect - 0.02, 0.98)).any():
        return False
    for i, j in combinations(range(len(half)), 2):
        if np.abs(first[i] - first[j]).max() < half[i] + half[j] + 0.02:
            return False
        # Share of the farther one's square behind the nearer one's.
        far = i if scene.bodies[i].lane >= scene.bodies[j].lane else j
        overlap = np.clip(half[i] + half[j] - np.abs(centre[:, i] - centre[:, j]), 0, 2 * half[far]).prod(-1)
        if (overlap > 0.6 * 4 * half[far] ** 2).sum() > world.num_frames // 4:
            return False
    collisions = [event for event in path.events if event.kind == "collide"]
    if meets != bool(collisions):
        return False
    if any(not 3 <= event.frame <= world.num_frames - 4 or not in_view(world, event) for event in collisions):
        return False
    if any(event.speed < 0.7 for event in collisions[:1]):  # m/s; a mere touch in passing is no collision to the eye
        return False
    time_share = min(1.0, world.duration_s / 0.5)  # less is asked of clips under half a second
    for n, b in enumerate(scene.bodies):
        moved = centre[:, n] - first[n]
        if np.abs(moved).max() < time_share * (0.06 if b.motion == "stands" else 0.12):
            return False
        met = min((event.frame for event in collisions if n in event.objects), default=world.num_frames)
        if b.side is not None and moved[met - 1, 0] * (1 if b.side == "right" else -1) < 0.06 * time_share:
            return False
    return True
