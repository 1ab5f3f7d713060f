"""A file is whole or not there: written beside its place and renamed when complete."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], shared: bool = False) -> Iterator[Path]:
    """The hidden name under which `path` is to be written; it takes its place when the block ends without an error.

    A kill leaves at most that hidden file, which no reader of this project sees and the next writer replaces.
    shared: several processes may write this file at once, each the same; each gets a hidden name of its own.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    beside = target.with_name(f".{target.name}{own}.partial")
    try:
        yield beside
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
