"""Components that are loaded when a stage needs them, and released after it where the memory is wanted for the next stage.

codec = Component(lambda: open_codec(FOLDER), releases=True)
with codec.loaded() as it: ...
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Part = TypeVar("Part")


class Component(Generic[Part]):
    """Loads a part of a pipeline at its first use; with `releases`, again at each use, and forgets it in between."""

    def __init__(self, load: Callable[[], Part], releases: bool):
        self._load = load
        self._releases = releases
        self._part: Part | None = None

    @contextmanager
    def loaded(self) -> Iterator[Part]:
        """The part. A function that binds it to a name must end with the block, or that name keeps it in memory."""
        if self._part is None:
            self._part = self._load()
        try:
            yield self._part
        finally:
            if self._releases:
                self._part = None
                release_memory()


def release_memory() -> None:
    """Gives the memory of what nothing refers to any more back to the machine and to the GPU."""
    gc.collect()  # modules with hooks refer to themselves
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
