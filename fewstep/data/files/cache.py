"""Cache files: named tensors as safetensors, with their origin; a file is whole or not there.

    write(path, {"latents": z}, made_from={"codec": "wan2.1", "dtype": "bfloat16"}, facts={"num_frames": 17, "fps": 16})
    read(path, made_from={"codec": "wan2.1"}).tensors["latents"]       # ValueError if another codec made it

`made_from` is the origin: a file of another origin has the wrong content. `facts` describe the content to a reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import write_tensors
from fewstep.untrusted import stored
from fewstep.untrusted.safe_tensors import open_safetensors, read_safetensors
from fewstep.untrusted.text import Amount, parse_json

_AGAIN = "Delete it and prepare it again"


@dataclass(frozen=True)
class Entry:
    """The header of a cache file; its tensors are read when they are asked for."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    made_from: Mapping[str, str]
    facts: Mapping[str, float]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return read_safetensors(self.path, _AGAIN)[0]


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    made_from: Mapping[str, str] | None = None,
    facts: Mapping[str, float] | None = None,
) -> None:
    """Writes the tensors, in their dtypes; a file of that name is replaced at once, when the new one is complete."""
    write_tensors(path, tensors, _metadata(made_from, facts))


def encoded(
    tensors: Mapping[str, Tensor], *, made_from: Mapping[str, str] | None = None, facts: Mapping[str, float] | None = None
) -> bytes:
    """The content of the file that `write` makes of the same."""
    return b"".join(stored.encoded(tensors, _metadata(made_from, facts)))


def read(path: str | os.PathLike[str], *, made_from: Mapping[str, str] | None = None) -> Entry:
    """The file, of which this reads some kB; refuses one that is damaged, or made from something else than `made_from` says."""
    stored, metadata = open_safetensors(path, _AGAIN)
    tables = {"made_from": dict[str, str], "facts": dict[str, Amount]}
    read = {name: parse_json(metadata.get(name, "{}"), f"{path}: its {name}", _AGAIN, kind) for name, kind in tables.items()}
    entry = Entry(Path(path), {name: one.shape for name, one in stored.items()}, **read)
    refuse_other(entry.path, entry.made_from, made_from or {}, _AGAIN)
    return entry


def refuse_other(path: Path, origin: Mapping[str, str], expected: Mapping[str, str], advice: str) -> None:
    """Raises UserError for a file whose origin is not what is expected of it; other keys do not matter."""
    wrong = {key: value for key, value in expected.items() if origin.get(key) != value}
    if wrong:
        differences = ", ".join(f"{key} is {origin.get(key, 'unknown')!r}, not {value!r}" for key, value in wrong.items())
        raise UserError(f"{path}: made from something else: {differences}. {advice}")


def _metadata(made_from: Mapping[str, str] | None, facts: Mapping[str, float] | None) -> dict[str, str]:
    return {"made_from": json.dumps(made_from or {}, sort_keys=True), "facts": json.dumps(facts or {}, sort_keys=True)}
