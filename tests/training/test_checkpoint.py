"""A checkpoint is complete or not there at all: at every operation on the file system, and when the disk is full."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from fewstep.networks.files import distributed
from fewstep.parallel import World
from fewstep.training.checkpoint import POINTER, Checkpoints, Progress, read_progress
from fewstep.training.errors import TrainingError

ALONE = World(0, 1, torch.device("cpu"), None)


def open_folder(folder: Path, keep_last: int = 2, keep_every: int | None = None, async_write: bool = False) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", ALONE, keep_last, keep_every, async_write)


def state(value: float, size: int = 50) -> dict[str, Tensor]:
    return {"student.weights.w": torch.full((size,), value), "student.optim.w.step": torch.tensor(value)}


def value_of(checkpoints: Checkpoints, path: Path) -> tuple[float, int]:
    into = state(-1.0)
    progress = checkpoints.load(path, into)
    assert len(into["student.weights.w"].unique()) == 1
    return float(into["student.weights.w"][0]), progress.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_write", [False, True])
def test_the_last_k_and_every_nth_are_kept(tmp_path: Path, async_write: bool) -> None:
    checkpoints = open_folder(tmp_path, keep_last=2, keep_every=40, async_write=async_write)
    for step in range(10, 101, 10):
        checkpoints.save(state(step), Progress(step=step))
    checkpoints.finish()
    assert names(tmp_path) == ["iter_000000040", "iter_000000080", "iter_000000090", "iter_000000100", POINTER]
    latest = checkpoints.latest()
    assert latest is not None and value_of(checkpoints, latest) == (100.0, 100)


def test_the_last_healthy_one_is_kept_however_many_alarms_rang_since(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path, keep_last=1)
    for step, healthy in ((10, True), (20, True), (30, False), (40, False)):
        checkpoints.save(state(step), Progress(step=step, healthy=healthy))
    assert names(tmp_path) == ["iter_000000020", "iter_000000040", POINTER]
    assert checkpoints.latest(healthy_only=True) == tmp_path / "checkpoints" / "iter_000000020"


def test_a_run_that_rolled_back_resumes_there_and_not_from_what_it_left(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path, keep_last=5)
    for step in (10, 20, 30):
        checkpoints.save(state(step), Progress(step=step, healthy=step == 10))
    healthy = checkpoints.latest(healthy_only=True)
    assert healthy is not None
    checkpoints.return_to(healthy, Progress(step=10, rollbacks=1))
    again = open_folder(tmp_path)
    assert again.latest() == healthy and read_progress(healthy).rollbacks == 1
    assert names(tmp_path) == ["iter_000000010", POINTER]


def test_leftovers_are_removed_and_nothing_points_at_them(tmp_path: Path) -> None:
    open_folder(tmp_path).save(state(1.0), Progress(step=1))
    partial = tmp_path / "checkpoints" / "iter_000000002.partial"
    shutil.copytree(tmp_path / "checkpoints" / "iter_000000001", partial)
    checkpoints = open_folder(tmp_path)
    assert not partial.exists()
    assert checkpoints.latest() == tmp_path / "checkpoints" / "iter_000000001"


def test_without_its_pointer_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(step), Progress(step=step))
    (tmp_path / "checkpoints" / POINTER).unlink()
    (tmp_path / "checkpoints" / "iter_000000003").mkdir()  # not whole
    assert checkpoints.latest() == tmp_path / "checkpoints" / "iter_000000002"


# --- a kill at every operation ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for SIGKILL: from one file operation on, none happens any more."""


class Trap:
    """Counts the operations that change the file system, and refuses those from number `limit` on."""

    def __init__(self) -> None:
        self.count, self.limit, self.thread = 0, None, None
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.limit is None or threading.get_ident() != self.thread:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            self.count += 1
            if self.count > self.limit:
                raise Killed

    @contextmanager
    def after(self, limit: int) -> Iterator[None]:
        self.count, self.limit, self.thread = 0, limit, threading.get_ident()
        try:
            yield
        finally:
            self.limit = None


