"""Runs hostile cases in this process, after all is imported: python process.py NUM SEED [deep]. Prints one JSON line.

Each case is a damaged file and a command that reads it, or a command that nobody meant. Whatever happens, it ends with 0, 1, 2
and a message, without a traceback; starts no program, opens no connection, runs no code of a file; writes in the named places
only; and takes no more than a bounded time and memory. A command that succeeds although a file of weights is damaged gives the
same weights, and the same command does what it did before when the file is whole again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent))

import grammar
import world

from fewstep.errors import UserError, printable

MARGIN = 3 << 30  # bytes of memory that all cases together may take
SECONDS, WALL_S = 10, 120  # of one case: of computing, and in all, on a busy machine
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")
BELOW = ("os.remove", "os.rmdir", "os.mkdir")  # their last argument may be an open folder that the path begins in
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")


class Overtime(BaseException):
    pass


@dataclass
class Guard:
    """What the process does while `places` are given, as far as it is forbidden."""

    places: tuple[str, ...] = ()  # where it may write
    foreign: str = ""  # where no code may come from
    events: list[str] = field(default_factory=list)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.places:
            return
        if event.startswith(PROGRAMS):
            self.events.append(f"{event} {str(args)[:120]}")
        elif event == "exec" and isinstance(args[0], CodeType) and args[0].co_filename.startswith(self.foreign):
            self.events.append(f"runs {args[0].co_filename}")
        elif event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self._changes(event, path)
        elif event in CHANGES:
            paths = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
            folder = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 and event in BELOW else None
            for path in paths:
                self._changes(event, path if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path))

    def _changes(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = Path(os.fsdecode(path))
        if event == "os.mkdir" and name.is_dir():  # it is there
            return
        if name != Path(os.devnull) and not f"{name.parent.resolve()}/{name.name}/".startswith(self.places):
            self.events.append(f"{event} {name!s:.200}")


@dataclass
class Outcome:
    status: int | None = None
    text: str = ""
    crash: str = ""


def run(words: Sequence[str], outcome: Outcome) -> None:
    """Runs a command in this process."""
    from fewstep.cli import main

    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            outcome.status = main(list(words))
        except SystemExit as end:
            outcome.status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            outcome.crash = traceback.format_exc()
    outcome.text = out.buffer.getvalue().decode("utf-8", "replace")


def digest(folder: Path) -> str:
    """Of the weights in a folder: they alone do not depend on time and place."""
    from safetensors.numpy import load_file

    content = hashlib.sha256()
    for file in sorted(folder.rglob("student.safetensors")):
        for name, array in sorted(load_file(file).items()):
            content.update(name.encode() + array.tobytes())
    return content.hexdigest()


class Drawn:
    """Chance from hypothesis."""

    def __init__(self, draw: Any, st: Any):
        self._draw, self._st = draw, st

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self._draw(self._st.integers(0, len(options) - 1))]

    def number(self, low: int, high: int) -> int:
        return self._draw(self._st.integers(low, high))


@dataclass
class Runner:
    home: Path  # the honest files
    place: Path  # of the cases
    guard: Guard
    verbs: Sequence[tuple[tuple[str, ...], Sequence[str]]]
    is_deep: bool  # commands that import diffusers, too
    results: dict[str, str] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    num: int = 0

    def __post_init__(self) -> None:
        self.readable = self.place.with_name("readable")
        shutil.copytree(self.home, self.readable, symlinks=True, ignore=shutil.ignore_patterns("fifo*"))
        targets = [target for target in world.TARGETS if self.is_deep or not target.is_deep]
        self.pool = [target for target in targets for _ in range(target.weight)]

    def prepared(self, top: str | None) -> tuple[Path, Path]:
        """Fresh folders of a case: a copy of the honest files that it needs, and one to write to."""
        home, out = self.place / "home", self.place / "work" / "out"
        shutil.rmtree(self.place, ignore_errors=True)
        home.mkdir(parents=True)
        out.mkdir(parents=True)
        for entry in self.home.iterdir():
            if top not in (None, entry.name) or not (entry.is_dir() or entry.is_file()) or entry.is_symlink():
                (home / entry.name).symlink_to(entry)
            elif entry.is_dir():
                shutil.copytree(entry, home / entry.name, symlinks=True)
            else:
                shutil.copy(entry, home / entry.name)
        os.environ["OUTPUT_ROOT"] = str(self.place.parent)  # home is its run case/home
        os.chdir(out)
        return home, out

    def honest(self, target: world.Target) -> None:
        """Runs the command of a target with honest files, and keeps what it gives."""
        home, out = self.prepared(target.file.partition("/")[0])
        outcome = Outcome()
        run(self.words(target.command, home, out), outcome)
        if outcome.crash or outcome.status not in (0, 1, 2) or (target.is_checked and outcome.status != 0):
            raise AssertionError(f"{target}: {outcome.status} {outcome.crash or outcome.text}")
        self.results[target.command] = f"{outcome.status} {digest(out)}"

    @staticmethod
    def words(command: str, home: Path, out: Path) -> list[str]:
        return [word.replace("{home}", str(home)).replace("{out}", str(out)) for word in command.split(" ")]

    def file_case(self, draw: grammar.Draw) -> None:
        target = draw.pick(self.pool)
        home, out = self.prepared(target.file.partition("/")[0])
        file = home / target.file
        whole = file.read_bytes()
        how = grammar.damage(draw, file, target.kind, self.home)
        damaged = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
        words = self.words(target.command, home, out)
        what = f"{target.file} ({how}): {target.command}"
        outcome = self.watched(words, what, (home, out), damaged)
        if target.is_checked and outcome.status == 0 and self.results[target.command] != f"0 {digest(out)}":
            self.failed(what, "succeeded with another result", damaged)
        if draw.number(0, 39) == 0:
            grammar.remove(file)
            file.parent.mkdir(parents=True, exist_ok=True)  # an older checkpoint may have been removed
            file.write_bytes(whole)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            again = self.watched(words, f"{what}, again with the whole file", (home, out), damaged)
            if self.results[target.command] != f"{again.status} {digest(out)}":
                self.failed(what, f"does not recover: {again.status} {again.text[-600:]}", damaged)

    def reader_case(self, draw: grammar.Draw) -> None:
        """A reader alone: a value, or an error that is meant for the user."""
        reader = draw.pick(world.READERS)
        file = self.readable / reader.file
        try:
            how = grammar.damage(draw, file, reader.kind, self.home)
            damaged = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
            what = f"{reader.file} ({how}), read alone"
            with self.observed(what, (self.readable,), damaged) as outcome:
                try:
                    reader.read(file)
                    outcome.status = 0
                except (UserError, OSError) as error:
                    outcome.status = 1
                    outcome.text = printable(str(error))  # as it reaches a terminal
                except BaseException:
                    outcome.crash = traceback.format_exc()
            self.statuses[f"reader {outcome.status}"] += 1
        finally:
            grammar.remove(file)
            file.write_bytes((self.home / reader.file).read_bytes())

    def command_case(self, draw: grammar.Draw) -> None:
        home, out = self.prepared(None)
        os.environ["OUTPUT_ROOT"] = str(out)
        words = [word.replace("{home}", str(home)).replace("{out}", str(out)) for word in grammar.command(draw, self.verbs)]
        self.watched(words, " ".join(words)[:400].replace(str(self.place), ""), (home, out), b"")

    def watched(self, words: Sequence[str], what: str, places: tuple[Path, ...], content: bytes) -> Outcome:
        with self.observed(what, places, content) as outcome:
            run(words, outcome)
        self.statuses[f"{words[0][:20]} {outcome.status}"] += 1
        return outcome

    @contextlib.contextmanager
    def observed(self, what: str, places: tuple[Path, ...], content: bytes) -> Iterator[Outcome]:
        """Checks what is done within, and the outcome."""
        self.num += 1
        outcome = Outcome()
        self.guard.events.clear()
        self.guard.foreign = str(self.home.parent)
        # The places, not what links in them lead to, and temporary files.
        beside = (f"{place.parent}/.{place.name}." for place in places)  # where they are written, to be renamed
        self.guard.places = (*(f"{place}/" for place in places), *beside, f"{tempfile.gettempdir()}/fewstep-")
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_S)
        try:
            yield outcome
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.guard.places = ()
        self.slowest = max(self.slowest, (round(time.process_time() - began, 2), what))
        if outcome.crash:
            self.failed(what, outcome.crash[-1800:], content)
        elif outcome.status not in (0, 1, 2):
            self.failed(what, f"ended with {outcome.status}", content)
        elif "Traceback (most recent" in outcome.text or (outcome.status and not outcome.text.strip()):
            self.failed(what, f"says {outcome.text[-800:]!r}", content)
        elif "\x1b[31m" in outcome.text:
            self.failed(what, "commands of a terminal are printed", content)
        if self.guard.events:
            self.failed(what, f"did {self.guard.events[:3]}", content)

    def failed(self, what: str, why: str, content: bytes) -> None:
        self.failures.append(f"{what}\n  content {content[:300]!r}\n  {why}")


def verbs_of(app: Any) -> list[tuple[tuple[str, ...], Sequence[str]]]:
    """Every verb of the command line, with its options."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Sequence[str]]]:
        inner = getattr(command, "commands", None)
        if inner:
            for name, one in inner.items():
                yield from walk(one, (*words, name))
        else:
            yield words, [option for parameter in command.params for option in parameter.opts if option.startswith("-")]

    from fewstep.inference.command import _parser  # pyright: ignore[reportPrivateUsage]  # its options are not typer's

    verbs = dict(walk(typer.main.get_command(app), ()))
    verbs["generate",] = sorted(_parser().options())
    return sorted(verbs.items())


