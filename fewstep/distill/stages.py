"""Stages of public commands, printed before they run; finished ones are not run again. `fewstep distill` and the demo are such.

A stage has lanes, which run side by side, and a lane commands, one after the other. OUT/stages/NAME.json says that a stage is
done, by which commands, and how long it took.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.distill.worker import IMPORTS, Copy
from fewstep.errors import UserError
from fewstep.files import remove, write_json
from fewstep.untrusted.text import read_json

Command = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    lanes: tuple[tuple[Command, ...], ...]
    advice: str = ""  # printed where the stage fails
    is_optional: bool = False  # the stages after it do without: its failure is told and does not end the road

    @classmethod
    def of(cls, name: str, about: str, *commands: Command) -> Stage:
        """Commands side by side, a lane each."""
        return cls(name, about, tuple((command,) for command in commands))

    @property
    def commands(self) -> list[str]:
        """Every command, as one would type it."""
        return [text_of(command) for lane in self.lanes for command in lane]


def marker_of(out: Path, name: str) -> Path:
    """The file that says that a stage is done, and by which commands."""
    return out / "stages" / f"{name}.json"


@dataclass(frozen=True)
class Done:
    """What is read of the file that says that a stage is done."""

    commands: list[str]
    seconds: float = 0.0


def read_marker(marker: Path) -> Done:
    return read_json(marker, f"Remove {marker}: the stage is run again", Done)


def claim(stages: Sequence[Stage], out: Path) -> None:
    """One folder is one road: raises UserError for a stage that was done by another command. What is optional is done anew
    then, and whatever optional comes after something that is not done."""
    is_stale = False  # scores that are made anew want a new report
    for stage in stages:
        marker = marker_of(out, stage.name)
        if stage.is_optional and is_stale:
            remove(marker)
        if not marker.is_file():
            is_stale = True
            continue
        before = read_marker(marker).commands
        if before != stage.commands and stage.is_optional:
            remove(marker)
            is_stale = True
        elif before != stage.commands:
            old = next((line for line in before if line not in stage.commands), "?")
            new = next((line for line in stage.commands if line not in before), "?")
            raise UserError(
                f"{out}: its stage '{stage.name}' was done by another command:\n  {old}\nnow it would be\n  {new}\nChoose "
                f"another --out, or remove {out}"
            )


def run(
    stage: Stage, out: Path, order: int, *, again: str = "command", preload: str = IMPORTS, num_threads: int | None = None
) -> bool:
    """Runs a stage unless it is done. Raises UserError if a command fails; the other lanes go on to their ends first.

    Returns whether it is done: an optional one may have failed. again: the command that goes on from here. preload: the module
    that holds what the commands import. num_threads: of each command; None: as the environment says.
    """
    marker = marker_of(out, stage.name)
    print(f"\n--- {stage.name}: {stage.about}", flush=True)
    if marker.is_file():
        print("    done earlier")
        return True
    began = time.monotonic()
    lanes = [
        _Lane(iter(lane), f"[{n + 1}] " if len(stage.lanes) > 1 else "", preload, num_threads)
        for n, lane in enumerate(stage.lanes)
    ]
    _run(lanes)
    if any(lane.failed for lane in lanes):
        advice = f". {stage.advice}" if stage.advice else ""
        if stage.is_optional:
            print(f"    stage '{stage.name}' failed, see above; the others do without it{advice}", flush=True)
            return False
        raise UserError(f"stage '{stage.name}' failed, see above{advice}. The same `{again}` goes on from here")
    about = {
        "name": stage.name,
        "order": order,
        "commands": stage.commands,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(marker, about | {"about": stage.about})
    print(f"    {about['seconds']} s", flush=True)
    return True


def run_each(commands: Sequence[Iterator[Command]], preload: str = IMPORTS, num_threads: int | None = None) -> list[Command]:
    """Runs the commands of each iterator, one after the other, beside those of the others. Returns those that failed."""
    marks = [f"[{number + 1}] " if len(commands) > 1 else "" for number in range(len(commands))]
    lanes = [_Lane(each, mark, preload, num_threads, ends_at_failure=False) for each, mark in zip(commands, marks, strict=True)]
    _run(lanes)
    return [command for lane in lanes for command in lane.failed]


def _run(lanes: Sequence[_Lane]) -> None:
    with _ended_like_ctrl_c():
        try:
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.ended.wait()
        except BaseException:
            _end(lanes)
            raise


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM (kill, timeout, a batch system) and SIGHUP (a closed terminal) end the command as Ctrl-C does."""
    alone = threading.current_thread() is threading.main_thread()  # elsewhere signals are not ours
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGHUP)} if alone else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(lanes: Sequence[_Lane]) -> None:
    """Tells each running command once, which saves what it has, and waits for it; interrupted again, it kills them."""
    try:
        for lane in lanes:
            lane.stop(signal.SIGTERM)
        _say("\nending: what is done is kept, a training saves a checkpoint; a second time ends at once")
        for lane in lanes:
            if lane.ident is not None:  # begun
                lane.ended.wait()
    except BaseException:
        for lane in lanes:
            lane.stop(signal.SIGKILL)
        raise


