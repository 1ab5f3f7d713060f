"""Every verb that writes, disturbed at its writes and run again: as if nothing had happened.

Disturbed is: no room from some write on, a place that cannot be written, a kill, a SIGTERM. Each command runs in a copy of one
process that has everything imported, and so do the commands of which its stages consist: their writes count as one. The slow
tests take real disks: file systems of some kilobytes, or with few inodes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

TOY = str(Path(__file__).parents[1] / "fewstep" / "toyworld" / "stack")
FRAMES, NUM = 5, 4
SIZES = f"--num-frames {FRAMES} --height 32 --width 32 --num-steps 2 --guidance 1"
TRAINING = (
    "experiment=analytic_finetune job.project=a job.group=b trainer.batch_size=4 trainer.max_iter=3 checkpoint.save_iter=1 "
    "preview.every=2 optim.warmup_iters=0 trainer.log_every=1"
)
RUN = "a/b/run"
pytestmark = pytest.mark.slow
# Each in a folder with set/, a/b/run/ (of a training), exported/ (of an export), scores.json and weights.safetensors.
COMMANDS = {
    "prepare toyworld": "prepare toyworld --out new --num 1 --workers 0 --only videos,metas,edge",
    "prepare text": "prepare text set --text-encoder TOY --negative-prompt blue --into words",
    "prepare text packed": "prepare text set --text-encoder TOY --format packed --into words",
    "prepare words": "prepare words set --out words --iters 2",
    "prepare codec": "prepare codec set --out codec --iters 1 --batch-size 1",
    "prepare controls": "prepare controls set --type vis",
    "prepare latents": "prepare latents set --codec TOY --measure 1",
    "prepare shards": "prepare shards set --out tars --parts videos,metas --shard-mib 1",
    "check data": "check data set --html sheet.html --threads 1",
    "pairs": f"pairs TOY set --out pairs --path-times 1 --num 2 --batch-size 1 --control edge {SIZES}",
    "pairs fastgen": f"pairs TOY set --out pairs --num 2 --batch-size 1 --format fastgen {SIZES}",
    "train": f"train {TRAINING} job.name=new",
    "train on": f"train {TRAINING} job.name=run trainer.max_iter=5 checkpoint.async_write=true",
    "export": f"export {RUN} --out student",
    "export again": f"export {RUN} --out exported",
    "convert": "convert weights.safetensors again.safetensors",
    "generate": f"generate TOY --prompt sphere --out clips --save-noise {SIZES}",
    "generate several": f"generate TOY --prompts prompts.txt --out clips {SIZES}",
    "evaluate": "evaluate set --real set --out new.json --num 4 --sets 1 --scorer clips --keep 1 draws=2",
    "report": f"report scores.json {RUN} --out report.html",
    "compare": f"compare {RUN} {RUN} --out plot.svg",
    "launch": f"launch {TRAINING} job.name=new --to slurm",
    "sweep": f"sweep {TRAINING.replace('max_iter=3', 'max_iter=1')} job.name=new optim.lr=1e-3,2e-3",
    "sweep search": f"sweep {TRAINING.replace('max_iter=3', 'max_iter=1')} job.name=new optim.lr=1e-3..2e-3 --trials 2",
    "distill": "distill TOY set --out distilled --steps 2 --method kd --kd-iters 2 --teacher-steps 4 --num-pairs 2 "
    "--num-eval 4",
    "pipeline": "pipeline toy_self_forcing --prompts prompts.txt --out piped --num-eval 4 pairs.steps=8 "
    + " ".join(f"{name}.trainer.{size}" for name in ("kd", "sf") for size in ("max_iter=1", "batch_size=1", "log_every=1"))
    + " kd.optim.warmup_iters=0 sf.optim.warmup_iters=0",
    "demo": "demo --quick --out demo",
}
FAULTS = ("full", "kill", "term", "quota", "kill", "term", "read-only", "kill", "term", "full")
FEWER = {"distill": 4, "pipeline": 4, "demo": 4}  # faults: each is a whole road, twice
LEFT_OUT = ("log.txt", "env.json", ".lock", "events.out.tfevents", "speed.json")  # times, and what differs in each process
TIMES = re.compile(r"seconds|wall_s|samples_per_s|(peak_)?memory_gib|data/wait_share|clips_per_s_\w+")


# --- the process that runs the commands -------------------------------------------------------------------------------


def serve() -> None:
    """For each line of the input, an order as JSON, a copy of this process runs a command; a line with its status follows."""
    import torch

    import fewstep.cli
    import fewstep.distill.imports  # noqa: F401  # what all commands need
    from fewstep.distill import stages
    from fewstep.inference.model import codec_of, open_model
    from fewstep.toyworld.demo import imports  # noqa: F401  # the same of the demo's
    from fewstep.toyworld.demo import stages as demo

    torch.set_num_threads(1)
    stages._started = _Copy  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]  # copies of this process
    demo.TOY = Path(TOY)
    learning = demo.Learning(2, 2, ("optim.warmup_iters=0",))
    demo.PLANS["quick"] = demo.Plan(16, 16, 32, 16, 1, kd=(learning, learning), dmd2=(learning, learning), methods={})
    codec_of(open_model(TOY), TOY)  # imports diffusers' classes
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _carry_out(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _carry_out(order: Mapping[str, Any]) -> None:
    """Runs a command in its folder with a fault at its `at`-th write; never returns."""
    import torch

    from fewstep.cli import main

    torch.set_num_threads(1)  # makes torch's pool of threads anew, before two threads would at once
    os.setpgid(0, 0)
    os.chdir(order["folder"])
    os.environ["OUTPUT_ROOT"] = order["folder"]
    os.environ["PATH"] = f"{order['folder']}/bin:{os.environ['PATH']}"
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    counter = _disturbed(order["fault"], order["at"])
    status = _status(lambda: main(order["command"].replace("TOY", TOY).split()))
    print(f"\n{counter()}", flush=True)
    os._exit(status)


def _status(call: Callable[[], Any]) -> int:
    try:
        return call() or 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99


class _Copy:
    """A command of a stage, in a copy of this process. It has the members of `fewstep.distill.worker.Copy`."""

    def __init__(self, command: Sequence[str], *how: Any):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            status = _status(lambda: self._run(command))
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
        os.close(writer)
        self.stdout = os.fdopen(reader, errors="replace")

    @staticmethod
    def _run(command: Sequence[str]) -> None:
        import torch

        torch.set_num_threads(1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        words = list(command)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            os.environ[name] = value
        if words[0] == sys.executable and words[1] != "-m":  # a program that wants a process without this package
            os.execv(words[0], words)
        sys.argv = words[2:] if words[0] == sys.executable else words
        runpy.run_module(sys.argv[0], run_name="__main__")

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _disturbed(fault: str, at: int) -> Callable[[], int]:
    """From the `at`-th write on `fault` happens; returns what counts the writes, those of copies of this process included."""
    from fewstep import files

    shared, first = mmap.mmap(-1, 8), os.getpid()

    def count() -> int:
        return int.from_bytes(shared[:], "little")

    number = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "read-only": errno.EROFS}.get(fault, 0)

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*arguments: Any) -> Any:
            if call.__name__ == "_open" and not arguments[1] & os.O_CREAT:
                return call(*arguments)
            num = count() + 1
            shared[:] = num.to_bytes(8, "little")
            if num > at and fault == "kill":
                os.killpg(0, 9)
            if num == at + 1 and fault == "term":
                os.kill(first, signal.SIGTERM)
            if num > at and number:
                path = next((str(arg) for arg in arguments if isinstance(arg, Path)), None)
                raise OSError(number, os.strerror(number), *([] if path is None else [path]))
            return call(*arguments)

        return guard

    for name in ("_open", "_write", "_flush", "_rename"):
        setattr(files, name, guarded(getattr(files, name)))
    return count


class Runner:
    """Runs commands in copies of one process."""

    def __init__(self, process: subprocess.Popen[str], output: Path):
        self.process, self.output = process, output

    def __call__(self, command: str, folder: Path, fault: str = "", at: int = 0) -> tuple[int, str]:
        """Its status, and what it printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"command": command, "folder": str(folder), "fault": fault, "at": at, "output": str(self.output)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, self.output.read_text(errors="replace").strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield Runner(process, tmp_path_factory.mktemp("output") / "text")
        assert process.stdin is not None
        process.stdin.close()  # the end of its input is its end


