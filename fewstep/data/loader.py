"""Batches in the order of a run, read ahead, so that the trainer finds the next one ready.

    with Batches(data, rows, per_step=8, seed=0, end=8000) as batches:
        part = batches.take(samples=0, micro=0)       # part.batch, its rows, and its share of the requested samples

The order is a function of the position alone (order.py), and `take` receives the position: a loader has no state to save or to
restore. A run resumes with another number of processes or workers, and each sample still comes once per epoch. torchdata's
StatefulDataLoader 0.11 keeps a state for each worker and fails on another number of them.

Workers are threads: ffmpeg, OpenCV, numpy and torch release Python's lock while they work, samples kept in memory are shared,
and nothing is copied between processes.

A sample that cannot be read is left out, reported by name, and counted; the batch is smaller by it and its losses weigh
less. It is never replaced. A batch with no sample left holds one readable stand-in of weight 0, so that all ranks stay in step.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.data.contract import BadSamples, Dataset, OnDisk, Ordered
from fewstep.data.order import samples_at
from fewstep.errors import UserError


@dataclass(frozen=True)
class Loader:
    """How batches are read: a group of a run's settings."""

    num_workers: int | None = None  # threads that read batches ahead; none: 2 for data in files, 0 for data in memory
    ahead: int = 2  # batches that are ready or being made while one is trained on; costs their memory


@dataclass(frozen=True)
class MicroBatch:
    """What one process trains on at once."""

    batch: Batch
    rows: Tensor  # of its samples in the batch of the whole step
    share: float  # of the requested samples that are in it: the weight of its losses; 1 unless samples were left out


@dataclass(frozen=True)
class _Position:
    samples: int  # position of the step's first sample
    micro: int


