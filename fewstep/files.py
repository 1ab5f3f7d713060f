"""How this package writes files: the one way out. What reads them is in fewstep/untrusted/.

    with whole_file(path) as partial: ...      write to `partial`; it takes the place of `path` when the block ends
    with whole_folder(path) as partial: ...    the same for a folder
    write_text(path, text)   write_json(path, data)   write_tensors(path, tensors)   write_torch(path, value)
    with lock(path): ...                       one process at a time
    Lines(path)                                a log, to which lines are added

No other module creates, renames or removes a file (tests/test_files.py). A file is whole or not there: it is written beside its
place under a hidden name, flushed to the disk, and renamed. That hidden file is always a new one: a link that stands in its
place, or in the place of a lock or a log, is never followed. What cannot be written is one UserError with the path and what to
do.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fewstep.errors import UserError

if TYPE_CHECKING:
    import torch

    from fewstep.untrusted.stored import Stored

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS_OF_FULL = ("No space left", "Disk quota exceeded", "File too large")  # of libraries whose errors carry no number
_ADVICE = {  # what to do about an error of the file system
    **dict.fromkeys(FULL, "Free some space and run the same command again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Change its permissions, or choose another place"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "A file stands where a folder is needed: choose another name, or move it"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTEMPTY), "A folder stands there: choose another name, or move it"),
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Links are not followed here: remove it",
    errno.ENXIO: "A device or a socket stands there: remove it",
    errno.EIO: "The disk failed: choose another place",
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # of file systems that have none
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class WriteError(UserError, OSError):
    """A file or folder could not be written; what stood there before is as it was."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.errno = number


class Locked(UserError):  # noqa: N818  # reads as what it is
    """Another process holds the lock of a folder; `owner` is what it wrote into the lock's file."""

    def __init__(self, folder: Path, owner: str = ""):
        super().__init__(f"{folder}: another process writes here. Wait for it, or end it")
        self.owner = owner


# --- writing


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The hidden path to write to, as an empty file; it takes the place of `path` when the block ends without an error.

    A kill leaves at most the hidden file, which no reader of this package sees and the next writer replaces. Two processes that
    write `path` at once have a hidden file each.
    """
    target = Path(path)
    reason = unfit(target, is_folder=False) if target.exists() else None
    if reason is not None:
        raise UserError(f"{target}: {reason}")
    with _beside(target) as partial, writing(target, partial):
        yield partial
        _flush(partial)
        _rename(partial, target)


@contextmanager
def whole_folder(path: str | os.PathLike[str], replaces: bool = False) -> Iterator[Path]:
    """The hidden folder to write into; it takes the place of `path` when the block ends without an error.

    replaces: a folder at `path` is removed at that moment; without it `path` must be an empty folder, or none.
    Raises Locked if another process is at it.
    """
    target = Path(path)
    with _beside(target, is_folder=True) as partial, writing(target, partial):
        former = restore(target)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _flush(file)
        remove(former)
        if target.is_dir() and not replaces:
            target.rmdir()
        elif target.is_dir():
            _rename(target, former)
        _rename(partial, target)
        remove(former)


def restore(path: Path) -> Path:
    """Puts a folder back that a kill left beside its place, between the two renames that replace it; returns where it was."""
    former = _neighbour(path, f".{path.name}.former.partial")
    if former.is_dir() and not former.is_symlink() and not path.exists():
        move(former, path)
    return former


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that must not be there yet, open for writing; on the disk when the block ends. For folders not yet in place."""
    with writing(path), os.fdopen(_open(path, _NEW), "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all; what UTF-8 lacks, as a name on the disk may have it, is escaped."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 1) -> None:
    """Writes plain data as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | Stored],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors as safetensors, whole or not at all. What is in memory at one time is one of them.

    dtype: of all tensors that are floating-point.
    """
    from fewstep.untrusted.stored import encoded

    with whole_file(path) as partial, partial.open("wb") as file:
        file.writelines(encoded(tensors, metadata, dtype))


def write_torch(path: str | os.PathLike[str], value: object) -> None:
    """Writes tensors in plain containers as torch.save does, whole or not at all."""
    import torch

    with whole_file(path) as partial, partial.open("wb") as file:  # by name, torch does not say why it fails
        torch.save(value, file)


def copy_file(source: Path, target: Path) -> None:
    """Writes the content of a file to another place, whole or not at all; the two share nothing."""
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)


def copy_entry(source: Path, target: Path) -> None:
    """Copies a file with its times and permissions, and a link as a link, into a folder that is not in place yet."""
    make_folder(target.parent)
    with writing(target):
        shutil.copy2(source, target, follow_symlinks=False)


def unfit(path: Path, is_folder: bool) -> str | None:
    """Why a file or a folder cannot be written at `path`, before anything is; None: it can, as far as one sees."""
    if path.is_symlink() and not path.exists():
        return "is a link to nothing"
    if is_folder and path.exists() and not path.is_dir():
        return "is a file, where a folder is needed. Choose another name, or move it"
    if not is_folder and path.is_dir():
        return f"is a folder: give the name of a file in it, {path.name}.json for instance"
    if not is_folder and path.exists() and not path.is_file():
        return "is a device or a pipe, where a file is to be written. Choose another name"
    above = next((place for place in path.parents if place.exists()), path)
    return None if above.is_dir() or above == path else f"{str(above)!r} is a file, where a folder is needed"


def make_folder(path: Path) -> Path:
    """`path`, a folder, made with its parents if it is not there."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def own_folder(path: Path) -> Path:
    """The same, of a folder that this package alone writes into. Raises UserError if it is a link."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link, which is not followed. Remove it, or make the folder that it is in the link")
    return make_folder(path)


def new_folder(path: Path) -> Path:
    """`path`, an empty folder; what was there is removed."""
    remove(path)
    return make_folder(path)


