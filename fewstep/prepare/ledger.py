"""The list of files that a command has written, for formats that cannot hold their own origin: pickles and videos.

    DIR/t5_xxl/.made.jsonl      {"made_from": {"encoder": "9f2c..."}}
                                {"name": "clip_0", "content": "03ab..."}

A line is written before its file: a file with a line is complete and has that content. A file without a line was written by
another program; it is left as it is and never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.files.cache import refuse_other
from fewstep.data.folder.layout import LEDGER
from fewstep.errors import UserError, show
from fewstep.files import Lines, lock, remove
from fewstep.untrusted.text import parse_json

NAME = LEDGER


@dataclass(frozen=True)
class _First:
    made_from: dict[str, str]


@dataclass(frozen=True)
class _Line:
    name: str
    content: str


@contextmanager
def open_ledger(path: Path, made_from: Mapping[str, str], file_of: Callable[[str], Path]) -> Iterator[Ledger]:
    """The lines at `path`, one process at a time. Raises UserError if files of another origin are there."""
    with lock(path) as file:
        yield Ledger(file, made_from, file_of)


class Ledger:
    """The lines of one folder."""

    def __init__(self, file: Lines, made_from: Mapping[str, str], file_of: Callable[[str], Path]):
        self.path, self.made_from, self.file_of = file.path, dict(made_from), file_of
        self._file = file
        self._lines = self._read()

    def state(self, name: str, content: str) -> str:
        """done, todo, or foreign: there, but written by another program."""
        if not self.file_of(name).is_file():
            return "todo"
        line = self._lines.get(name)
        return "foreign" if line is None else "done" if line == content else "todo"

    def begin(self, name: str, content: str) -> None:
        """Call this right before writing the file."""
        remove(self.file_of(name))
        if self._lines.get(name) != content:  # else a kill came between this line and the file
            self._append({"name": name, "content": content})
            self._lines[name] = content

    def _read(self) -> dict[str, str]:
        whole = self._file.content()
        end = whole.rfind(b"\n") + 1  # what follows is a line that a kill cut off; its file was not begun
        advice, rows = "Remove it: files that are there are then kept as yours", whole[:end].splitlines()
        made_from = parse_json(rows[0], str(self.path), advice, _First).made_from if rows else self.made_from
        read = [parse_json(row, str(self.path), advice, _Line) for row in rows[1:]]
        lines = {line.name: line.content for line in read}
        if strange := [name for name in lines if Path(name).name != name or name in ("", "..") or len(name) > 255]:
            raise UserError(f"{self.path}: names {show(strange[0])}, which is no file of its folder. {advice}")
        there = [name for name in lines if self.file_of(name).is_file()]
        if there:
            advice = f"Use its settings, write to another folder, or remove its {len(there)} files"
            refuse_other(self.path.parent, made_from, dict.fromkeys(made_from, "left out") | self.made_from, advice)
        self._file.cut(end if there else 0)
        if not there:
            self._append({"made_from": self.made_from})
        return lines if there else {}

    def _append(self, row: Mapping[str, object]) -> None:
        self._file.add(json.dumps(row))