class Batches:
    """The batches of one process. `rows` are those of its samples in the batch of a step, for each micro-batch.

    `end`: the position where the run ends; nothing beyond it is read.
    """

    def __init__(
        self,
        data: Dataset,
        rows: Sequence[Tensor],
        per_step: int,
        seed: int,
        end: int,
        loader: Loader = Loader(),
        say: Callable[[str], None] = lambda _: None,
    ):
        self._data, self._rows, self._per_step, self._seed, self._end, self._say = data, rows, per_step, seed, end, say
        on_disk = isinstance(data, OnDisk)
        self._ordered = data if isinstance(data, Ordered) else None  # looking whether it is takes as long as the rest of a read
        workers = loader.num_workers if loader.num_workers is not None else (2 if on_disk else 0)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read") if workers else None
        self._ahead = max(loader.ahead, workers)
        self._waiting: deque[tuple[_Position, Future[MicroBatch]]] = deque()
        self.max_bad = data.max_bad if on_disk else 0
        self._bad: dict[int, str] = {}  # sample number -> why
        self._left_out = dict(data.left_out) if on_disk else {}  # before the run began
        self._lock = threading.Lock()
        self._waited, self._began = 0.0, time.monotonic()
        for why in self._left_out.values():
            say(f"left out of the data: {why}")

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, samples: int, micro: int) -> MicroBatch:
        """The batch at this position; waits for it if it is not ready."""
        began = time.monotonic()
        position = _Position(samples, micro)
        if self._pool is None:
            part = self._read(position)
        else:
            if self._waiting and self._waiting[0][0] != position:  # a roll-back
                self._drop()
            if not self._waiting:  # what is asked for is read wherever it lies; ahead of that, nothing beyond the end
                self._submit(position)
            self._fill(position)
            part = self._waiting.popleft()[1].result()
            self._fill(self._after(position))
        self._waited += time.monotonic() - began
        return part

    @property
    def num_bad(self) -> int:
        """Samples left out so far, each counted once."""
        return len(self._bad) + len(self._left_out)

    def metrics(self) -> dict[str, float]:
        """The share of the time since the last call that was spent waiting for data."""
        now = time.monotonic()
        values = {"data/wait_share": self._waited / max(now - self._began, 1e-9)}
        self._waited, self._began = 0.0, now
        return values

    def bad_samples(self) -> str:
        """The samples that could not be read, as JSON for the other processes."""
        return json.dumps(self._bad)

    def leave_out(self, bad_samples: Sequence[str]) -> None:
        """Leaves out and counts what other processes could not read."""
        for other in bad_samples:
            for number, why in json.loads(other).items():
                self._leave_out(int(number), why)

    # ---- ahead -----------------------------------------------------------------------------------------------------

    def _fill(self, position: _Position) -> None:
        """Reads ahead from `position` on, or from behind what is being read."""
        if self._waiting:
            position = self._after(self._waiting[-1][0])
        while len(self._waiting) < self._ahead and position.samples < self._end:
            self._submit(position)
            position = self._after(position)

    def _submit(self, position: _Position) -> None:
        assert self._pool is not None
        self._waiting.append((position, self._pool.submit(self._read, position)))

    def _after(self, position: _Position) -> _Position:
        last = position.micro + 1 == len(self._rows)
        return _Position(position.samples + self._per_step, 0) if last else _Position(position.samples, position.micro + 1)

    def _drop(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    # ---- one batch -------------------------------------------------------------------------------------------------

    def _read(self, position: _Position) -> MicroBatch:
        rows = self._rows[position.micro]
        index = self._index(position.samples + rows)
        if not self._bad:  # nearly always
            try:
                return MicroBatch(self._data.batch(index), rows, 1.0)
            except BadSamples as error:
                for row, why in error.rows.items():
                    self._leave_out(int(index[row]), why)
        good = torch.tensor([number not in self._bad for number in index.tolist()], dtype=torch.bool)
        while bool(good.any()):
            try:
                batch = self._data.batch(index[good])
            except BadSamples as error:
                places = good.nonzero()[:, 0]
                for row, why in error.rows.items():
                    self._leave_out(int(index[places[row]]), why)
                    good[places[row]] = False
                continue
            return MicroBatch(batch, rows[good], float(good.double().mean()))
        return MicroBatch(self._stand_in(int(index[0])), rows[:1], 0.0)

    def _index(self, position: Tensor) -> Tensor:
        if self._ordered is not None:
            return self._ordered.samples_at(position, self._seed)
        return samples_at(position, len(self._data), self._seed)

    def _stand_in(self, number: int) -> Batch:
        """Any sample that can be read; its losses weigh nothing."""
        for step in range(1, len(self._data)):
            other = (number + step) % len(self._data)
            if other in self._bad:
                continue
            try:
                return self._data.batch(torch.tensor([other]))
            except BadSamples as error:
                self._leave_out(other, error.rows[0])
        raise UserError("data: no sample can be read:\n" + "\n".join(list(self._bad.values())[:5]))

    def _leave_out(self, number: int, why: str) -> None:
        with self._lock:
            if number in self._bad:
                return
            self._bad[number] = why
        refuse_too_many(self.num_bad, self.max_bad, why)
        self._say(f"left out of the data ({self.num_bad} of data.max_bad={self.max_bad}): {why}")


def first_batch(data: Dataset, num: int) -> Batch:
    """The first `num` samples, fewer if the data set is smaller; those that may be left out are. Of one block, where
    only samples of a block fit together."""
    allowed = data.max_bad if isinstance(data, OnDisk) else 0
    if isinstance(data, Ordered) and data.block:
        return data.batch(data.samples_at(torch.arange(min(num, data.block)), 0))
    index = torch.arange(min(num, len(data)))
    while True:
        try:
            return data.batch(index)
        except BadSamples as error:
            refuse_too_many(len(error.rows), allowed, str(error))
            keep = [row for row in range(len(index)) if row not in error.rows]
            beyond = torch.arange(int(index[-1]) + 1, min(int(index[-1]) + 1 + len(error.rows), len(data)))
            index = torch.cat([index[keep], beyond])
            if not len(index):
                raise


def refuse_too_many(num: int, allowed: int, why: str) -> None:
    """Ends the run if more samples are bad than may be."""
    if num > allowed:
        more = f"{num} samples cannot be read, more than data.max_bad={allowed}. The last one: " if allowed else ""
        hint = (
            ""
            if allowed
            else "\nTo leave such samples out, and count them: data.max_bad=10. All of them: fewstep check data DIR"
        )
        raise UserError(f"{more}{why}{hint}")