# --- what the commands begin with, and what they make ------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "prompts.txt").write_text("red sphere\nblue box\ngreen box\nred box\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    for command in (
        f"prepare toyworld --out set --num {NUM} --workers 0",
        f"train {TRAINING} job.name=run",
        f"export {RUN} --out exported",
        "evaluate set --real set --out scores.json --num 4 --sets 1 --scorer clips --keep 1 draws=2",
    ):
        status, text = run(command, folder)
        assert status == 0, text
    (folder / "exported" / "mine.txt").write_text("mine")
    shutil.copy(folder / "exported" / "student.safetensors", folder / "weights.safetensors")
    shutil.rmtree(folder / "set" / "vis")
    shutil.rmtree(folder / "cache")
    return folder


class Bench:
    """Runs commands in copies of one folder of inputs, which always lie at one place: some names are made of paths."""

    def __init__(self, run: Runner, source: Path, place: Path):
        self.run, self.source, self.place = run, source, place
        self._whole: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {}

    def reset(self) -> Path:
        """The place with the inputs alone."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Path(shutil.copytree(self.source, self.place, dirs_exist_ok=True))

    def __call__(self, name: str, fault: str = "", at: int = 0) -> tuple[int, str]:
        return self.run(COMMANDS[name], self.place, fault, at)

    def undisturbed(self, name: str) -> tuple[dict[str, Any], int, dict[str, int]]:
        """What a command makes, in how many writes, and how many bytes and files that takes."""
        if name not in self._whole:
            before = _used(self.reset())
            status, text = self(name)
            assert status == 0, text
            more = {limit: value - before[limit] for limit, value in _used(self.place).items()}
            self._whole[name] = content(self.place), int(text.splitlines()[-1]), more
        return self._whole[name]


@pytest.fixture(scope="module")
def bench(run: Runner, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(run, source, tmp_path_factory.mktemp("place"))


def _used(folder: Path) -> dict[str, int]:
    """Bytes of its pages, and the number of its files and folders, by the names that tmpfs has for their limits."""
    paths = list(folder.rglob("*"))
    pages = sum(-(-path.stat().st_size // 4096) for path in paths if path.is_file())
    return {"size": pages * 4096, "nr_inodes": len(paths) + 4}


def content(folder: Path) -> dict[str, str]:
    """A hash of every file by name, without the times in it."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_page = path.parent.name == "piped.work" or name == "demo/report.html"  # with times
        if path.is_file() and not path.name.startswith(LEFT_OUT) and not is_page:
            whole = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                whole = "\n".join(map(_timeless, [whole] if path.suffix == ".json" else whole.splitlines())).encode()
            hashes[name] = hashlib.sha256(whole).hexdigest()
    return hashes


