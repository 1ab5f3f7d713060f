"""A small physical world: spheres and cubes are thrown, dropped, roll and slide before a fixed camera.

    world = World()                      # 32 x 32, 17 frames at 16 fps
    path = simulate(world, scene)        # places, velocities and events, in closed form

Each object keeps to one of three lanes (a fixed z), so motion is planar and only objects of one lane can meet. Nothing
tumbles or spins: a sphere rolls with a small resistance, a box slides with Coulomb friction, both bounce. Between events
motion is integrated in closed form, so flight is an exact parabola; an impact loses energy by its restitution, friction
loses it otherwise, nothing adds any.

An object that comes to lie on another one is outside this world: `simulate` refuses it and the drawing of scenes
(`scenes`) avoids it. Pictures of it are made in `clips`, words in `captions`.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError
from fewstep.toyworld import raycast
from fewstep.toyworld.raycast import Camera, Shape

Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Motion = Literal["thrown", "tossed", "dropped", "rolls", "slides", "stands"]
Side = Literal["left", "right"]

COLOURS: dict[Colour, raycast.RGB] = {  # hues at least 44 degrees apart, and no grey
    "red": (0.92, 0.16, 0.14),
    "green": (0.16, 0.72, 0.22),
    "blue": (0.17, 0.33, 0.95),
    "yellow": (1.00, 0.87, 0.12),
    "purple": (0.66, 0.20, 0.84),
    "cyan": (0.10, 0.80, 0.84),
}


Palette = Literal["bright", "deep"]


class SceneError(UserError):
    """A scene this world cannot play: objects that start inside one another, or come to lie on one another."""


@dataclass(frozen=True)
class World:
    """How clips look and what their physics is. Scenes do not depend on the resolution, only on the aspect ratio."""

    height: int = 32
    width: int = 32
    num_frames: int = 17  # 1 + 4 k, as causal video tokenizers want it
    fps: float = 16.0
    supersample: int = 4  # samples along each axis of a pixel at a silhouette or shadow; 1 is off
    min_objects: int = 1
    max_objects: int = 3
    gravity: float = 9.81  # m/s^2; scenes are drawn to look well under this one
    gravity_scale: tuple[float, float] = (
        1.0,
        1.0,
    )  # each clip plays under gravity times a factor from this range, log-uniform
    meeting_share: float = 0.6  # of scenes with two or more objects: two of them are aimed at one another
    sphere_restitution: float = 0.75  # against the floor
    box_restitution: float = 0.3
    pair_restitution: float = 0.7
    box_friction: float = 0.35  # Coulomb's, sliding on the floor and in bounces
    rolling_resistance: float = 0.03  # deceleration of a sphere on the floor, in units of gravity
    lanes_m: tuple[float, ...] = (4.6, 5.8, 7.0)  # z of the lanes; further apart than any two objects are wide
    sphere_sizes_m: tuple[float, float] = (0.36, 0.50)  # radius
    box_sizes_m: tuple[float, float] = (0.32, 0.42)  # half of an edge
    palette: Palette = "bright"  # of the objects; deep: the same hues, darker

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.min_objects <= self.max_objects <= len(self.lanes_m):
            problems.append(f"objects: 1 <= min <= max <= {len(self.lanes_m)}, got {self.min_objects}, {self.max_objects}")
        if min(self.height, self.width) < 8 or self.num_frames < 1 or self.fps <= 0 or self.supersample < 1:
            problems.append("height and width: at least 8; num_frames, supersample: at least 1; fps: above 0")
        if not (self.gravity > 0 and 0 < self.gravity_scale[0] <= self.gravity_scale[1]):
            problems.append("gravity and gravity_scale: above 0, the range ascending")
        rebounds = (self.sphere_restitution, self.box_restitution, self.pair_restitution)
        if not all(0 <= e <= 1 for e in rebounds) or min(self.box_friction, self.rolling_resistance) < 0:
            problems.append("restitution: within 0..1; friction: not negative (energy would grow)")
        widest = 2 * max(*self.sphere_sizes_m, *self.box_sizes_m)
        if any(far - near < widest for near, far in zip(self.lanes_m, self.lanes_m[1:], strict=False)):
            problems.append(f"lanes_m: ascending, at least {widest} m apart, or objects of two lanes would overlap")
        if problems:
            raise UserError("World: " + "; ".join(problems))

    @property
    def camera(self) -> Camera:
        """The fixed camera: 2.3 m high, horizon a fifth from the top, so that all lanes' floor is in the picture."""
        return Camera(
            width=self.width,
            height=self.height,
            focal_px=1.31 * self.height,
            cx_px=self.width / 2,
            cy_px=0.20 * self.height,
            y_m=2.3,
        )

    @property
    def stage(self) -> raycast.Stage:
        """Camera, floor, wall and light, as the renderer takes them."""
        return raycast.Stage(
            camera=self.camera,
            wall_z_m=self.lanes_m[-1] + 2.4,
            cell_m=1.4,
            floor=((0.88, 0.86, 0.83), (0.77, 0.75, 0.72)),
            wall=(0.93, 0.96, 1.00),
            light=(-0.45, 1.0, -0.55),
            ambient=0.55,
            supersample=self.supersample,
        )

    def paint(self, colour: Colour) -> raycast.RGB:
        """How an object of this colour looks in full light."""
        red, green, blue = COLOURS[colour]
        share = 1.0 if self.palette == "bright" else 0.72
        return share * red, share * green, share * blue

    @property
    def duration_s(self) -> float:
        return (self.num_frames - 1) / self.fps


