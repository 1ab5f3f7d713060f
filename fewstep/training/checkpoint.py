"""Checkpoints: sharded, complete or not there at all.

    checkpoints/iter_000000500/      in the form of torch DCP: every rank writes its shards; loads on any number of ranks
    checkpoints/iter_000000500/trainer.json
    checkpoints/latest_checkpoint.txt

Written as iter_N.partial and renamed when complete; the pointer is replaced last; what is removed is renamed first. So a kill
at any moment costs the new checkpoint at most, never the one before.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fewstep.errors import UserError, some
from fewstep.files import WriteError, explain, free_bytes, move, new_folder, own_folder, remove, write_json, write_text
from fewstep.networks.files.checkpoints import BEST, POINTER, newest_in, whole_ones
from fewstep.networks.files.distributed import open_distributed, write_distributed
from fewstep.parallel import World
from fewstep.training.errors import TrainingError
from fewstep.untrusted.stored import Stored
from fewstep.untrusted.text import Count, read_bytes, read_json


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the configuration, all that is needed besides the tensors."""

    step: Count  # finished iterations
    samples: Count = 0  # drawn from the data so far, over all ranks
    updates: Count = 0  # of the student
    rollbacks: Count = 0  # each gives the run new noise, or it would fail in the same way again
    healthy: bool = True  # no alarm had rung when this was written
    wall_s: float = 0.0  # over all sessions of the run, counted to its checkpoints
    score: float | None = None  # the newest value of checkpoint.best_metric, negative where the highest is best
    best: float | None = None  # the lowest of them
    stale: int = 0  # values since then


class Checkpoints:
    """The checkpoints folder of one run."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int | None, async_write: bool):
        self.folder, self.world, self.async_write = folder, world, async_write
        self.keep_last, self.keep_every = keep_last, keep_every
        self._pending: tuple[Future[Any], Path, Progress] | None = None
        if world.is_main:
            own_folder(folder)
            for leftover in folder.glob("*.partial"):  # a process died while it wrote or removed
                remove(leftover)
            latest = self.latest()
            if latest is not None:
                self._point_to(latest)  # a kill may have come between it and its pointer, by which others find it
                self._prune(latest)  # with a smaller keep_last this makes room before the next one needs it
        world.barrier()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A run that ends early still completes what it was writing; with other ranks that would mean to wait for them, and
        # they may be gone.
        if kind is None:
            self.finish()
        elif self.world.mesh is None:
            with suppress(TrainingError):  # what ended the run is what must be heard
                self.finish()

    def latest(self, healthy_only: bool = False) -> Path | None:
        """The newest complete checkpoint."""
        if healthy_only:
            return next((path for path, progress in reversed(self._records().items()) if progress.healthy), None)
        return newest_in(self.folder)

    def _records(self) -> dict[Path, Progress]:
        """What the whole checkpoints say, the oldest first, without those whose record is damaged: they must not stop a run."""
        records: dict[Path, Progress] = {}
        for path in whole_ones(self.folder):
            with suppress(UserError):
                records[path] = read_progress(path)
        return records

    def save(self, state: Mapping[str, Tensor], progress: Progress) -> None:
        """Writes one checkpoint; with `async_write` it returns as soon as the tensors are copied."""
        self.finish()
        partial = self.folder / f"iter_{progress.step:09d}.partial"
        try:
            if self.world.is_main:
                new_folder(partial)
            self.world.barrier()
            future = self._write(partial, state)
            if future is None:
                self._complete(partial, progress)
            else:
                self._pending = (future, partial, progress)
        except _failures() as error:  # torch wraps what the file system said; whatever it was, the older one is whole
            raise self._failed(partial, error) from error

    def _write(self, folder: Path, state: Mapping[str, Tensor]) -> Future[Any] | None:
        """Writes the tensors, or begins to write copies of them and returns what will say that they are written."""
        if self.world.mesh is None:  # without DCP, which takes as long to import as torch
            if not self.async_write:
                return write_distributed(folder, state)
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            writer = ThreadPoolExecutor(1)
            future = writer.submit(write_distributed, folder, copies)
            writer.shutdown(wait=False)
            return future
        from torch.distributed import checkpoint as dcp

        if not self.async_write:
            dcp.save(dict(state), checkpoint_id=folder, process_group=self.world.aside)
            return None
        future = dcp.async_save(dict(state), checkpoint_id=folder, process_group=self.world.aside)
        assert isinstance(future, Future)
        return future

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is written in the background."""
        return self._pending is not None and not self._pending[0].done()

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
        except _failures() as error:
            raise self._failed(partial, error) from error

    def load(self, path: Path, state: Mapping[str, Tensor]) -> Progress:
        """Fills the tensors of `state` in place; refuses, by name, a checkpoint with other tensors than these."""
        progress = Progress(step=0)
        problems: list[str] = []
        damage = ""
        try:
            saved = open_distributed(path, only_tensors=True)
            problems = _differences(saved, state)
            progress = read_progress(path)
            if not problems:
                for name, tensor in state.items():
                    _fill(tensor, saved[name])
        except (UserError, RuntimeError) as error:
            damage = _first_line(error)
        damages = [text for text in self.world.gather(damage) if text]  # of one rank: all end, and none waits for it
        if damages:
            raise TrainingError(f"the checkpoint {path} is damaged: {damages[0]}. Remove it to resume from the one before")
        if not problems:
            return progress
        lines = some(problems, 8, "\n")
        raise TrainingError(
            f"the checkpoint {path} does not fit this configuration:\n{lines}\n"
            f"Resume with the configuration it was written with ({self.folder.parent / 'config.yaml'}), or give the run "
            "another job.name"
        )

    def return_to(self, path: Path, progress: Progress) -> None:
        """Makes `path` the newest checkpoint again, from where `progress` goes on; later ones are removed."""
        if self.world.is_main:
            write_json(path / "trainer.json", asdict(progress), indent=None)
            self._point_to(path)
            for later in whole_ones(self.folder):
                if later.name > path.name:
                    _discard(later)
        self.world.barrier()

    def _complete(self, partial: Path, progress: Progress) -> None:
        if self.world.is_main:
            write_json(partial / "trainer.json", asdict(progress), indent=None)
            final = partial.with_suffix("")
            if final.exists():  # newer than the pointer says: written, but for the pointer, before a kill
                _discard(final)
            move(partial, final)
            self._point_to(final)
            self._prune(final)
        self.world.barrier()

    def _point_to(self, path: Path) -> None:
        pointer = self.folder / POINTER
        if not pointer.is_file() or read_bytes(pointer).decode("utf-8", "replace").strip() != path.name:
            write_text(pointer, path.name)

    def _prune(self, newest: Path) -> None:
        healthy = self.latest(healthy_only=True)  # what a roll-back needs, however many alarms rang since
        needed = {newest, healthy, self._best()}
        if self.keep_every:
            needed |= {path for path, progress in self._records().items() if progress.step % self.keep_every == 0}
        for path in whole_ones(self.folder)[: -self.keep_last]:
            if path not in needed:
                _discard(path)

    def _best(self) -> Path | None:
        """The checkpoint with the lowest score, the first of several, to which the pointer BEST is set; None without scores."""
        records = self._records().items()
        scores = {path: p.score for path, p in records if p.score is not None and math.isfinite(p.score)}
        if not scores:
            return None
        best = min(scores, key=lambda path: scores[path])
        write_text(self.folder / BEST, best.name)
        return best

    def _failed(self, partial: Path, error: BaseException) -> TrainingError:
        remove(partial)
        last, free, root = self.latest(), free_bytes(partial), _root(error)
        if isinstance(root, OSError) and root.errno is not None:
            reason = explain(root)
        else:
            reason = f"{_first_line(error)}. Free some space and run the same command again"
        return TrainingError(
            f"could not write the checkpoint {partial.with_suffix('')}: {reason}. {free / 2**20:.0f} MiB are free without it. "
            f"The last complete checkpoint is {last or 'none'}: the same command goes on from there"
        )