@pytest.fixture(scope="module")
def trap() -> Trap:  # an audit hook cannot be taken away again: one for all tests, and idle between them
    return Trap()


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_one(tmp_path: Path, trap: Trap, rewrite: bool) -> None:
    """Step 30 is written while 10 and 20 are there; with `rewrite` a 30 from a run killed before its pointer is there too."""
    saw_old = saw_new = False
    for limit in range(200):
        folder = tmp_path / str(limit)
        checkpoints = open_folder(folder, keep_last=2)
        for step in (10, 20):
            checkpoints.save(state(step), Progress(step=step))
        if rewrite:
            checkpoints.save(state(30), Progress(step=30))
            (folder / "checkpoints" / POINTER).write_text("iter_000000020")
        done = False
        with trap.after(limit):
            try:
                checkpoints.save(state(30), Progress(step=30))
                done = True
            except (Killed, TrainingError):
                pass
        again = open_folder(folder, keep_last=2)
        latest = again.latest()
        assert latest is not None
        value, step = value_of(again, latest)
        assert value == step and step in (20, 30)
        assert not [name for name in names(folder) if name.endswith(".partial")]
        saw_old, saw_new = saw_old or step == 20, saw_new or step == 30
        again.save(state(40), Progress(step=40))  # and the next one can be written
        assert value_of(again, folder / "checkpoints" / "iter_000000040") == (40.0, 40)
        if done:
            break
    else:
        raise AssertionError("the save never ended")
    assert saw_old and saw_new and limit > 8


def test_a_kill_at_any_operation_of_a_return_leaves_something_to_resume(tmp_path: Path, trap: Trap) -> None:
    for limit in range(100):
        folder = tmp_path / str(limit)
        checkpoints = open_folder(folder, keep_last=5)
        for step in (10, 20, 30):
            checkpoints.save(state(step), Progress(step=step, healthy=step == 10))
        done = False
        with trap.after(limit):
            try:
                checkpoints.return_to(folder / "checkpoints" / "iter_000000010", Progress(step=10, rollbacks=1))
                done = True
            except Killed:
                pass
        again = open_folder(folder)
        latest = again.latest()
        assert latest is not None
        value, step = value_of(again, latest)
        assert value == step and step in (10, 30)
        if done:
            assert step == 10
            return
    raise AssertionError("the return never ended")


# --- the background ---------------------------------------------------------------------------------------------------


def test_a_background_write_holds_what_was_there_when_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors change while they are written, as training changes them."""
    go = threading.Event()
    write = distributed.write_chunks

    def slow(*args: Any) -> Any:
        assert go.wait(20)
        return write(*args)

    monkeypatch.setattr(distributed, "write_chunks", slow)
    checkpoints, tensors = open_folder(tmp_path, async_write=True), state(5.0)
    checkpoints.save(tensors, Progress(step=5))
    assert checkpoints.is_writing and checkpoints.latest() is None
    for tensor in tensors.values():
        tensor.fill_(6.0)
    go.set()
    checkpoints.finish()
    assert value_of(checkpoints, tmp_path / "checkpoints" / "iter_000000005") == (5.0, 5)


def test_a_background_write_is_completed_when_the_run_ends_with_an_error(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path, async_write=True)
    with pytest.raises(KeyError), checkpoints:
        checkpoints.save(state(5.0), Progress(step=5))
        raise KeyError
    assert value_of(checkpoints, tmp_path / "checkpoints" / "iter_000000005") == (5.0, 5)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_write", [False, True])
def test_a_full_disk_is_told_and_costs_the_new_one_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_write: bool
) -> None:
    checkpoints = open_folder(tmp_path, async_write=async_write)
    checkpoints.save(state(1.0), Progress(step=1))
    checkpoints.finish()

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distributed, "write_chunks", full)
    with pytest.raises(TrainingError) as caught:
        checkpoints.save(state(2.0), Progress(step=2))
        checkpoints.finish()
    said = str(caught.value)
    for part in (
        "could not write",
        "iter_000000002",
        "No space left on device",
        "iter_000000001",
        "Free some space",
        "same command",
    ):
        assert part in said
    assert "Traceback" not in said and "\n" not in said
    assert names(tmp_path) == ["iter_000000001", POINTER]
    monkeypatch.undo()
    assert value_of(checkpoints, tmp_path / "checkpoints" / "iter_000000001") == (1.0, 1)


FILL = """
import sys, torch
from pathlib import Path
from fewstep.parallel import World
from fewstep.training.checkpoint import Checkpoints, Progress
from fewstep.training.errors import TrainingError
checkpoints = Checkpoints(Path(sys.argv[1]), World(0, 1, torch.device("cpu"), None), 9, None, sys.argv[2] == "True")
try:
    for step in range(1, 99):
        checkpoints.save({"w": torch.full((400_000,), float(step))}, Progress(step=step))
except TrainingError as error:
    print(step, str(error).replace(chr(10), "|"))
