"""Damage: to bytes, to the tree of a JSON or YAML file, to lines, to the place of a file; and commands that nobody meant.

`pick(options)` and `number(low, high)` are the only sources of chance, so that hypothesis can replay and shrink a case.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Draw(Protocol):
    def pick(self, options: Sequence[Any]) -> Any: ...
    def number(self, low: int, high: int) -> int: ...


DEEP = 100_000
WORDS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**42, 2**63, -(2**70), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "a", "../x", "../../x", "/etc/passwd", "/dev/zero", "a/b", ".hidden", "x" * 5000, "\x1b[31mred", "caf\u00e9"),
    *("\u0000", "\ud800", "-1", "nan", "true", "latest", "iter_000000002", "iter_999999999", "student.ema", "{}", "[]"),
    *([], {}, [[]], [1, "a", None], {"kind": "wan"}, {"kind": 3}, {"a": {"b": {"c": []}}}, [1e9] * 50),
)


def damaged_bytes(draw: Draw, content: bytes) -> bytes:
    """The bytes with some changed, cut, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw.number(1, 4)):
        place = draw.number(0, max(len(data) - 1, 0))
        how = draw.pick(("set", "flip", "number", "insert", "cut", "end", "repeat", "zero"))
        if not data:
            break
        if how == "set":
            data[place] = draw.number(0, 255)
        elif how == "flip":
            data[place] ^= 1 << draw.number(0, 7)
        elif how == "number":  # sizes and counts are four or eight bytes somewhere
            value = draw.pick((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**24, 65535, 0x7FFF0000))
            data[place : place + 4] = value.to_bytes(4, draw.pick(("big", "little")))
        elif how == "insert":
            data[place:place] = bytes(draw.number(0, 255) for _ in range(draw.number(1, 6)))
        elif how == "cut":
            del data[place : place + draw.number(1, 40)]
        elif how == "end":
            del data[place:]
        elif how == "zero":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        else:
            data[place:place] = data[place : place + draw.number(1, 60)]
    return bytes(data)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a tree are, the tree itself first."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in _places(value, (*path, key)))]


