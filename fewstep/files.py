"""How this package reads and writes files. It imports nothing of the package but the errors, so that every room can use it.

    with whole_file(path) as partial: ...      write to `partial`; it takes the place of `path` when the block ends
    with whole_folder(path) as partial: ...    the same for a folder
    write_text(path, text)   write_json(path, data)   read_json(path, advice)
    with lock(path): ...                       one process at a time

A file is whole or not there: it is written beside its place under a hidden name, flushed to the disk, and renamed. That hidden
file is always a new one: a link that stands in its place, or in the place of a lock, is never followed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fewstep.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none
_MAX_TEXT_BYTES = 2**28  # of a text file or a JSON file


class DiskFull(UserError, OSError):  # noqa: N818  # reads as what it is
    """A file could not be written whole because the disk, the quota or the inodes are used up."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


class Locked(UserError):  # noqa: N818  # reads as what it is
    """Another process holds the lock of a folder; `owner` is what it wrote into the lock's file."""

    def __init__(self, folder: Path, owner: str):
        super().__init__(f"{folder}: another process writes here. Wait for it, or end it")
        self.owner = owner


# --- writing


@contextmanager
def whole_file(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """The hidden path to write to, as an empty file; it takes the place of `path` when the block ends without an error.

    A kill leaves at most the hidden file, which no reader of this package sees and the next writer replaces.
    shared: several processes may write the same content to `path` at once; each gets a hidden path of its own.
    Raises DiskFull if there is no room for it.
    """
    target = Path(path)
    partial = _beside(target, shared)
    with _tidy(target, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        yield partial
        _flush(partial)
        partial.replace(target)


@contextmanager
def whole_folder(path: str | os.PathLike[str], replaces: bool = False) -> Iterator[Path]:
    """The hidden folder to write into; it takes the place of `path` when the block ends without an error.

    replaces: a folder at `path` is removed at that moment; without it `path` must be an empty folder, or none.
    Raises DiskFull if there is no room for it.
    """
    target = Path(path)
    partial = _beside(target)
    with _tidy(target, partial):
        remove(partial)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        former = target.with_name(f".{target.name}.former.partial")
        remove(former)
        if target.is_dir() and not replaces:
            target.rmdir()
        elif target.is_dir():
            target.replace(former)
        partial.replace(target)
        remove(former)


def write_bytes(path: str | os.PathLike[str], content: bytes, shared: bool = False) -> None:
    """Writes a file, whole or not at all."""
    with whole_file(path, shared) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str, shared: bool = False) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode(), shared)


def write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 1, shared: bool = False) -> None:
    """Writes plain data as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=indent) + "\n", shared)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a folder with all it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def open_own(path: Path) -> IO[bytes]:
    """A file that a process keeps open beside its data, for reading and appending; made if it is not there.

    Raises UserError if it is a link or anything else than a file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise UserError(f"{path}: must be a file, and no link. Remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: must be a file, and no link. Remove it")
    return os.fdopen(descriptor, "a+b")


@contextmanager
def lock(path: Path) -> Iterator[IO[bytes]]:
    """Holds an exclusive lock on the file at `path`; the lock ends with the block, or with the process however that ends.

    Raises Locked if another process holds it. On a file system that has no locks nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.seek(0)
                raise Locked(path.parent, file.read().decode(errors="replace").strip()) from error
        yield file


# --- reading


def read_bytes(path: str | os.PathLike[str], max_bytes: int = _MAX_TEXT_BYTES) -> bytes:
    """The content of a file. Raises UserError for a device or a pipe, and for more than `max_bytes`; OSError otherwise."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{os.fspath(path)}: is no file, but a folder, a device or a pipe")
        if status.st_size > max_bytes:
            raise UserError(f"{os.fspath(path)}: has {status.st_size} bytes; at most {max_bytes} are read")
        return file.read(max_bytes)


def read_json(path: str | os.PathLike[str], advice: str) -> Any:
    """What a JSON file holds. Raises UserError, which names the file and ends with `advice`, if it cannot be read."""
    try:
        return json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{error}. {advice}") from None
        reason = error.strerror if isinstance(error, OSError) else f"damaged, no JSON: {error}"
        raise UserError(f"{os.fspath(path)}: {reason}. {advice}") from None


# --- names


def plain_name(name: object, what: str = "name") -> str:
    """`name`, if it is one component of a path: not hidden, no separators, no control characters. Raises UserError if not."""
    if not isinstance(name, str) or not name or name.startswith(".") or any(c in "/\\" or c < " " or c == "\x7f" for c in name):
        raise UserError(f"{what} {name!r}: must be a plain file name, without / and without . at its start")
    return name


def some(names: Sequence[str], num: int = 5, separator: str = ", ") -> str:
    """The first `num` names, and how many more there are."""
    more = f" and {len(names) - num} more" if len(names) > num else ""
    if more and separator != ", ":
        more = f"{separator}  ...{more}"
    return separator.join(names[:num]) + more


# --- parts of the above


def _beside(target: Path, shared: bool = False) -> Path:
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    return target.with_name(f".{target.name}{own}.partial")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _tidy(target: Path, partial: Path) -> Iterator[None]:
    """Removes `partial` after an error; turns the errors of a full disk, which libraries word differently, into one."""
    try:
        yield
    except BaseException as error:
        free = _free_bytes(target)
        full = not isinstance(error, DiskFull) and _is_full(error, free)
        remove(partial)
        if full:
            raise DiskFull(
                f"{target}: cannot be written: No space left on device ({free / 2**20:.0f} MiB are free). Free some space and "
                "run the same command again"
            ) from error
        raise


def _free_bytes(path: Path) -> int:
    """Bytes that can still be written near `path`; 0 if no file can be made for want of inodes."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    usage = os.statvfs(folder)
    return 0 if usage.f_files and not usage.f_favail else usage.f_bavail * usage.f_frsize


def _is_full(error: BaseException | None, free: int) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, Exception) and any(words in str(error) for words in ("No space left", "Disk quota exceeded")):
            return True
        if isinstance(error, RuntimeError) and free < 2**16:  # torch's zip writer does not say why
            return True
        error = error.__cause__ or error.__context__
    return False
