"""One folder, one run: a job that was sent off twice must not write over its own checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.training.errors import TrainingError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems that have none


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however that ends. Raises TrainingError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.seek(0)
                raise TrainingError(
                    f"{folder}: another run is at work in it ({lock.read().strip() or 'unknown'}). Wait for it or end it, or "
                    "give this run a folder of its own with job.name=..."
                ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
