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
    start = time.monotonic()
    last_print = start
    for num, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_print > _EVERY_S or num == total:
            last_print = now
            print(f"{title}: {num} of {total}, {(now - start) / num * (total - num):.0f} s left", file=sys.stderr, flush=True)
