"""Checkpoints: sharded, complete or not there at all.

    checkpoints/iter_000000500/      torch DCP: every rank writes its shards; loads on any number of ranks
    checkpoints/iter_000000500/trainer.json
    checkpoints/latest_checkpoint.txt

Written as iter_N.partial and renamed when complete; the pointer is replaced last. So a kill at any moment costs the new
checkpoint at most, never the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import checkpoint as dcp

from fewstep.parallel import World
from fewstep.training.errors import TrainingError

POINTER = "latest_checkpoint.txt"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the configuration, all that is needed besides the tensors."""

    step: int = 0  # finished iterations
    samples: int = 0  # drawn from the data so far, over all ranks
    updates: int = 0  # of the student
    rollbacks: int = 0  # each gives the run new noise, or it would fail in the same way again
    healthy: bool = True  # no alarm had rung when this was written


class Checkpoints:
    """The checkpoints folder of one run."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int | None, async_write: bool):
        self.folder, self.world, self.async_write = folder, world, async_write
        self.keep_last, self.keep_every = keep_last, keep_every
        self._pending: tuple[Future[Any], Path, Progress] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):  # a process died while it wrote
                shutil.rmtree(leftover, ignore_errors=True)

    def latest(self, healthy_only: bool = False) -> Path | None:
        """The newest complete checkpoint."""
        if healthy_only:
            good = [path for path in self._all() if read_progress(path).healthy]
            return good[-1] if good else None
        pointer = self.folder / POINTER
        name = pointer.read_text().strip() if pointer.is_file() else ""
        if name and (self.folder / name / ".metadata").is_file():
            return self.folder / name
        # The pointer is the last thing written: a checkpoint without it may still be whole.
        return self._all()[-1] if self._all() else None

    def save(self, state: Mapping[str, Tensor], progress: Progress) -> None:
        """Writes one checkpoint; with `async_write` it returns as soon as the tensors are copied."""
        self.finish()
        partial = self.folder / f"iter_{progress.step:09d}.partial"
        alone = self.world.mesh is None
        try:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.world.barrier()
            if self.async_write:
                future = dcp.async_save(dict(state), checkpoint_id=partial, no_dist=alone)
                assert isinstance(future, Future)
                self._pending = (future, partial, progress)
            else:
                dcp.save(dict(state), checkpoint_id=partial, no_dist=alone)
                self._complete(partial, progress)
        except Exception as error:  # torch wraps what the file system said; whatever it was, the older one is whole
            raise self._failed(partial, error) from error

    def finish(self) -> None:
        """Waits for a checkpoint that is being written in the background, and completes it."""
        if self._pending is None:
            return
        future, partial, progress = self._pending
        self._pending = None
        try:
            future.result()
            self.world.barrier()
            self._complete(partial, progress)
        except Exception as error:
            raise self._failed(partial, error) from error

    def load(self, path: Path, state: Mapping[str, Tensor]) -> Progress:
        """Fills the tensors of `state` in place."""
        try:
            dcp.load(dict(state), checkpoint_id=path, no_dist=self.world.mesh is None)
        except Exception as error:
            raise TrainingError(
                f"the checkpoint {path} does not fit this configuration, or is damaged: {_first_line(error)}\n"
                f"Resume with the configuration it was written with ({self.folder.parent / 'config.yaml'}), give the run another "
                "job.name, or remove the checkpoint to resume from the one before"
            ) from error
        return read_progress(path)

    def _complete(self, partial: Path, progress: Progress) -> None:
        if self.world.is_main:
            with open(partial / "trainer.json", "w") as file:
                json.dump(asdict(progress), file)
                file.flush()
                os.fsync(file.fileno())
            final = partial.with_suffix("")
            if final.exists():  # written before a rollback
                shutil.rmtree(final)
            os.replace(partial, final)
            replace_text(self.folder / POINTER, final.name)
            self._prune()
        self.world.barrier()

    def _prune(self) -> None:
        for path in self._all()[: -self.keep_last]:
            if not (self.keep_every and read_progress(path).step % self.keep_every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = (path for path in self.folder.glob("iter_*") if path.suffix != ".partial")
        return sorted(path for path in found if (path / ".metadata").is_file() and (path / "trainer.json").is_file())

    def _failed(self, partial: Path, error: Exception) -> TrainingError:
        shutil.rmtree(partial, ignore_errors=True)
        kept, free = self.latest(), shutil.disk_usage(self.folder).free
        return TrainingError(
            f"could not write the checkpoint {partial.with_suffix('')}: {_first_line(error)} ({free / 2**20:.0f} MiB were free "
            f"afterwards). The last complete checkpoint is {kept or 'none'}. Free some space and run the same command again: "
            "it goes on from there"
        )


def read_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "trainer.json").read_text()))


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch's CheckpointException lists ranks and tracebacks; the last line names what happened.
    return (lines[-1] if "CheckpointException" in type(error).__name__ and lines else (lines or [type(error).__name__])[0])[:300]
