"""What a data set must offer. It knows no network: pairs made by a teacher are files, or data the teacher's room makes."""

from __future__ import annotations

from typing import Annotated, Protocol

from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import OneOf


class Dataset(Protocol):
    """Samples by number. The same number gives the same sample, on every rank and after every restart."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The samples of `index` (B,), in that order, on the CPU."""
        ...


class DataSpec(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="data")."""

    @property
    def fields(self) -> frozenset[str]:
        """Fields of Batch that every sample has; known without opening anything."""
        ...

    def open(self) -> Dataset: ...


AnyData = Annotated[DataSpec, OneOf("data")]  # a field that holds the configuration of one data set
