"""Who holds how much memory, op by op: every storage that exists while the ledger is open, by label, and the worst moments.

It counts what torch allocates for tensors, fake ones (shapes without contents) exactly as real ones. It does not see what lies
outside tensors: libraries' workspaces, the device's context, and what an allocator loses to rounding and gaps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the way torch's own memory tools look at every op
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

HOST = "host"  # in the memory of the CPU: known, and not counted
PASSING = "activations"  # what no one claimed: activations, and temporaries of ops


class Ledger(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._lines: Any = WeakIdKeyDictionary()  # storage -> its line
        self.now: dict[str, int] = {PASSING: 0}  # bytes by label
        self.total = 0
        self._label = PASSING
        self._worst = [0, 0]
        self._moments: list[Mapping[str, int]] = [{}, {}]

    def hold(self, tensors: Iterable[Tensor], label: str) -> None:
        """Enters what these tensors hold under `label`, whoever held it before."""
        for tensor in tensors:
            for part in _parts(tensor):
                storage = part.untyped_storage()
                line = self._lines.get(storage)
                if line is None:
                    self._enter(storage, label)
                elif line[0] != label:
                    self.now[line[0]] -= line[1]
                    self.now[label] = self.now.get(label, 0) + line[1]
                    self.total += line[1] * ((line[0] == HOST) - (label == HOST))
                    line[0] = label
        self._look()

    def begin(self) -> None:
        """Forgets the worst moments: the next ones count from now."""
        self._worst = [0, 0]
        self._look()

    def moments(self) -> list[Mapping[str, int]]:
        """Bytes by label when most was held, and when most was held that no one claimed."""
        return list(self._moments)

    @contextmanager
    def entering(self, label: str) -> Iterator[None]:
        """Within, what is allocated is held under `label`."""
        self._label = label
        try:
            yield
        finally:
            self._label = PASSING

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                for part in _parts(tensor):
                    storage = part.untyped_storage()
                    if storage not in self._lines:
                        self._enter(storage, self._label)
        self._look()
        return out

    def _enter(self, storage: Any, label: str) -> None:
        line = [label, storage.nbytes()]
        self._lines[storage] = line
        self.now[label] = self.now.get(label, 0) + line[1]
        self.total += line[1] * (label != HOST)
        weakref.finalize(storage, self._leave, line).atexit = False

    def _leave(self, line: list[Any]) -> None:
        self.now[line[0]] -= line[1]
        self.total -= line[1] * (line[0] != HOST)

    def _look(self) -> None:
        for order, size in enumerate((self.total, self.now[PASSING])):
            if size > self._worst[order]:
                self._worst[order] = size
                self._moments[order] = {name: size for name, size in self.now.items() if size and name != HOST}


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that hold the memory of this one: a shard's own, the pieces of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]  # of tensor subclasses
        return [part for name in names for part in _parts(getattr(tensor, name))]
    if tensor.layout != torch.strided:
        return ()
    return (tensor,)