def cases(num: int, seed: int, is_deep: bool, folder: Path) -> dict[str, Any]:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from fewstep.cli.app import app

    typer.main.get_command = functools.cache(typer.main.get_command)  # its tree of verbs is the same each time
    home = folder / "honest"
    home.mkdir()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        world.build(home)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _overtime)
    guard = Guard()
    runner = Runner(home, folder / "case", guard, verbs_of(app), is_deep)
    began = time.process_time()
    for target in {target.command: target for target in runner.pool}.values():
        runner.honest(target)
    warm = time.process_time() - began
    sys.addaudithook(guard.hook)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MARGIN, taken + MARGIN))

    @seeded(seed)
    @settings(max_examples=num, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(st.data())
    def attack(data: Any) -> None:
        draw = Drawn(data.draw, st)
        draw.pick((*[runner.reader_case] * (38 if is_deep else 78), runner.command_case, runner.file_case))(draw)

    began = time.process_time()
    attack()
    return {
        "num": runner.num,
        "seconds": round(time.process_time() - began, 1),
        "warm_s": round(warm, 1),
        "statuses": dict(sorted(runner.statuses.items())),
        "slowest": runner.slowest,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "failures": runner.failures,
    }


def _overtime(number: int, frame: FrameType | None) -> None:
    raise Overtime


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        os.environ["TMPDIR"] = name
        tempfile.tempdir = None
        report = cases(int(sys.argv[1]), int(sys.argv[2]), "deep" in sys.argv, Path(name))
        os.chdir("/")
    print(json.dumps(report))
