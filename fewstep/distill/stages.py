"""Stages of public commands, printed before they run; finished ones are not run again. `fewstep distill` and the demo are such.

A stage has lanes, which run side by side, and a lane commands, one after the other. OUT/stages/NAME.json says that a stage is
done, by which commands, and how long it took. A stage whose commands have changed since then is done anew, and so are all after
it.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from fewstep.distill.worker import IMPORTS, Copy
from fewstep.errors import UserError
from fewstep.files import move, remove, write_json
from fewstep.untrusted.text import read_json

Command = tuple[str, ...]
OTHER_FILES = "clips and captions, or the teacher's weights"


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    lanes: tuple[tuple[Command, ...], ...]
    advice: str = ""  # printed where the stage fails
    is_optional: bool = False  # the stages after it do without: its failure is told and does not end the road
    makes_nothing: bool = False  # it only checks: where its commands change, it is done anew, and none after it
    reads: Callable[[], str] | None = None  # a stamp of the user's files that its commands read: others are as other commands
    resumes: tuple[Path, ...] = ()  # files and folders that its commands would go on with: moved aside where it is done anew

    @classmethod
    def of(cls, name: str, about: str, *commands: Command, **more: Any) -> Stage:
        """Commands side by side, a lane each; `more` are its other fields."""
        return cls(name, about, tuple((command,) for command in commands), **more)

    @property
    def commands(self) -> list[str]:
        """Every command, as one would type it."""
        return [text_of(command) for lane in self.lanes for command in lane]


def launcher(processes: int) -> Command:
    """How a command of this package begins, which so many processes run."""
    return ("fewstep",) if processes == 1 else ("torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "fewstep")


def with_own(words: Sequence[str], own: Sequence[str]) -> Command:
    """The words KEY=VALUE of a training; those of the user replace ours."""
    keys = {word.partition("=")[0] for word in own}
    return (*(word for word in words if word.partition("=")[0] not in keys), *own)


def print_commands(stages: Sequence[Stage]) -> None:
    """What would run, for --dryrun."""
    for stage in stages:
        print(f"\n--- {stage.name}: {stage.about}")
        for command in stage.commands:
            print(f"$ {command}")


def marker_of(out: Path, name: str) -> Path:
    """The file that says that a stage is done, and by which commands."""
    return out / "stages" / f"{name}.json"


@dataclass(frozen=True)
class Done:
    """What is read of the file that says that a stage is done."""

    commands: list[str]
    seconds: float = 0.0
    folder: str = ""  # in which they ran
    reads: str = ""  # of the files that they read


def read_marker(marker: Path) -> Done:
    return read_json(marker, f"Remove {marker}: the stage is run again", Done)


def claim(stages: Sequence[Stage], out: Path, only: Collection[str] = ()) -> None:
    """Compares the stages with the commands by which they were done, and prints what has changed.

    From the first that has changed on, all are forgotten, and what they would go on with is moved aside: nothing is lost.
    Optional stages (scores, a report) are also forgotten where one before them is not done. only: names of the stages that are
    compared; none: all.
    """
    changed = [stage for stage in stages if (not only or stage.name in only) and _changes(stage, out)]
    for stage in changed:
        if stage.makes_nothing:
            remove(marker_of(out, stage.name))
    makers = [stage for stage in stages if not stage.makes_nothing]
    first = next((number for number, stage in enumerate(makers) if stage in changed), len(makers))
    undone = next((number for number, stage in enumerate(makers) if not marker_of(out, stage.name).is_file()), len(makers))
    if first < len(makers):
        print(_about_changes(makers[first:], out), flush=True)
    for number, stage in reversed(list(enumerate(makers))):  # the first one last: a killed command begins here again
        if number >= first:
            for path in filter(Path.exists, stage.resumes):
                move(path, _aside(path))
        if number >= first or (stage.is_optional and number > undone):
            remove(marker_of(out, stage.name))


def _changes(stage: Stage, out: Path) -> str:
    """The words of its commands that were others when the stage was done; empty if none were, or if it is not done."""
    marker = marker_of(out, stage.name)
    if not marker.is_file():
        return ""
    done = read_marker(marker)
    if stage.reads is not None and done.reads not in ("", stage.reads()):
        return OTHER_FILES
    before, now = (" ".join(lines).split() for lines in (done.commands, stage.commands))
    if len(before) == len(now) and all(_are_same(*words, done.folder) for words in zip(before, now, strict=True)):
        return ""
    old, new = _options(before), _options(now)
    gone, come = ([word for word in one if word not in other] for one, other in ((old, new), (new, old)))
    return f"{' '.join(gone) or '(nothing)'} -> {' '.join(come) or '(nothing)'}"


def _are_same(before: str, now: str, folder: str) -> bool:
    """Whether two words are equal, or name the same file, the first of them in `folder`: a road also goes on from elsewhere."""
    (name, _, path), (name_now, _, path_now) = before.rpartition("="), now.rpartition("=")
    return before == now or (name == name_now and Path(folder, path).resolve() == Path(path_now).resolve())


def _options(words: Sequence[str]) -> list[str]:
    """The words, each once; an option and its value are one."""
    out: list[str] = []
    for word in words:
        if out and out[-1].startswith("--") and " " not in out[-1] and not word.startswith("--"):
            out[-1] += f" {word}"
        else:
            out.append(word)
    return list(dict.fromkeys(out))


def _about_changes(stages: Sequence[Stage], out: Path) -> str:
    """What has changed in the first of the stages, which are all to be done anew."""
    first, *later = stages
    after = [stage.name for stage in later if marker_of(out, stage.name).is_file()]
    also = f", and so {'are' if len(after) > 1 else 'is'} {', '.join(after)}" if after else ""
    names = [f"{path} as {_aside(path).name}" for stage in stages for path in stage.resumes if path.exists()]
    what = _changes(first, out)
    about = f"the {'files' if what == OTHER_FILES else 'commands'} of stage '{first.name}' have changed: {what}"
    return f"{about}\n  it is done anew{also}" + (f"; kept: {', '.join(names)}" if names else "")


def _aside(path: Path) -> Path:
    """The next free name for what is moved aside: kd becomes kd.001."""
    return next(name for number in count(1) if not (name := path.with_name(f"{path.name}.{number:03d}")).exists())


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
        "folder": str(Path.cwd()),
        "seconds": round(time.monotonic() - began, 1),
    }
    reads = {} if stage.reads is None else {"reads": stage.reads()}
    write_json(marker, about | reads | {"about": stage.about})
    print(f"    {about['seconds']} s", flush=True)
    return True


def run_each(commands: Sequence[Iterator[Command]], preload: str = IMPORTS, num_threads: int | None = None) -> list[Command]:
    """Runs the commands of each iterator, one after the other, beside those of the others. Returns those that failed.

    An empty command says that there is none at this moment: the iterator is asked again after a second.
    """
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
    """A line in one piece, since lanes speak at the same time; to a terminal that may be closed by now: a command that saves is
    listened to until it has ended."""
    with suppress(OSError):
        print(f"{text}\n", end="", flush=True)


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
        while not self._stopped and (command := next(self.commands, None)) is not None:
            if not command:
                time.sleep(1.0)
                continue
            _say(f"{self.mark}$ {text_of(command)}")
            process = self._running = _started(command, self.preload, self.num_threads)
            if self._stopped:  # meanwhile
                process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    _say(f"    {self.mark}{line.rstrip()}")
            status = process.wait()
            if status < 0 and not self._stopped:  # it had no time to say so itself
                memory = ". The system sends it where memory is short" if -status == signal.SIGKILL else ""
                _say(f"    {self.mark}ended by signal {-status} ({signal.strsignal(-status)}){memory}")
            if status != 0:
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
