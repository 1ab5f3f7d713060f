"""Sums of what is logged, on the device where the values are computed."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.methods.contract import Terms
from fewstep.parallel import World


class Meter:
    """Sums on the device: reading a number waits for it, so that is done once per log line."""

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}  # of this iteration, each summed over its micro-batches
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._began, self._iterations = time.monotonic(), 0

    def begin_iteration(self) -> None:
        self.terms = {}
        self._iterations += 1

    def add(self, terms: Terms) -> None:
        for name, value in terms.values.items():
            value = value.detach()
            self.terms[name] = self.terms[name] + value if name in self.terms else value
            self._add(f"loss/{name}", value)
        for name, value in terms.watch.items():
            self._add(f"watch/{name}", value.detach())

    def add_step(self, norms: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Gradient norms and learning rates of a step, by role."""
        for role, norm in norms.items():
            self._add(f"grad_norm/{role}", norm.detach())
            self._rates[f"lr/{role}"] = rates[role]

    def read(self, world: World, batch: int) -> dict[str, float]:
        """Means since the last reading, over all ranks; then starts anew. Values that did not occur since then are left out."""
        names = sorted(self._sums)
        means = torch.stack([(self._sums[name] / self._counts[name]).double().to(world.device) for name in names])
        seconds = time.monotonic() - self._began
        values = dict(zip(names, world.mean(means).tolist(), strict=True)) | self._rates
        values["samples_per_s"] = self._iterations * batch / max(seconds, 1e-9)
        self._sums, self._counts, self._rates = {}, {}, {}
        self._began, self._iterations = time.monotonic(), 0
        return values

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1
