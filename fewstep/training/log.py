"""What a run says: metrics.jsonl, TensorBoard, log.txt, and a line or a progress bar for whoever watches."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fewstep.environment import has_terminal
from fewstep.errors import printable, unfiltered
from fewstep.files import Lines, own_folder, write_text
from fewstep.progress import TimeLeft
from fewstep.untrusted.text import read_json_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Only the main process has a folder; on the others nothing is written.

    `at_start` are the values of step 0, `last` the newest of each name, over all sessions of the run.
    """

    def __init__(self, folder: Path | None, title: str, first: int, last: int, watch: bool = True):
        self.folder, self._goal, self._first, self._left = folder, last, first, TimeLeft()
        self.at_start: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._bar: Progress | None = None
        self._board: SummaryWriter | None = None
        self._unwritten: list[tuple[int, Mapping[str, float]]] = []  # of TensorBoard, which opens after the first iteration
        self._pictures: list[tuple[int, str, NDArray[np.uint8]]] = []  # likewise
        if folder is None:
            return
        self._text = Lines(folder / "log.txt")
        self._open(folder, first)
        if watch and has_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[about]}"),
                console=Console(file=unfiltered(sys.stderr), highlight=False),
            )  # fmt: skip
            self._task = self._bar.add_task(printable(title), total=last, completed=first, about="")
            self._bar.start()

    def __enter__(self) -> RunLog:
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        full: OSError | None = None  # a full disk; if something went wrong before, that is what must be heard
        for close in (self._metrics.close, self._text.close, self._close_board) if self.folder is not None else ():
            try:
                close()
            except OSError as problem:
                full = full or problem
        threading.excepthook = self._hook  # TensorBoard's thread ends as the board is closed
        if full is not None and error is None:
            raise full

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: the run goes back there, and will log it again."""
        if self.folder is not None:
            self._metrics.close()
            self._close_board()
            self._open(self.folder, step)

    def say(self, text: str) -> None:
        """One line for people, kept in log.txt."""
        if self.folder is None:
            return
        stamp = time.strftime("%H:%M:%S")
        text = printable(text)
        self._text.add(f"{stamp} {text}")
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same values in TensorBoard."""
        self.last |= values
        if step == 0:
            self.at_start = dict(values)
        if self.folder is None:
            return
        self._metrics.add(json.dumps({"step": step, **values}))
        self._unwritten.append((step, values))
        if step > self._first:
            self._write_board()

    def picture(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """An image H W 3 in TensorBoard."""
        if self.folder is not None:
            self._pictures.append((step, name, picture))
            if step > self._first:
                self._write_board()

    def losses(self, step: int, values: Mapping[str, float]) -> None:
        """The losses among `values`, for whoever watches: a short line, or the bar's text."""
        losses = "  ".join(f"{name[5:]} {value:.4g}" for name, value in values.items() if name.startswith("loss/"))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, about=losses)
        elif losses:
            left = self._left.text(step, self._goal, time.monotonic())
            self.say(f"step {step}/{self._goal}  {losses}  ({values.get('samples_per_s', 0):.0f} samples/s{left})")

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread meets a full disk too. It is told once, by whoever writes next, and not as a traceback.
        if failed.exc_type is None or not issubclass(failed.exc_type, OSError):
            self._hook(failed)

    def _open(self, folder: Path, first: int) -> None:
        path = folder / "metrics.jsonl"
        records = _records(path, first)
        if path.is_file():
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        self.at_start, self.last = {}, {}
        for record in records:
            values = {name: value for name, value in record.items() if name != "step"}
            self.at_start = values if record["step"] == 0 else self.at_start
            self.last |= values
        self._metrics = Lines(path)
        self._begins = first

    def _write_board(self) -> None:
        """TensorBoard takes a fifth of the time of torch to import: it is opened when there is something to write."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            assert self.folder is not None
            purge = self._begins + 1 if self._begins else None
            self._board = SummaryWriter(str(own_folder(self.folder / "tensorboard")), purge_step=purge)
        for step, values in self._unwritten:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        for step, name, picture in self._pictures:
            self._board.add_image(name, picture, step, dataformats="HWC")
        self._unwritten, self._pictures = [], []

    def _close_board(self) -> None:
        if self._unwritten or self._pictures:
            self._write_board()
        if self._board is not None:
            self._board.close()
        self._board = None


def _records(path: Path, first: int) -> list[dict[str, Any]]:
    """The lines up to the iteration a run goes on from; later ones will be written again, and so will all of a run from 0."""
    records = read_json_lines(path) if first else ()
    return [record for record in records if isinstance(record.get("step"), int) and record["step"] <= first]
