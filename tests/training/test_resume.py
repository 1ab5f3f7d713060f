"""A run that is killed, asked to end, or out of disk, and the same command again: the bits of a run that was left alone."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.networks.weights.addresses import read_tensors

MAX_ITER = 60
TOY = """
import os, time
from dataclasses import dataclass
from fewstep.config import kind, recipe
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import DMD2, StudentSample
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.files import distributed
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
TINY = Full(TinySpec(width=WIDTH, depth=2), init="random")

@kind("unhurried", group="data")
@dataclass(frozen=True)
class Unhurried(MixtureSamples):
    def open(self):
        inner = super().open()
        class Slow:
            def __len__(self): return len(inner)
            def batch(self, index):
                time.sleep(0.01)
                return inner.batch(index)
        return Slow()

write = distributed.write_chunks
def slow_write(*args):
    done = write(*args)
    time.sleep(float(os.environ.get("SLOW_WRITE", "0")))  # the shards are there, the metadata is not
    return done
distributed.write_chunks = slow_write

@recipe("toy")
def toy():
    return Run(
        job=Job(name="toy"),
        method=DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=3),
        networks=Networks(MIXTURE, TINY, TINY),
        data=Unhurried(MIXTURE, num=100),
        optim=Optim(lr=1e-2, schedule="cosine", warmup_iters=5),
        ema=Ema("power"),
        trainer=Trainer(max_iter=60, batch_size=8, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=7),
    )
"""


class Job:
    """The command of one run, started as often as needed."""

    def __init__(self, root: Path, *overrides: str, width: int = 16):
        root.mkdir(parents=True, exist_ok=True)
        self.config = root / "toy.py"
        self.config.write_text(TOY.replace("WIDTH", str(width)))
        self.root, self.overrides = root / "out", overrides
        self.folder = self.root / "fewstep" / "default" / "toy"

    def start(self, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fewstep.train", "--config", str(self.config), "experiment=toy", *self.overrides]
        inherited = os.environ | {"OUTPUT_ROOT": str(self.root), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        process = self.start()
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told

    def end_when(self, ready: Callable[[], bool], number: int, **environment: str) -> tuple[int, str]:
        """Starts the command, sends the signal as soon as `ready`, and gives the exit status and what it said."""
        process = self.start(**environment)
        try:
            deadline = time.monotonic() + 60
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.001)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, told

    def lines(self) -> list[str]:
        path = self.folder / "metrics.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def latest(self) -> str:
        path = self.folder / "checkpoints" / "latest_checkpoint.txt"
        return path.read_text() if path.is_file() else ""

    def is_writing(self) -> bool:
        found = self.folder.glob("checkpoints/iter_*.partial/*.distcp")
        return any(path.stat().st_size > 0 for path in found)

    def result(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "checkpoints" / f"iter_{MAX_ITER:09d}", "")

    def losses(self) -> dict[int, dict[str, float]]:
        lines = [json.loads(line) for line in self.lines()]
        assert [line["step"] for line in lines] == list(range(1, MAX_ITER + 1)), "each step once, in order"
        timed = {"samples_per_s", "memory_gib", "data/wait_share"}
        return {line["step"]: {k: v for k, v in line.items() if k not in timed} for line in lines}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("undisturbed"))
    job.finish()
    return job


def assert_same(job: Job, undisturbed: Job) -> None:
    mine, theirs = job.result(), undisturbed.result()
    assert mine.keys() == theirs.keys()
    assert {".".join(name.split(".")[:2]) for name in mine} == {
        "student.weights", "student.ema", "student.optim", "critic.weights", "critic.optim",
    }  # fmt: skip
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert job.losses() == undisturbed.losses()
    summary, want = (json.loads((j.folder / "summary.json").read_text()) for j in (job, undisturbed))
    assert all(summary[name] == want[name] for name in ("step", "samples", "student_updates", "loss/critic", "loss/vsd"))


def past(job: Job, line: int) -> Callable[[], bool]:
    """A random moment after a line of the log."""
    delay_s = random.random() * 0.03

    def ready() -> bool:
        if len(job.lines()) < line:
            return False
        time.sleep(delay_s)
        return True

    return ready


def assert_ended_well(job: Job, number: signal.Signals, line: int) -> None:
    """A signal some time after `line`: a checkpoint, a clear last line, exit status 1."""
    status, told = job.end_when(lambda: len(job.lines()) >= line, number)
    assert status == 1
    assert "Traceback" not in told
    last, saved = told.strip().splitlines()[-1], job.latest()
    step = int(saved.removeprefix("iter_"))
    assert f"{number.name} received: iteration {step} of {MAX_ITER} is saved in" in last and saved in last, told
    assert "The same command goes on from there" in last
    assert line <= step <= line + 6
    assert len(job.lines()) == step  # nothing was done in vain


@pytest.mark.parametrize(("async_write", "number"), [("false", signal.SIGTERM), ("true", signal.SIGINT)])
def test_killed_killed_while_it_saves_and_asked_to_end(
    tmp_path: Path, undisturbed: Job, async_write: str, number: signal.Signals
) -> None:
    job = Job(tmp_path, f"checkpoint.async_write={async_write}")
    assert job.end_when(past(job, random.randint(1, 25)), signal.SIGKILL)[0] == -signal.SIGKILL
    # while a checkpoint is written: the one before stays the newest, and what is half there is pointed at by nothing
    before = job.latest()
    assert job.end_when(job.is_writing, signal.SIGKILL, SLOW_WRITE="20")[0] == -signal.SIGKILL
    assert job.latest() == before and job.is_writing()
    assert_ended_well(job, number, len(job.lines()) + random.randint(2, 15))
    job.finish()
    assert not job.is_writing()
    assert_same(job, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("async_write", ["false", "true"])
def test_killed_again_and_again(tmp_path: Path, undisturbed: Job, async_write: str) -> None:
    job = Job(tmp_path, f"checkpoint.async_write={async_write}")
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        job.end_when(past(job, min(len(job.lines()) + random.randint(1, 8), 50)), number)
    job.finish()
    assert_same(job, undisturbed)


# --- disks ------------------------------------------------------------------------------------------------------------


def assert_told(status: int, told: str, job: Job) -> None:
    assert status == 1, told
    assert "Traceback" not in told, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("fewstep: ") and "No space left on device" in last and str(job.folder) in last
    assert "run the same command again" in last and "goes on from there" in last


def test_a_disk_that_fills_with_checkpoints(small_disk: Path) -> None:
    """1.2 MiB each, and all nine are to be kept."""
    job = Job(small_disk, "checkpoint.keep_last=9", width=64)
    process = job.start()
    _, told = process.communicate(timeout=120)
    assert_told(process.returncode, told, job)
    assert job.latest() in told and job.latest()
    folder = job.folder / "checkpoints" / job.latest()
    assert read_tensors(folder, "student.weights.")
    assert sorted(path.name for path in folder.parent.iterdir())[-1] == "latest_checkpoint.txt"
    assert not list(folder.parent.glob("*.partial"))
    # room is made, and the same command ends
    job.overrides = ("checkpoint.keep_last=1",)
    job.finish()


def test_a_disk_that_fills_with_anything_else(small_disk: Path) -> None:
    """No checkpoint is written while the disk fills: it is the log that finds no room."""
    job = Job(small_disk, "checkpoint.save_iter=50")
    filler = small_disk / "filler"

    def fill() -> bool:
        if len(job.lines()) < 12:
            return False
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        return True

    status, told = job.end_when(fill, 0)
    assert_told(status, told, job)
    filler.unlink()
    job.finish()
    assert len(job.losses()) == MAX_ITER
