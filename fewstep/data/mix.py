"""Several data sets as one, drawn by weight.

    data=mix 'data.sources=[{data: {folder: {dataset_dir: robots}}, weight: 3}, {data: {folder: {dataset_dir: cars}}}]'
    by_control(Folder("datasets/dmd2", x0="latents"), (Edge(), Vis()), block=64)    batches of one control each, equally often

Each source keeps its own order and its own epochs: every sample of it comes once before any comes again. Which source comes
next follows from the position alone, like all of the order, so that a run resumes within it on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.data.contract import AnyData, BadSamples, Dataset, OnDisk, Ordered
from fewstep.data.controls import Control
from fewstep.data.folder.dataset import Folder
from fewstep.data.order import interleaved, samples_at, shares
from fewstep.errors import UserError

_CYCLE = 1000  # blocks in which weights are kept exactly, to one block


@dataclass(frozen=True)
class Source:
    """One data set of several."""

    data: AnyData
    weight: float = 1.0  # share of the samples drawn, relative to the other weights


@kind("mix", group="data")
@dataclass(frozen=True)
class Mix:
    """Several data sets, drawn by weight."""

    sources: tuple[Source, ...] = ()
    block: int = 1  # samples in a row of one source; a multiple of trainer.batch_size where sources differ in shape

    @property
    def fields(self) -> frozenset[str]:
        return frozenset.intersection(*(source.data.fields for source in self.sources)) if self.sources else frozenset()

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.sources:
            yield "sources", "is empty: name the data sets to mix"
        for number, source in enumerate(self.sources):
            if not source.weight > 0:
                yield f"sources.{number}.weight", f"must be above 0, not {source.weight}: leave a source out to draw none of it"
            odd = sorted(source.data.fields ^ self.sources[0].data.fields)
            if odd:
                yield (
                    f"sources.{number}.data",
                    f"and the first source do not both have {', '.join(odd)}: one batch cannot hold both",
                )
        if self.block < 1:
            yield "block", f"must be at least 1, not {self.block}"

    def open(self) -> MixData:
        return MixData(self)


def by_control(folder: Folder, controls: Sequence[Control], block: int) -> Folder | Mix:
    """`folder` with a control; with several a mix of it with each, in blocks of one control, equally often.

    A pair belongs to the control that it was made with: the pairs of each are in the subfolder of its name.
    """
    if len(controls) < 2:
        return replace(folder, control=next(iter(controls), None))
    place = folder.dataset_dir
    sources = [replace(folder, dataset_dir=f"{place}/{c.folder}" if folder.pairs else place, control=c) for c in controls]
    return Mix(tuple(map(Source, sources)), block)


class MixData:
    """Samples of all sources, numbered one source after another."""

    def __init__(self, spec: Mix):
        wrong = [f"data.{key}: {message}" for key, message in spec.problems()]
        if wrong:
            raise UserError("\n".join(wrong))
        self.spec = spec
        self.sources: list[Dataset] = [source.data.open() for source in spec.sources]
        self._first = torch.tensor([0, *(len(source) for source in self.sources)]).cumsum(0)  # of each source, and the end
        self._blocks = shares(tuple(source.weight for source in spec.sources), _CYCLE)
        inner = [source.block for source in self.sources if isinstance(source, Ordered) and source.block]
        if any(spec.block % block for block in inner):
            raise UserError(
                f"data.block={spec.block} must be a multiple of {max(inner)}, the samples in a row of a source's own"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def block(self) -> int:
        return self.spec.block if self.spec.block > 1 else 0

    @property
    def max_bad(self) -> int:
        return sum(source.max_bad for source in self.sources if isinstance(source, OnDisk))

    @property
    def left_out(self) -> Mapping[str, str]:
        reasons = [source.left_out for source in self.sources if isinstance(source, OnDisk)]
        return {f"{number}:{name}": why for number, names in enumerate(reasons) for name, why in names.items()}

    def samples_at(self, position: Tensor, seed: int) -> Tensor:
        source, place = interleaved(position, self._blocks, self.spec.block, seed)
        out = torch.empty_like(position)
        for number, data in enumerate(self.sources):
            here, own_seed = source == number, seed * len(self.sources) + number
            if bool(here.any()):
                at = data.samples_at(place[here], own_seed) if isinstance(data, Ordered) else None
                out[here] = self._first[number] + (samples_at(place[here], len(data), own_seed) if at is None else at)
        return out

    def batch(self, index: Tensor) -> Batch:
        source = torch.searchsorted(self._first, index, right=True) - 1
        parts, places, bad = list[Batch](), list[Tensor](), dict[int, str]()
        for number in source.unique().tolist():
            here = (source == number).nonzero()[:, 0]
            try:
                parts.append(self.sources[number].batch(index[here] - self._first[number]))
                places.append(here)
            except BadSamples as error:
                bad |= {int(here[row]): why for row, why in error.rows.items()}
        if bad:
            raise BadSamples(bad)
        back = torch.cat(places).argsort()
        joined = parts[0] if len(parts) == 1 else _joined(parts, "a batch")
        return _with_index(joined.rows(back), index)


def _with_index(batch: Batch, index: Tensor) -> Batch:
    return replace(batch, index=index.clone())


def _joined(parts: Sequence[Any], where: str) -> Any:  # Batch, Condition, tensors, mappings of them or None, all of one type
    """Rows of all parts, one after another; refuses what only some of them have, and shapes that differ."""
    first = parts[0]
    if all(part is None for part in parts):
        return None
    if all(isinstance(part, Tensor) for part in parts):
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape[1:])) for part in parts)
            raise UserError(
                f"data: sources differ in the shape of {where} ({shapes}). Set data.block to a multiple of trainer.batch_size, "
                "so that a batch is of one source, or the same sizes in all"
            )
        return torch.cat(list(parts))
    if all(isinstance(part, (Batch, Condition)) for part in parts):
        return type(first)(**{f.name: _joined([getattr(p, f.name) for p in parts], f.name) for f in fields(first)})
    if all(isinstance(part, Mapping) and part.keys() == first.keys() for part in parts):
        return {name: _joined([part[name] for part in parts], f"{where}.{name}") for name in first}
    raise UserError(
        f"data: some sources have '{where}' and others do not. Give all of them the same text, control, pairs and rate, or set "
        "data.block to a multiple of trainer.batch_size, so that a batch is of one source"
    )
