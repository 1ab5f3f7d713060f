"""One folder, one run: a job that was started twice must not write over its own checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.files import Locked, lock
from fewstep.training.errors import TrainingError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however that ends. Raises TrainingError if another one holds it."""
    try:
        with lock(folder / ".lock") as file:
            file.cut(0)
            file.add(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except Locked as error:
        raise TrainingError(
            f"{folder}: another run is at work in it ({error.owner or 'unknown'}). Wait for it or end it, or "
            "give this run a folder of its own with job.name=..."
        ) from error
