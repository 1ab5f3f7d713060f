"""A network between a method and its network, which keeps count of what is asked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Counting:
    """Counts calls, rows, and calls with a graph."""

    inner: Any
    counts: Counter[str]

    @property
    def path(self) -> Any:
        return self.inner.path

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, *, taps: Sequence[int] = (), cache: Any = None) -> Any:
        answer = self.inner(x_t, t, cond, taps=taps, cache=cache)
        self.counts.update(calls=1, rows=len(x_t), graphs=int(answer.velocity.requires_grad))
        return answer