def _timeless(text: bytes) -> str:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if not TIMES.fullmatch(key)}
        return [without(item) for item in value] if isinstance(value, list) else value

    return json.dumps(without(json.loads(text)))


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMMANDS))
def test_disturbed_at_any_write_and_run_again_it_is_as_if_nothing_had_happened(bench: Bench, name: str) -> None:
    wanted, num, _ = bench.undisturbed(name)
    rng = random.Random(name)
    for fault in FAULTS[: FEWER.get(name, len(FAULTS))]:
        at = rng.randrange(num)
        bench.reset()
        status, text = bench(name, fault, at)
        is_done = status == 0 and "done: " in text  # a signal came when nothing but the last iteration was left
        what = f"{name}, {fault} at write {at} of {num}:\n{text}"
        if fault == "kill":
            assert status == -9, what
        elif fault == "term":
            assert (status in (-signal.SIGTERM, 1) or is_done) and "Traceback" not in text, what
        else:
            advice = "Change its permissions" if fault == "read-only" else "Free some space"
            _look(bench.place, status, text, advice, what)
        _look_again(bench, name, wanted, what, is_done and fault == "term")


@pytest.fixture
def disk(bench: Bench) -> Iterator[Callable[[str], None]]:
    """Mounts a file system with these options at the bench's place, or gives it others."""
    mounted: list[str] = []

    def mount(options: str) -> None:
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", bench.place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(options)

    yield mount
    if mounted:
        subprocess.run(["umount", bench.place], check=True)


@pytest.mark.parametrize("limit", ["size", "nr_inodes"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_on_a_disk_that_is_full_and_then_is_not(bench: Bench, disk: Callable[[str], None], name: str, limit: str) -> None:
    wanted, _, more = bench.undisturbed(name)
    before, rng = _used(bench.source)[limit], random.Random(name + limit)
    for _ in range(1 if name in FEWER else 2):
        room = before + int(more[limit] * rng.uniform(0.05, 0.7))
        disk("size=1g,nr_inodes=100k")
        bench.reset()
        disk(f"{limit}={room}")
        status, text = bench(name)
        what = f"{name}, {limit}={room}, of which {before} are taken, {more[limit]} needed:\n{text}"
        if status:  # a little less than it took: what is removed on the way leaves room
            _look(bench.place, status, text, "Free some space", what)
        disk("size=1g,nr_inodes=100k")
        _look_again(bench, name, wanted, what)


def _look(place: Path, status: int, text: str, advice: str, what: str) -> None:
    """One line with what to do, nothing half made, nothing lost."""
    lines = [line for line in text.splitlines() if line.startswith("fewstep: ")]
    assert status == 1 and len(lines) == 1 if "do without it" not in text else status == 0, what  # of optional stages
    assert "Traceback" not in text and advice in text, what
    assert [file for file in content(place) if file.endswith(".partial")] == [], what


def _look_again(bench: Bench, name: str, wanted: Mapping[str, Any], what: str, is_done: bool = False) -> None:
    lost = [file for file in bench.source.rglob("*") if not (bench.place / file.relative_to(bench.source)).exists()]
    assert [file for file in lost if "checkpoints" not in file.parts and not file.name.startswith(LEFT_OUT)] == [], what
    found = content(bench.place)
    if not is_done or found != wanted:
        status, text = bench(name)
        assert status == 0, f"{what}\n--- again:\n{text}"
        found = content(bench.place)
    assert sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file)) == [], what


if __name__ == "__main__":
    serve()
