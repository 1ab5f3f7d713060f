"""The contract of a data set. It needs no network: pairs made by a teacher are files, or a data set of fewstep/inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Protocol, runtime_checkable

from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import OneOf
from fewstep.errors import UserError, some


class Dataset(Protocol):
    """Samples by number. The same number gives the same sample, on every rank and after every restart."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The samples of `index` (B,), in that order, on the CPU. BadSamples names those that cannot be read."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A data set that decides its own order: several sources by weight, clips of one size side by side."""

    @property
    def block(self) -> int:
        """Positions k block .. (k + 1) block - 1 fit into one batch; 0: any do."""
        ...

    def samples_at(self, position: Tensor, seed: int) -> Tensor:
        """The sample number for each position of a run; a function of these two alone (order.py)."""
        ...


@runtime_checkable
class OnDisk(Protocol):
    """A data set whose samples are read from files: worth reading ahead, and some of them may be bad."""

    @property
    def max_bad(self) -> int:
        """How many samples may be left out before the run ends."""
        ...

    @property
    def left_out(self) -> Mapping[str, str]:
        """Samples that were left out when it was opened, and why."""
        ...


@runtime_checkable
class Encoded(Protocol):
    """A data set that may hold latents."""

    @property
    def codec(self) -> str | None:
        """The fingerprint of the codec that made them; None where no file says so."""
        ...


class BadSamples(UserError):  # noqa: N818  # reads as what it is
    """Samples that cannot be read: the reason by row of the index."""

    def __init__(self, rows: Mapping[int, str]):
        self.rows = dict(rows)
        reasons = list(dict.fromkeys(self.rows.values()))
        super().__init__(some(reasons, 5, "\n"))


class DataSpec(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="data")."""

    @property
    def fields(self) -> frozenset[str]:
        """Fields of Batch that every sample has; known without opening anything."""
        ...

    def open(self) -> Dataset: ...


AnyData = Annotated[DataSpec, OneOf("data")]  # a field that holds the configuration of one data set
