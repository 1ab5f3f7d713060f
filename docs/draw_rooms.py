"""Draws docs/pictures/rooms.svg from the imports of the package: python docs/draw_rooms.py

tests/test_rooms.py fails where the picture is not current, and reads the imports with the functions of this file.

A room is a folder of fewstep/, or one of its files. It stands one floor above the highest room it imports. An arrow that
follows from others is left out: where A imports B and B imports C, no arrow from A to C is drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fewstep"
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"
# Each room may import these.
GROUND = ("errors", "environment", "files", "untrusted", "progress", "registry", "solvers")
# Entry points: they only call `cli`.
LEFT_OUT = ("__init__", "__main__", "train")

WORDS = {  # what is in a room
    "batch": "Condition, Batch",
    "cli": "verbs",
    "config": "settings, overrides",
    "data": "clips, pairs, controls, order",
    "distill": "the road in one command",
    "diffusion": "paths, samplers, guidance",
    "evaluation": "scores, report",
    "export": "diffusers, original names",
    "inference": "generate, pairs, evaluate",
    "methods": "losses",
    "networks": "families, codecs, weights",
    "parallel": "mesh, FSDP2",
    "prepare": "controls, latents, shards",
    "recipes": "complete runs",
    "toyworld": "the embedded example",
    "training": "loop, checkpoints, plan",
}

WIDTH, FLOOR, BOX, MARGIN = 960, 96, 44, 24


# --- reading the imports


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="ascii"), str(path))


def imports_of(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The dotted names that import statements among `nodes` ask for: `a.b` of `import a.b`, `a.b.c` of `from a.b import c`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """For each module of the package the modules of the package that it imports, wherever the statement stands."""
    known = modules()
    out: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {nearest(word, known) for word in imports_of(ast.walk(tree_of(path)))}
        out[name] = {target for target in targets if target and target != name}
    return out


def nearest(name: str, known: Mapping[str, Path]) -> str:
    """The module that a dotted name lies in; "" if it is none of the package's."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """fewstep.data.files.video -> data"""
    return [*module.split("."), "__init__"][1]


def rooms() -> dict[str, set[str]]:
    """For each room, the other rooms that it imports; the ground floor is left out."""
    out: dict[str, set[str]] = {}
    for module, targets in arrows().items():
        room = room_of(module)
        if room not in (*GROUND, *LEFT_OUT):
            out.setdefault(room, set()).update(map(room_of, targets))
    return {room: {o for o in others if o in out and o != room} for room, others in out.items()}


# --- placing the rooms


def floors_of(imported: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports."""
    out: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in out:
            out[room] = 1 + max((floor(other) for other in imported[room]), default=-1)
        return out[room]

    for room in imported:
        floor(room)
    return out


def reduced(imported: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The arrows that do not follow from others."""

    @cache
    def below(room: str) -> frozenset[str]:
        return frozenset(imported[room]).union(*map(below, imported[room]))

    return {room: sorted(others - set().union(*map(below, others))) for room, others in imported.items()}


def placed(imported: Mapping[str, set[str]]) -> tuple[dict[str, tuple[float, float]], list[list[str]]]:
    """The middle of each box and of each bend, and every drawn arrow as the boxes and bends that it runs through.

    An arrow over several floors has a bend on each floor between, as if it were a narrow box: so it crosses no box. Boxes and
    bends of a floor are ordered by the places of what they are joined to, which keeps arrows short.
    """
    floor_of = floors_of(imported)
    num = max(floor_of.values()) + 1
    rows = [sorted(room for room in imported if floor_of[room] == level) for level in range(num)]
    ways: list[list[str]] = []
    for room, others in reduced(imported).items():
        for other in others:
            bends = [f"{room}>{other}@{level}" for level in range(floor_of[room] - 1, floor_of[other], -1)]
            for bend in bends:
                rows[int(bend.rpartition("@")[2])].append(bend)
            ways.append([room, *bends, other])
    joined: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for way in ways:
        for upper, lower in pairwise(way):
            joined[upper].append(lower)
            joined[lower].append(upper)
    spot: dict[str, float] = {}

    def spread(row: list[str]) -> None:
        slots = [0.3 if ">" in name else 1.0 for name in row]
        for index, name in enumerate(row):
            spot[name] = (sum(slots[:index]) + slots[index] / 2) / sum(slots)

    for row in rows:
        spread(row)
    for _ in range(12):
        for row in rows:
            row.sort(key=lambda name: (sum(spot[other] for other in joined[name]) / max(len(joined[name]), 1), name))
            spread(row)
    heights = [MARGIN + (num - 1 - level) * FLOOR + BOX / 2 for level in range(num)]
    return {name: (WIDTH * spot[name], heights[level]) for level, row in enumerate(rows) for name in row}, ways


# --- drawing


def draw() -> str:
    imported = rooms()
    at, ways = placed(imported)
    bottom = max(y for _, y in at.values()) + BOX / 2 + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOX + MARGIN:.0f}" '
        'font-family="system-ui, sans-serif" font-size="15" text-anchor="middle">',
        "<title>The rooms of fewstep and what they import</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6b82"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for way in ways:
        parts.append(f'<path d="{curve(way, at)}" fill="none" stroke="#5b6b82" stroke-width="1.4" marker-end="url(#head)"/>')
    for room in imported:
        x, y = at[room]
        words = WORDS.get(room, "")
        width = max(9.5 * len(room), 6.2 * len(words)) + 24
        parts.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="7" fill="#eef3fb" '
            'stroke="#2f5597"/>'
        )
        parts.append(f'<text x="{x:.0f}" y="{y - 2:.0f}" fill="#14213d">{room}</text>')
        parts.append(f'<text x="{x:.0f}" y="{y + 15:.0f}" font-size="11" fill="#44546a">{words}</text>')
    parts.append(
        f'<rect x="{MARGIN}" y="{bottom:.0f}" width="{WIDTH - 2 * MARGIN}" height="{BOX}" rx="7" '
        'fill="#f3f0e6" stroke="#8a7a3c"/>'
    )
    parts.append(
        f'<text x="{WIDTH / 2:.0f}" y="{bottom + BOX / 2 + 5:.0f}" fill="#4a421f">the ground, which every room may import: '
        f"{', '.join(GROUND)}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def curve(way: Sequence[str], at: Mapping[str, tuple[float, float]]) -> str:
    """The path of an arrow, from the lower side of its first box to the upper side of its last one."""
    points = [at[name] for name in way]
    (x, y), (to_x, to_y) = points[0], points[-1]
    points = [(x, y + BOX / 2), *points[1:-1], (to_x, to_y - BOX / 2 - 2)]
    text = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x, y), (to_x, to_y) in pairwise(points):
        bend = (to_y - y) / 2
        text += f"C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
    return text


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="ascii")
    print(PICTURE)