def read_progress(path: Path) -> Progress:
    """What trainer.json of a checkpoint says. Raises UserError if it is damaged."""
    return read_json(path / "trainer.json", "Remove this checkpoint to resume from the one before", Progress)


def _failures() -> tuple[type[BaseException], ...]:
    """What may come out of a save or a load. DCP's own exception is a BaseException, which `except Exception` lets through."""
    api = sys.modules.get("torch.distributed.checkpoint.api")
    return (Exception,) if api is None else (Exception, api.CheckpointException)


def _discard(path: Path) -> None:
    """Removes a checkpoint; half removed, it is no checkpoint any more."""
    doomed = path.with_name(path.name + ".old.partial")
    remove(doomed)
    move(path, doomed)
    remove(doomed)


def _fill(tensor: Tensor, stored: Stored) -> None:
    """Reads a tensor in place; of one that is sharded, this process's shard."""
    if not hasattr(tensor, "to_local"):
        tensor.detach().copy_(stored.read())
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as DCP itself does it

    assert isinstance(tensor, DTensor) and stored.read_part is not None
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if math.prod(sizes):
        tensor.to_local().detach().copy_(stored.read_part(offsets, sizes))


def _differences(saved: Mapping[str, Stored], state: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor that the checkpoint lacks, has too many, or has in another shape."""
    lines = [f"  the checkpoint lacks {name}" for name in state if name not in saved]
    lines += [f"  this run has no {name}" for name in saved if name not in state]
    for name, tensor in state.items():
        if name in saved and saved[name].shape != tuple(tensor.shape):
            lines.append(f"  {name} is {saved[name].shape} in the checkpoint, {tuple(tensor.shape)} in this run")
    return lines


def _first_line(error: BaseException) -> str:
    """What happened, without the traceback."""
    root = _root(error)
    return (str(root).strip().splitlines() or [type(root).__name__])[0][:300]


def _root(error: BaseException) -> BaseException:
    """The root of the chain, and of what DCP gathered from the ranks."""
    by_rank = getattr(error, "failures", None)  # of DCP's exception, which may not be imported
    cause = next(iter(by_rank.values()))[0] if by_rank else error.__cause__
    return error if cause is None or isinstance(error, WriteError) else _root(cause)