def _say(text: str) -> None:
    """To a terminal that may be closed by now: a command that saves is listened to until it has ended."""
    with suppress(OSError):
        print(text, flush=True)


class _Lane(threading.Thread):
    """Runs its commands one after the other, up to the first that fails, and passes on what they say."""

    def __init__(
        self, commands: Iterator[Command], mark: str, preload: str, num_threads: int | None, ends_at_failure: bool = True
    ):
        super().__init__()
        self.commands, self.mark = commands, mark
        self.preload, self.num_threads, self.ends_at_failure = preload, num_threads, ends_at_failure
        self.failed: list[Command] = []
        self._stopped = False
        self.ended = threading.Event()  # to be waited for: a join() that Ctrl-C breaks takes the thread for ended (Python 3.11)
        self._running: subprocess.Popen[str] | Copy | None = None

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.ended.set()

    def _run(self) -> None:
        for command in self.commands:
            if self._stopped:
                return
            print(f"{self.mark}$ {text_of(command)}", flush=True)
            process = self._running = _started(command, self.preload, self.num_threads)
            if self._stopped:  # meanwhile
                process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    _say(f"    {self.mark}{line.rstrip()}")
            if process.wait() != 0:
                self.failed.append(command)
                if self.ends_at_failure:
                    return

    def stop(self, number: int) -> None:
        self._stopped = True
        if self._running is not None:
            self._running.send_signal(number)


def text_of(command: Sequence[str]) -> str:
    """As one would type it."""
    names, rest = _split(command)
    parts = ["python" if part == sys.executable else part for part in rest]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in names.items()), *map(shlex.quote, parts)])


def _split(command: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """NAME=value before a command is its environment, as in a shell."""
    num = next(n for n, part in enumerate(command) if not re.match("[A-Z_]+=", part))
    return dict(part.split("=", 1) for part in command[:num]), list(command[num:])


def _started(command: Sequence[str], preload: str, num_threads: int | None) -> subprocess.Popen[str] | Copy:
    """`fewstep` and `torchrun` are this Python's. In a session of its own: Ctrl-C in a terminal is ours to pass on."""
    names, rest = _split(command)
    names = ({} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}) | names
    modules = {"fewstep": "fewstep", "torchrun": "torch.distributed.run"}
    if rest[0] in modules:
        rest = [sys.executable, "-m", modules[rest[0]], *rest[1:]]
    if rest[:2] == [sys.executable, "-m"] and rest[2].partition(".")[0] == "fewstep":
        return Copy(rest[2], rest[3:], names, preload)
    environment = os.environ | names
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    return subprocess.Popen(rest, env=environment, start_new_session=True, **pipes)