@dataclass(frozen=True)
class Body:
    """One object at the start of a clip."""

    shape: Shape
    colour: Colour
    size_m: float  # radius of a sphere, half edge of a box
    lane: int  # index into World.lanes_m, 0 is nearest
    position: tuple[float, float]  # (x, y) of the centre, m; y = size_m stands on the floor
    velocity: tuple[float, float] = (0.0, 0.0)  # m/s

    @property
    def on_floor(self) -> bool:
        return self.position[1] <= self.size_m + 1e-9 and self.velocity[1] <= 0

    @property
    def motion(self) -> Motion:
        """The word for what it does at first."""
        if not self.on_floor:
            return "thrown" if self.velocity[0] else "tossed" if self.velocity[1] > 0 else "dropped"
        if not self.velocity[0]:
            return "stands"
        return "rolls" if self.shape == "sphere" else "slides"

    @property
    def side(self) -> Side | None:
        """Where it goes at first; None when it does not go sideways."""
        return None if not self.velocity[0] else "left" if self.velocity[0] < 0 else "right"

    @property
    def mass_kg(self) -> float:
        """Mass at the density of water over a thousand: only ratios matter."""
        return (4 / 3 * math.pi if self.shape == "sphere" else 8.0) * self.size_m**3


@dataclass(frozen=True)
class Scene:
    """The specification of a clip: what there is, where it starts, and the gravity it obeys."""

    bodies: tuple[Body, ...]
    gravity: float = 9.81


@dataclass(frozen=True)
class Event:
    """Something that happened to one object (bounce, land, rest) or two (collide).

    bounce: hits the floor and leaves it again. land: hits the floor and stays on it. rest: comes to a stop on it.
    """

    kind: Literal["bounce", "land", "collide", "rest"]
    time_s: float
    frame: int  # the first frame at or after it
    objects: tuple[int, ...]
    speed: float  # of approach before an impact, m/s; 0 for rest
    place: tuple[float, float, float]  # of contact, m


@dataclass(frozen=True)
class Trajectory:
    """Positions and velocities float64 (T, N, 3) in m and m/s at each frame, and the events in order of time."""

    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]
    events: tuple[Event, ...]


# ---- physics -------------------------------------------------------------------------------------------------------

_SETTLE_SPEED = 0.35  # m/s; a slower rebound from the floor (6 mm high) is no bounce any more
_TOUCH_M = 1e-6  # gap at which two objects count as touching
_MIN_STEP_S = 2e-5  # of the search for contacts: what bounds its cost, at 0.1 mm of overlap in the worst case
_CLOSING_SPEED = 1e-6  # m/s; below it two touching objects do not approach, whatever the rounding says
_MAX_CONTACTS = 10  # of one pair within a clip; more means that one lies on the other or pushes it


@dataclass
class _Moving:
    """State of one body between events: p + v t + a t^2 / 2."""

    body: Body
    x: float
    y: float
    vx: float
    vy: float
    on_floor: bool
    ax: float = 0.0
    ay: float = 0.0

    def at(self, t: float) -> tuple[float, float]:
        return self.x + self.vx * t + self.ax * t * t / 2, self.y + self.vy * t + self.ay * t * t / 2

    def advance(self, t: float) -> None:
        self.x, self.y = self.at(t)
        self.vx += self.ax * t
        self.vy += self.ay * t


