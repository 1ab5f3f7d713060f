"""What a run says: metrics.jsonl, TensorBoard, log.txt, and a line or a progress bar for whoever watches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLog:
    """Only the main process has a folder; on the others every call does nothing."""

    def __init__(self, folder: Path | None, title: str, first: int, last: int, watch: bool = True):
        self.folder, self.last = folder, last
        self.console = Console(stderr=True, highlight=False)
        self._began, self._first = time.monotonic(), first
        self._bar: Progress | None = None
        if folder is None:
            return
        self._cut_metrics(first)
        self._metrics = open(folder / "metrics.jsonl", "a")
        self._text = open(folder / "log.txt", "a")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)
        if watch and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[about]}"),
                console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=last, completed=first, about="")
            self._bar.start()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.folder is not None:
            self._metrics.close()
            self._text.close()
            self._board.close()

    def say(self, text: str) -> None:
        """One line for people, kept in log.txt."""
        if self.folder is None:
            return
        stamp = time.strftime("%H:%M:%S")
        self._text.write(f"{stamp} {text}\n")
        self._text.flush()
        (self._bar.console if self._bar else self.console).print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, the same values in TensorBoard, and a short line or the bar's text."""
        if self.folder is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        losses = "  ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items() if name.startswith("loss/"))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, about=losses)
        elif sys.stderr and losses:
            done = max(step - self._first, 1)
            left = (time.monotonic() - self._began) / done * (self.last - step)
            self.say(f"step {step}/{self.last}  {losses}  ({values.get('samples_per_s', 0):.0f} samples/s, {left:.0f} s left)")

    def _cut_metrics(self, first: int) -> None:
        """Drops lines beyond the checkpoint a run resumes from: they will be written again."""
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        kept: list[str] = []
        for line in path.read_text().splitlines():
            try:
                record: Any = json.loads(line)
            except json.JSONDecodeError:  # the process died within the line
                continue
            if record["step"] <= first:
                kept.append(line + "\n")
        path.write_text("".join(kept))
