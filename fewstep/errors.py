"""An error that is the user's to mend: its message says what is wrong, where, and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import TextIOBase
from typing import Any

_BARS = re.compile(r"\r[^\x00-\x1f\x7f-\x9f]*|(\n|\x1b\[A)*")  # what bars of other libraries write: a line anew, lines up


class UserError(ValueError):
    """Raised on purpose, with a message for the user; the command line prints it as one line, without a traceback.

    Any other ValueError is a fault of ours and keeps its traceback.
    """


class Terminal:
    """A stream of text through which no name of a file, or other text from elsewhere, commands a terminal."""

    def __init__(self, stream: Any):  # Any: what stands for a terminal, under pytest for instance
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"  # of a terminal that may know ASCII alone
        text = text if _BARS.fullmatch(text) else printable(text)
        return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Within, all that this process prints goes through `printable`, whoever prints it."""
    plain: list[Any] = [Terminal(stream or _Closed()) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(plain[0]), redirect_stderr(plain[1]):
        yield


class _Closed(TextIOBase):
    """Stands for a stream with which this process was not started."""

    def write(self, text: str) -> int:
        return len(text)


def unfiltered(stream: Any) -> Any:  # Any: as above
    """The terminal itself, for bars that are drawn with its commands; their text is made printable before."""
    return stream.stream if isinstance(stream, Terminal) else stream


def printable(text: str) -> str:
    """The text without characters that command a terminal: a name of a file may hold some."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def show(value: object) -> str:
    """A value as it is quoted in a message: short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def some(names: Sequence[str], num: int = 5, separator: str = ", ") -> str:
    """The first `num` names, and how many more there are."""
    more = f" and {len(names) - num} more" if len(names) > num else ""
    if more and separator != ", ":
        more = f"{separator}  ...{more}"
    return separator.join(names[:num]) + more
