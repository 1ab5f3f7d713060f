"""The language of the toy world: writes a caption from the events of a clip, and reads captions."""

import re
from dataclasses import dataclass
from typing import get_args

import numpy as np

from fewstep.errors import UserError
from fewstep.toyworld.physics import Colour, Event, Motion, Scene, Side, Trajectory, World
from fewstep.toyworld.raycast import Shape

_PHRASES: dict[Motion, str] = {
    "thrown": "is thrown to the {side}",
    "tossed": "is thrown up",
    "dropped": "is dropped",
    "rolls": "rolls to the {side}",
    "slides": "slides to the {side}",
    "stands": "stands still",
}
# Every token `words` can return; captions use no others.
VOCABULARY: tuple[str, ...] = (
    *(".", ",", "a", "the", "and", "they", "collide"),
    *get_args(Shape),
    *get_args(Colour),
    *("is", "thrown", "dropped", "up", "rolls", "slides", "to", "left", "right", "stands", "still"),
)


@dataclass(frozen=True)
class Mention:
    """One object as a caption names it."""

    colour: Colour
    shape: Shape
    motion: Motion
    side: Side | None


def caption(world: World, scene: Scene, path: Trajectory) -> str:
    """A clause for each object, by its first motion, then who collides with whom, if in view before the last frame."""
    clauses = [f"a {b.colour} {b.shape} {_PHRASES[b.motion].format(side=b.side)}" for b in scene.bodies]
    pairs = list(dict.fromkeys(event.objects for event in path.events if in_view(world, event)))
    sentences = [", ".join(clauses)]
    if pairs and len(scene.bodies) == 2:
        sentences.append("They collide")
    else:
        for one, two in pairs:
            a, b = scene.bodies[one], scene.bodies[two]
            sentences.append(f"The {a.colour} {a.shape} and the {b.colour} {b.shape} collide")
    return ". ".join(sentences) + "."


def words(text: str) -> list[str]:
    """The caption as tokens, lower case, punctuation apart; raises ValueError for a word outside VOCABULARY."""
    tokens = re.findall(r"[a-z]+|[^a-z\s]", text.lower())
    unknown = sorted(set(tokens) - set(VOCABULARY))
    if unknown:
        raise UserError(f"not words of the toy world: {', '.join(unknown)}. It knows: {' '.join(VOCABULARY)}")
    return tokens


def read_caption(text: str) -> tuple[tuple[Mention, ...], tuple[tuple[int, int], ...]]:
    """The objects a caption names, in order, and the pairs of them (by position in that order) it says collide."""
    first, *rest = [part.strip() for part in text.lower().rstrip(". ").split(".")]
    mentions = []
    for clause in first.split(","):
        match = re.fullmatch(r"a (\w+) (\w+) (.+)", clause.strip())
        if match is None:
            raise UserError(f"cannot read {clause.strip()!r}: expected 'a COLOUR SHAPE does something'")
        colour, shape, does = match.groups()
        matches = [
            Mention(name, kind, motion, side if "{side}" in phrase else None)
            for name in get_args(Colour)
            for kind in get_args(Shape)
            for motion, phrase in _PHRASES.items()
            for side in get_args(Side)
            if (colour, shape, does) == (name, kind, phrase.format(side=side))
        ]
        if not matches:
            raise UserError(f"cannot read {clause.strip()!r}. Known words: {' '.join(VOCABULARY)}")
        mentions.append(matches[0])
    pairs = []
    for sentence in rest:
        if sentence == "they collide" and len(mentions) == 2:
            pairs.append((0, 1))
            continue
        names = re.fullmatch(r"the (\w+) (\w+) and the (\w+) (\w+) collide", sentence)
        places = {(m.colour, m.shape): n for n, m in enumerate(mentions)}
        if names is None or (names[1], names[2]) not in places or (names[3], names[4]) not in places:
            raise UserError(
                f"cannot read {sentence!r}: expected 'they collide' or 'the COLOUR SHAPE and the COLOUR SHAPE collide'"
            )
        pairs.append((places[names[1], names[2]], places[names[3], names[4]]))
    return tuple(mentions), tuple(pairs)


def in_view(world: World, event: Event) -> bool:
    """True for a collision one can see: inside the picture, and with a frame after it."""
    if event.kind != "collide" or event.frame >= world.num_frames - 1:
        return False
    x, y = world.camera.project(np.array(event.place))
    return bool(0 <= x <= 1 and 0 <= y <= 1)
