"""Bytes, text and JSON of a file, checked and of bounded size: the one way in. What is written here or elsewhere is believed
only as far as its declared type.

    read_bytes(path)   read_text(path)   read_json(path, advice, kind)   read_json_lines(path)   digest_of(path)
    typed(value, where, advice, kind)          what a pickle held, in the type that is declared for it
    with opened(path) as file: ...             a file, and no pipe or device, which may have no end
    with fault_of(place): ...                  whatever a library raises is the fault of the file there
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

from annotated_types import Ge, Le, Predicate

from fewstep.errors import UserError
from fewstep.files import NAME_RULE, explain, is_plain

# What is read of a file whole. JSON takes up to thirty times its bytes in memory: a list in three of them.
_MAX_TEXT_BYTES = 2**24
MAX_JSON_BYTES = 2**26
_MAX_LINE_BYTES = 2**20
ANY_SIZE = 2**62

T = TypeVar("T")
# Numbers of a file: JSON holds larger ones, and what computes with them fails in words of its own.
Count = Annotated[int, Ge(0), Le(2**53)]
Amount = Annotated[float, Ge(0), Le(2**53)]  # the same, and neither infinite nor NaN
Name = Annotated[str, Predicate(is_plain)]


def opened(path: str | os.PathLike[str]) -> BufferedReader:
    """A file, open for reading. Raises UserError for a folder, a device or a pipe, which may have no end; OSError otherwise."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{os.fspath(path)}: is no file, but a folder, a device or a pipe")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike[str], max_bytes: int = _MAX_TEXT_BYTES) -> bytes:
    """The content of a file of at most `max_bytes`. Raises UserError or OSError."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{os.fspath(path)}: has {size:,} bytes; at most {max_bytes:,} are read")
        return file.read(size)


def digest_of(path: str | os.PathLike[str]) -> str:
    """sha256 over the bytes of a file, in hex. Raises UserError or OSError."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike[str], max_bytes: int = _MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises UserError or OSError."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: is not UTF-8 text (byte {error.start})") from None


@overload
def read_json(path: str | os.PathLike[str], advice: str) -> dict[str, Any]: ...
@overload
def read_json(path: str | os.PathLike[str], advice: str, kind: type[T]) -> T: ...
def read_json(path: str | os.PathLike[str], advice: str, kind: Any = dict[str, Any]) -> Any:
    """What a JSON file holds, in the type `kind`: a mapping, or a dataclass, whose other keys are ignored.

    Raises UserError, which names the file, the key and what is wrong, and ends with `advice`.
    """
    try:
        content = read_bytes(path, MAX_JSON_BYTES)
    except (OSError, UserError) as error:
        raise UserError(f"{explain(error)}. {advice}") from None
    return parse_json(content, os.fspath(path), advice, kind)


@overload
def parse_json(content: str | bytes, where: str, advice: str) -> dict[str, Any]: ...
@overload
def parse_json(content: str | bytes, where: str, advice: str, kind: type[T]) -> T: ...
def parse_json(content: str | bytes, where: str, advice: str, kind: Any = dict[str, Any]) -> Any:
    """The same of JSON that comes from elsewhere, such as the header of a file: `where` names it in messages."""
    from pydantic import ValidationError

    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if "\\u0000" in text:  # no path, name or prompt has it, and what reads them fails in words of its own
            raise UserError("holds the character U+0000")
        json.loads(text, object_pairs_hook=_unique)
        value = _adapter(kind).validate_json(text, strict=True)  # refuses what is nested too deep for those who walk it
        return _Table(value, where, advice) if kind == dict[str, Any] else value
    except UnicodeDecodeError as error:
        problem = f"damaged, no JSON: is not UTF-8 text (byte {error.start})"
    except ValidationError as error:
        problem = _problems(error)
    except (ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, UserError) else f"damaged, no JSON: {error}"
    raise UserError(f"{where}: {problem}{advice and '. '}{advice}")


def typed(value: Any, where: str, advice: str, kind: type[T]) -> T:  # value: whatever a pickle held
    """The value as `kind`, a dataclass or a list of them. Raises UserError as `read_json`."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {_problems(error)}. {advice}") from None


@contextmanager
def fault_of(place: object, advice: str = "Copy it again, whole") -> Iterator[None]:
    """Within, whatever a library raises is the fault of the file or folder at `place`, and becomes one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries let out whatever their parsers raise
        reason = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
        reason = f"lacks {reason}" if isinstance(error, KeyError) else f"cannot be opened: {reason}"
        raise UserError(f"{place}: {reason}. {advice}") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The mappings of a JSON lines file. Lines that are none, as a process that is killed leaves one, are left out."""
    if not path.is_file():
        return
    with opened(path) as file:
        while line := file.readline(_MAX_LINE_BYTES):
            with suppress(UserError):
                yield parse_json(line, str(path), "")


class _Table(dict[str, Any]):
    """What a file holds; a key that it lacks is the fault of the file."""

    def __init__(self, data: dict[str, Any], where: str, advice: str):
        super().__init__(data)
        self._where, self._advice = where, advice

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._where}: lacks {key}. {self._advice}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return data


@cache
def _adapter(kind: Any) -> Any:  # Any: pydantic's TypeAdapter, imported when it is needed
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _problems(error: Any) -> str:  # Any: pydantic's ValidationError
    return "; ".join(map(_problem, error.errors(include_url=False, include_context=False)[:3]))


def _problem(item: Any) -> str:  # Any: pydantic's description of an error
    if item["type"] == "json_invalid":
        return f"damaged, no JSON: {item['msg'].removeprefix('Invalid JSON: ')}"
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"lacks {key}"
    rule = NAME_RULE if item["type"] == "predicate_failed" else item["msg"].replace("Input should be", "must be")
    return f"{f'{key}: ' if key else ''}{rule}, got {reprlib.repr(item['input'])}"