"""


@pytest.mark.parametrize("async_write", [False, True])
def test_a_disk_that_fills(small_disk: Path, async_write: bool) -> None:
    """8 MiB and checkpoints of 1.5: the sixth does not fit."""
    command = [sys.executable, "-c", FILL, str(small_disk / "checkpoints"), str(async_write)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    checkpoints = Checkpoints(small_disk / "checkpoints", ALONE, 9, None, False)
    latest = checkpoints.latest()
    assert latest is not None and latest.name == "iter_000000005"
    assert (small_disk / "checkpoints" / POINTER).read_text() == latest.name
    assert "could not write the checkpoint" in done.stdout and "iter_000000006" in done.stdout and str(latest) in done.stdout
    assert "No space left on device" in done.stdout, done.stdout
    into = {"w": torch.zeros(400_000)}
    checkpoints.load(latest, into)
    assert bool((into["w"] == 5.0).all())


def test_another_network_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save({"a": torch.zeros(3), "b": torch.zeros(2)}, Progress(step=1))
    into = {"a": torch.ones(4), "c": torch.ones(1)}
    with pytest.raises(TrainingError) as caught:
        checkpoints.load(tmp_path / "checkpoints" / "iter_000000001", into)
    said = str(caught.value)
    for part in ("does not fit", "lacks c", "has no b", "a is (3,) in the checkpoint, (4,) in this run", "config.yaml"):
        assert part in said
    assert bool((into["a"] == 1).all())


@pytest.mark.parametrize("what", ["__0_0.distcp", ".metadata"])
def test_a_damaged_one_is_told(tmp_path: Path, what: str) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(1.0), Progress(step=1))
    file = tmp_path / "checkpoints" / "iter_000000001" / what
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(TrainingError, match=r"iter_000000001 is damaged: .*Remove it to resume from the one before"):
        checkpoints.load(file.parent, state(0.0))


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("what", ["table", "entry"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, what: str) -> None:
    """Neither its table of contents, which is a pickle, nor an entry that is one."""
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(1.0), Progress(step=1))
    folder = tmp_path / "checkpoints" / "iter_000000001"
    payload = Payload(tmp_path / "executed")
    if what == "table":
        (folder / ".metadata").write_bytes(pickle.dumps(payload))
    else:
        for name in (".metadata", "__0_0.distcp"):
            (folder / name).unlink()
        dcp.save(state(1.0) | {"extra": payload}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(TrainingError, match=r"iter_000000001 is damaged: .*(asks for|extra is no tensor)") as error:
        checkpoints.load(folder, state(0.0))
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("shard", ["lost", "empty"])
def test_a_lost_or_empty_shard_is_one_line(tmp_path: Path, shard: str) -> None:
    checkpoints = open_folder(tmp_path)
    checkpoints.save(state(1.0), Progress(step=1))
    file = tmp_path / "checkpoints" / "iter_000000001" / "__0_0.distcp"
    file.unlink() if shard == "lost" else file.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"is damaged: .+Remove it") as error:
        checkpoints.load(file.parent, state(0.0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"step": "x"}', '{"step": 1, "surprise": 2}', "\xff"])
def test_a_damaged_record_of_an_older_one_stops_nothing(tmp_path: Path, text: str) -> None:
    checkpoints = open_folder(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(float(step)), Progress(step=step))
    (tmp_path / "checkpoints" / "iter_000000001" / "trainer.json").write_text(text)
    (tmp_path / "checkpoints" / POINTER).write_bytes(b"../\xff\n")
    again = open_folder(tmp_path, keep_every=1)
    latest = again.latest()
    assert latest is not None and value_of(again, latest) == (2.0, 2)
    again.save(state(3.0), Progress(step=3))


def test_progress_survives_in_json(tmp_path: Path) -> None:
    progress = Progress(step=7, samples=70, updates=3, rollbacks=1, healthy=False, wall_s=1.5)
    open_folder(tmp_path).save(state(1.0), progress)
    file = tmp_path / "checkpoints" / "iter_000000007" / "trainer.json"
    assert read_progress(file.parent) == progress
    old = json.loads(file.read_text())
    del old["wall_s"]  # written before there was this field
    file.write_text(json.dumps(old))
    assert read_progress(file.parent).wall_s == 0.0


def test_a_whole_checkpoint_without_its_pointer_is_pointed_to_when_the_run_resumes(tmp_path: Path) -> None:
    """A kill came between the two: the run itself finds it, and export and generate look for the pointer."""
    checkpoints = open_folder(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(float(step)), Progress(step=step))
    pointer = tmp_path / "checkpoints" / POINTER
    pointer.unlink()
    assert open_folder(tmp_path).latest() == tmp_path / "checkpoints" / "iter_000000002"
    assert pointer.read_text() == "iter_000000002"