def move(path: Path, target: Path) -> None:
    """Gives a file or a folder another name on the same disk; a file or an empty folder of that name is replaced."""
    with writing(target, path):
        _rename(path, target)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a folder with all it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with writing(path):
            path.unlink(missing_ok=True)


class Lines:
    """A file of text to which lines are added, each at once and whole: a log, a ledger. It is made if it is not there.

    Raises UserError if it is a link or anything else than a file.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self._descriptor = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise UserError(f"{path}: must be a file, and no device or pipe. Remove it")

    def add(self, line: str) -> None:
        """On a full disk the file stays as it was, without a part of the line."""
        end, rest = os.fstat(self._descriptor).st_size, memoryview(line.encode(errors="backslashreplace") + b"\n")
        try:
            with writing(self.path):
                while rest:
                    rest = rest[_write(self._descriptor, rest) :]
        except WriteError:
            self.cut(end)
            raise

    def content(self) -> bytes:
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def cut(self, size: int) -> None:
        """Drops what follows the first `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def is_locked(self) -> bool:
        """Whether this process has, or now takes, the lock of the file."""
        return _locks(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def lock(path: Path) -> Iterator[Lines]:
    """Holds an exclusive lock on the file at `path`. It ends with the block, or with the process however that ends.

    Raises Locked if another process holds it. On a file system that has no locks nothing is locked.
    """
    make_folder(path.parent)
    with closing(Lines(path)) as file:
        if not file.is_locked():
            raise Locked(path.parent, file.content().decode(errors="replace").strip())
        yield file


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Makes one UserError, with the path and what to do, of the errors of a file system at `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _number_of_full(error)
        if number is None and isinstance(error, OSError) and error.errno in _ADVICE:
            places = {os.fspath(place) for place in (path, partial, *path.parents) if place is not None}
            number = error.errno if error.filename is None or os.fspath(error.filename) in places else None
        if number is None:
            raise
        raise WriteError(_message(path, number), number) from error


def explain(error: OSError | UserError) -> str:
    """The message of an error of the file system: the path, the reason, what to do."""
    if isinstance(error, UserError) or error.errno is None:
        return str(error)
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    advice = f". {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
    return f"{place}{error.strerror or os.strerror(error.errno)}{advice}"


def free_bytes(path: Path) -> int:
    """Bytes that can still be written near `path`; 0 if no file can be made for want of inodes."""
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    usage = os.statvfs(folder)
    return 0 if usage.f_files and not usage.f_favail else usage.f_bavail * usage.f_frsize


# --- names

NAME_RULE = "must be a plain file name, without / and without . at its start"


def plain_name(name: object, what: str = "name") -> str:
    """`name`, if it is one component of a path: not hidden, no separators, no control characters. Raises UserError if not."""
    if not isinstance(name, str) or not is_plain(name):
        raise UserError(f"{what} {name!r}: {NAME_RULE}")
    return name


def is_plain(name: str) -> bool:
    """Whether it is one component of a path: not hidden, no separators, no control characters."""
    return bool(name) and not name.startswith(".") and re.search(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]", name) is None


# --- parts of the above


@contextmanager
def _beside(target: Path, is_folder: bool = False) -> Iterator[Path]:
    """A new hidden file or folder beside `target`, which no other process takes while this one is at it; removed at the end."""
    make_folder(target.parent)
    partial = _neighbour(target, f".{target.name}.partial")
    with writing(target, partial):
        descriptor = _reserved(partial, is_folder)
        if descriptor is None and is_folder:
            raise Locked(target)
        if descriptor is None:
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
            descriptor = _open(partial, _NEW)
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise
    finally:
        os.close(descriptor)


def _neighbour(path: Path, name: str) -> Path:
    if path.name in ("", ".."):
        raise UserError(f"{str(path)!r}: is written beside its place and then put there: give it a name of its own")
    return path.with_name(name)


def _reserved(partial: Path, is_folder: bool) -> int | None:
    """A descriptor that locks the file or folder `partial`, a new one; None if a living process has one there.

    What a killed process left there is removed.
    """
    while True:
        try:
            if is_folder:
                partial.mkdir()
                try:
                    descriptor = _open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                except FileNotFoundError:  # not locked yet, it was taken for one that was left there
                    continue
            else:
                descriptor = _open(partial, _NEW)
        except FileExistsError:
            if not _removed(partial):
                return None
            continue
        if _locks(descriptor) and _is(partial, descriptor):
            return descriptor
        os.close(descriptor)  # another process took it between the two lines, for one that was left there


def _removed(partial: Path) -> bool:
    """Removes what stands at `partial`, unless a living process is at it."""
    try:
        descriptor = _open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:  # a link, a socket
        partial.unlink(missing_ok=True)
        return True
    try:
        if not _locks(descriptor):
            return False
        if _is(partial, descriptor):
            remove(partial)
        return True
    finally:
        os.close(descriptor)


def _locks(descriptor: int) -> bool:
    """Whether the file is locked for this process; always, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags, 0o666)


def _write(descriptor: int, content: memoryview) -> int:
    return os.write(descriptor, content)


def _flush(path: Path) -> None:
    descriptor = _open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(path: Path, target: Path) -> None:
    path.replace(target)


def _message(path: Path, number: int) -> str:
    free = f" ({free_bytes(path) / 2**20:.0f} MiB are free)" if number in FULL else ""
    return f"{path}: cannot be written: {os.strerror(number)}{free}. {_ADVICE[number]}"


def _number_of_full(error: BaseException | None) -> int | None:
    """Which error of a full disk this one is or comes from: libraries word them differently."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error.errno
        for words, number in zip(_WORDS_OF_FULL, FULL, strict=True):
            if words in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None
