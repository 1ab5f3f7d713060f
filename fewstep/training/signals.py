"""SIGTERM and SIGINT: a wish to end, granted at the end of the iteration, after a checkpoint."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class Signals:
    """Within, SIGTERM and SIGINT are remembered instead of obeyed; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.requested, self.name = False, "a signal to another process"
        self._before: dict[int, Any] = {}  # Any: what signal.signal gives back: a function, a constant, or None

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread (a notebook, a server): then signals are its business
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.name = True, signal.Signals(number).name
        for own, before in self._before.items():
            signal.signal(own, before)
        # print() may not be called from within itself, which is where a signal can arrive.
        os.write(2, f"\n{self.name}: ending after this iteration and its checkpoint; a second one ends at once\n".encode())