def damaged_tree(draw: Draw, tree: Any) -> Any:
    """The tree with a value replaced, a key removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.number(1, 2)):
        path = draw.pick(_places(tree))
        if not path:
            if draw.number(0, 9) == 0:
                return copy.deepcopy(draw.pick(WORDS))
            continue
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        how = draw.pick(("replace", "replace", "replace", "remove", "rename", "add", "wrap"))
        if how == "replace":
            holder[path[-1]] = copy.deepcopy(draw.pick(WORDS))  # the next damage may be inside
        elif how == "wrap":
            holder[path[-1]] = [holder[path[-1]]]
        elif how == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw.pick(("x", "", "../x", "kind", "a\u0007", "config", "name"))] = (
                holder.pop(path[-1]) if how == "rename" else copy.deepcopy(draw.pick(WORDS))
            )
    return tree


def damaged_json(draw: Draw, content: bytes) -> bytes:
    how = draw.number(0, 19)
    if how == 0:
        return b"[" * DEEP
    if how == 1:
        return b'{"a":' * 900 + b"1" + b"}" * 900
    if how == 2:
        return content.replace(b"{", b'{"kind": 1, "kind": 2, ', 1)
    if how == 3:
        return damaged_bytes(draw, content)
    if how == 4:
        return content.replace(b"1", b"9" * draw.pick((30, 5000)), 1)
    if how == 5:
        return draw.pick(
            (b"", b"\xef\xbb\xbf" + content, b"\xff\xfe" + content, content.decode().encode("utf-16"), b"\x00" * 64)
        )
    return json.dumps(damaged_tree(draw, json.loads(content))).encode()


def damaged_lines(draw: Draw, content: bytes) -> bytes:
    lines = content.splitlines() or [b"{}"]
    place = draw.number(0, len(lines) - 1)
    try:
        lines[place] = damaged_json(draw, lines[place])
    except ValueError:
        lines[place] = damaged_bytes(draw, lines[place])
    return b"\n".join(lines) + draw.pick((b"\n", b"", b"\r\n", b"\n\n"))


def damaged_yaml(draw: Draw, content: bytes) -> bytes:
    import yaml

    how = draw.number(0, 9)
    if how == 0:
        bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
        return (bomb + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))).encode()
    if how == 1:
        return draw.pick(
            (b"&a [*a]", b"[" * 5000, b"a: " * 500, b"!!python/object/apply:os.system [touch ran]", b"", b"- 1", b"%")
        )
    if how == 2:
        return damaged_bytes(draw, content)
    return yaml.safe_dump(damaged_tree(draw, yaml.safe_load(content)), allow_unicode=True).encode("utf-8", "replace")


DAMAGES: dict[str, Callable[[Draw, bytes], bytes]] = {
    "json": damaged_json,
    "lines": damaged_lines,
    "yaml": damaged_yaml,
    "bytes": damaged_bytes,
    "text": damaged_bytes,
}


def damage(draw: Draw, path: Path, kind: str, outside: Path) -> str:
    """Damages a file, or what is in its place; returns what was done."""
    how = draw.number(0, 29)
    if how > 6:
        path.write_bytes(DAMAGES[kind](draw, path.read_bytes()))
        return "content"
    path.unlink()
    if how == 0:
        return "missing"
    if how == 1:
        path.mkdir()
        return "a folder"
    if how == 2:
        os.mkfifo(path)
        return "a pipe"
    if how == 3:
        path.symlink_to("/dev/zero")
        return "/dev/zero"
    if how == 4:
        path.symlink_to(outside / "secret")
        return "a link to a secret"
    if how == 5:
        path.symlink_to(path.name)
        return "a link to itself"
    path.write_bytes(draw.pick((b"", b"\x00", b"%!PS\n(x) run\n", b"MZ", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x80\x04.")))
    return "other content"


def remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


# --- commands


VALUES = (
    *("", "-1", "0", "1", "2", "nan", "inf", "1e999", "9" * 5000, "../../x", "/dev/zero", "/dev/null", "a=b", "=", "--", "-"),
    *(
        "true",
        "None",
        "\x1b[31mred",
        "caf\u00e9",
        "\udcff",
        "{home}/set",
        "{home}/run",
        "{home}/weights.pt",
        "{home}/mine.json",
    ),
    *(
        "{home}/fifo",
        "{home}/nowhere",
        "{home}/link",
        "{out}",
        "{out}/x",
        "{out}/x.mp4",
        "{home}/shards",
        "{home}/evil.py",
        "x,y",
    ),
    *(
        "depth",
        "edge",
        "clips",
        "toyworld",
        "fp32",
        "lossless",
        "safetensors",
        "{home}/run@9",
        "{home}/run:critic",
        "*",
        "a.b.c",
    ),
)
EDITS = (
    *(
        "trainer.max_iter=-1",
        "trainer.max_iter=x",
        "job.name=../../x",
        "job.name=",
        "data=folder",
        "data.dataset_dir={home}/set",
    ),
    *("method=kd", "method=nothing", "method.t_list=[]", "optim.lr=nan", "networks.student=wan", "a" * 3000 + "=1", "=1", "x"),
    *("experiment=nothing", "{home}/fifo.yaml", "{home}/nowhere.yaml", "{home}/bad.yaml", "trainer=", "trainer={home}", "..=1"),
)


def command(draw: Draw, verbs: Sequence[tuple[tuple[str, ...], Sequence[str]]]) -> list[str]:
    """A verb with some of its options, and values of whatever kind."""
    verb, options = draw.pick(verbs)
    words = list(verb)
    for _ in range(draw.number(0, 2)):
        words.append(draw.pick(VALUES))
    for _ in range(draw.number(0, 4)):
        option = draw.pick((*options, "--nothing", "-x"))
        value = draw.pick(VALUES)
        words += draw.pick(([option, value], [f"{option}={value}"], [option]))
    if verb[0] in ("train", "plan", "check"):
        words += [draw.pick(EDITS) for _ in range(draw.number(0, 3))]
    if verb[0] == "train":
        words += ["experiment=analytic_kd", "--dryrun", "job.name=other"][draw.number(0, 1) :]
    if verb[0] in ("demo", "distill"):
        words += ["--nothing"]  # each would work for minutes
    return words