def simulate(world: World, scene: Scene) -> Trajectory:
    """What happens to `scene`: from event to event, in closed form between them. Costs about 0.3 ms.

    Raises SceneError for objects that start in the floor or in one another, or that come to lie on or push one another.
    """
    bodies = scene.bodies
    moving = [_Moving(b, *b.position, *b.velocity, on_floor=b.on_floor) for b in bodies]
    lanes = [world.lanes_m[b.lane] for b in bodies]
    pairs = [(i, j) for i, j in combinations(range(len(bodies)), 2) if bodies[i].lane == bodies[j].lane]
    for b in bodies:
        if b.position[1] < b.size_m - 1e-9:
            raise SceneError(
                f"the {b.colour} {b.shape} starts in the floor: y {b.position[1]:g} m is below its size {b.size_m:g} m"
            )
    for i, j in pairs:
        if _gap(moving[i], moving[j], 0.0) < -1e-9:
            raise SceneError(f"the {bodies[i].colour} and the {bodies[j].colour} object start inside one another")

    positions = np.empty((world.num_frames, len(bodies), 3))
    velocities = np.zeros_like(positions)
    positions[:, :, 2] = lanes
    events: list[Event] = []
    contacts = dict.fromkeys(pairs, 0)
    now, frame = 0.0, 0
    while frame < world.num_frames:
        for m in moving:
            _accelerate(world, m, scene.gravity)
        step = max((world.num_frames - 1) / world.fps - now, 0.0) + 1e-9
        kind, one, pair = "end", -1, (-1, -1)
        for n, m in enumerate(moving):
            until, what = _own_event(m)
            if until < step:
                step, kind, one = until, what, n
        for i, j in pairs:
            until = _contact(moving[i], moving[j], step)
            if until < step:
                step, kind, pair = until, "collide", (i, j)
        while frame < world.num_frames and frame / world.fps <= now + step:
            t = frame / world.fps - now
            for n, m in enumerate(moving):
                positions[frame, n, :2] = m.at(t)
                velocities[frame, n, :2] = m.vx + m.ax * t, m.vy + m.ay * t
            frame += 1
        if kind == "end":
            break
        for m in moving:
            m.advance(step)
        now += step
        seen_at = math.ceil(now * world.fps - 1e-9)
        if kind == "collide":
            i, j = pair
            contacts[pair] += 1
            if contacts[pair] > _MAX_CONTACTS:
                raise SceneError(f"the {bodies[i].colour} and the {bodies[j].colour} object lie on or push one another")
            speed, place = _collide(moving[i], moving[j], world.pair_restitution)
            events.append(Event("collide", now, seen_at, pair, speed, (*place, lanes[i])))
            continue
        m = moving[one]
        if kind == "floor":
            speed = -m.vy
            events.append(Event(_hit_floor(world, m), now, seen_at, (one,), speed, (m.x, 0.0, lanes[one])))
        if m.on_floor and (kind == "rest" or m.vx == 0):
            m.vx = 0.0
            events.append(Event("rest", now, seen_at, (one,), 0.0, (m.x, 0.0, lanes[one])))
    return Trajectory(positions, velocities, tuple(events))


def energy(world: World, scene: Scene, path: Trajectory) -> NDArray[np.float64]:
    """Kinetic and potential energy (T,) in J, up to the unit of mass; it never grows."""
    mass = np.array([b.mass_kg for b in scene.bodies])
    return (mass * ((path.velocities**2).sum(-1) / 2 + scene.gravity * path.positions[..., 1])).sum(-1)


def _accelerate(world: World, m: _Moving, gravity: float) -> None:
    """Sets the acceleration that holds until the body's next event."""
    if not m.on_floor:
        m.ax, m.ay = 0.0, -gravity
        return
    slowing = gravity * (world.rolling_resistance if m.body.shape == "sphere" else world.box_friction)
    m.ax, m.ay = (-math.copysign(slowing, m.vx) if m.vx else 0.0), 0.0


def _own_event(m: _Moving) -> tuple[float, Literal["floor", "rest"]]:
    """When the body, left alone, reaches the floor or stops on it."""
    if not m.on_floor:
        height = max(m.y - m.body.size_m, 0.0)
        return (m.vy + math.sqrt(m.vy * m.vy - 2 * m.ay * height)) / -m.ay, "floor"
    return (-m.vx / m.ax if m.ax else math.inf), "rest"


def _hit_floor(world: World, m: _Moving) -> Literal["bounce", "land"]:
    """Reflects the velocity; a box also loses up to friction times the normal impulse along the floor."""
    restitution = world.sphere_restitution if m.body.shape == "sphere" else world.box_restitution
    rebound = -restitution * m.vy
    m.y = m.body.size_m
    settles = rebound < _SETTLE_SPEED
    if m.body.shape == "box":
        drag = world.box_friction * -m.vy * (1 + (0 if settles else restitution))
        m.vx = math.copysign(max(abs(m.vx) - drag, 0.0), m.vx) if m.vx else 0.0
    m.vy = 0.0 if settles else rebound
    m.on_floor = settles
    return "land" if settles else "bounce"


