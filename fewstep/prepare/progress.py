"""How far a long command is: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Item = TypeVar("_Item")
_EVERY_S = 5.0  # between plain lines


def tracked(items: Iterable[_Item], total: int, title: str) -> Iterator[_Item]:
    """The items, each counted when the next is asked for."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            yield from bar.track(items, total=total, description=title)
        return
    began = told = time.monotonic()
    for num, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > _EVERY_S or num == total:
            told = now
            print(f"{title}: {num} of {total}, {(now - began) / num * (total - num):.0f} s left", file=sys.stderr, flush=True)
