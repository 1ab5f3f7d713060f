"""Worker processes: spawned, and ended with this process, even if it is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def spawned(num: int, prepare: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool of `num` processes, each of which calls `prepare` first."""
    return ProcessPoolExecutor(num, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(prepare,))


def _begin(prepare: Callable[[], None] | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    # A killed parent closes nothing that a worker waits for: the workers hold both ends of its pipes themselves.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