def _gap(a: _Moving, b: _Moving, t: float) -> float:
    """A lower bound of the distance of two bodies of one lane after t, exact near contact, negative if they overlap."""
    (ax, ay), (bx, by) = a.at(t), b.at(t)
    dx, dy = abs(bx - ax), abs(by - ay)
    if a.body.shape == "sphere" and b.body.shape == "sphere":
        return math.hypot(dx, dy) - a.body.size_m - b.body.size_m
    if a.body.shape == "box" and b.body.shape == "box":
        return max(dx, dy) - a.body.size_m - b.body.size_m
    box, ball = (a.body, b.body) if a.body.shape == "box" else (b.body, a.body)
    over_x, over_y = dx - box.size_m, dy - box.size_m
    if over_x > 0 and over_y > 0:
        return math.hypot(over_x, over_y) - ball.size_m
    return max(over_x, over_y) - ball.size_m


def _normal(a: _Moving, b: _Moving) -> tuple[float, float]:
    """The unit vector from a to b along which they touch."""
    dx, dy = b.x - a.x, b.y - a.y
    if a.body.shape != b.body.shape:
        box = a if a.body.shape == "box" else b
        dx -= math.copysign(min(abs(dx), box.body.size_m), dx)
        dy -= math.copysign(min(abs(dy), box.body.size_m), dy)
    elif a.body.shape == "box":
        dx, dy = (dx, 0.0) if abs(dx) >= abs(dy) else (0.0, dy)
    length = math.hypot(dx, dy)
    return dx / length, dy / length


def _contact(a: _Moving, b: _Moving, horizon: float) -> float:
    """When the two touch while approaching, within `horizon` seconds; infinity if they do not.

    Steps by gap / fastest closing speed, so that it cannot step over a contact, however short.
    """
    rel_vx, rel_vy = b.vx - a.vx, b.vy - a.vy
    rel_ax, rel_ay = b.ax - a.ax, b.ay - a.ay
    fastest = math.hypot(rel_vx, rel_vy) + math.hypot(rel_ax, rel_ay) * horizon
    if fastest == 0:
        return math.inf
    apart, t = 0.0, 0.0
    while t < horizon:
        gap = _gap(a, b, t)
        if gap <= _TOUCH_M:
            nx, ny = _normal(replace(a, x=a.at(t)[0], y=a.at(t)[1]), replace(b, x=b.at(t)[0], y=b.at(t)[1]))
            if (rel_vx + rel_ax * t) * nx + (rel_vy + rel_ay * t) * ny < -_CLOSING_SPEED:
                break
        else:
            apart = t
        t += max(gap / fastest, _MIN_STEP_S)
    else:
        return math.inf
    if gap < 0 and t - apart <= 1.5 * _MIN_STEP_S:  # the shortest step went a hair too far
        for _ in range(20):
            middle = (apart + t) / 2
            apart, t = (middle, t) if _gap(a, b, middle) > _TOUCH_M else (apart, middle)
    return t


def _collide(a: _Moving, b: _Moving, restitution: float) -> tuple[float, tuple[float, float]]:
    """Exchanges momentum along the normal, without friction; returns speed of approach and place of contact (x, y).

    A body on the floor that is pushed down cannot give way: the floor's impulse is part of the same impact.
    """
    nx, ny = _normal(a, b)
    approach = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
    per_a, per_b = 1 / a.body.mass_kg, 1 / b.body.mass_kg
    held_a, held_b = a.on_floor and ny > 0, b.on_floor and ny < 0
    yield_a = per_a * (nx * nx + (0 if held_a else ny * ny))
    yield_b = per_b * (nx * nx + (0 if held_b else ny * ny))
    impulse = (1 + restitution) * approach / (yield_a + yield_b)
    a.vx -= impulse * per_a * nx
    b.vx += impulse * per_b * nx
    a.vy -= 0 if held_a else impulse * per_a * ny
    b.vy += 0 if held_b else impulse * per_b * ny
    a.on_floor = a.on_floor and a.vy <= 0
    b.on_floor = b.on_floor and b.vy <= 0
    if b.body.shape == "sphere":
        return approach, (b.x - b.body.size_m * nx, b.y - b.body.size_m * ny)
    middle = a.y if a.body.shape == "sphere" else (a.y + b.y) / 2  # of two boxes: the middle of the faces' contact, about
    return approach, (a.x + a.body.size_m * nx, middle + a.body.size_m * ny)
