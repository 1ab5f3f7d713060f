"""The progress of a long command: a bar with the time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from fewstep.environment import has_terminal
from fewstep.errors import printable, unfiltered

_Item = TypeVar("_Item")
_EVERY_S = 5.0  # between plain lines


class TimeLeft:
    """An estimate of the time that is left, by the pace since the first report: what came before it includes warming up."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def text(self, num: int, total: int, now: float) -> str:
        """`, 12 s left` after `num` of `total`; empty as long as there is nothing to go by, and at the end."""
        if self._first is None:
            self._first = num, now
        begun, at = self._first
        return f", {(now - at) / (num - begun) * (total - num):.0f} s left" if begun < num < total else ""


def track(items: Iterable[_Item], total: int, title: str) -> Iterator[_Item]:
    """The items; each is counted when the loop asks for the next one."""
    if has_terminal():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console, title = Console(file=unfiltered(sys.stderr), highlight=False), printable(title)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            yield from bar.track(items, total=total, description=title)
        return
    left, last_print = TimeLeft(), time.monotonic()
    for num, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_print > _EVERY_S or num == total:
            last_print = now
            print(f"{title}: {num} of {total}{left.text(num, total, now)}", file=sys.stderr, flush=True)
