"""How often an iteration waits for the device: once, where its numbers are checked before a step.

A CPU waits for nothing, so that what would wait on a GPU is counted by its calls: those that make Python numbers, arrays or
positions of a tensor's values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Rng
from fewstep.inference.synthetic import InMemory
from fewstep.methods import DMD2, Finetune, Gan, Method, StudentSample
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Job, Run, Trainer

WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__float__", "__int__", "__index__", "__contains__")
# Numbers that lie on the CPU wherever the networks do: of rows, of positions in the data, of a list of times.
ON_THE_CPU = {"rng.py", "loader.py", "order.py", "synthetic.py", "times.py"}
DIT = TinySpec(architecture="dit", channels=2, width=24, depth=2, num_heads=2)
CLIPPED = Optim(lr=1e-3, clip=1e-3)


@kind("waits_latents", group="data")
@dataclass(frozen=True)
class Latents:
    fields = frozenset({"x0"})

    def open(self) -> InMemory:
        return InMemory(Batch(x0=Rng(5, 0, range(40)).normal((2, 2, 3, 3))))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The files of the package from which a tensor's values are asked for, each as often as it asks."""
    counts: Counter[str] = Counter()
    before = {name: getattr(torch.Tensor, name) for name in WAITS}

    def watched(name: str, original: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and "fewstep" not in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            counts[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
            return original(self, *args, **kwargs)

        return call

    try:
        for name, original in before.items():
            setattr(torch.Tensor, name, watched(name, original))
        yield counts
    finally:
        for name, original in before.items():
            setattr(torch.Tensor, name, original)


HEAD = MultiscaleSpec(taps=(0, 1), channels=24, hidden=16)
DMD = DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2)
CASES: dict[str, tuple[Method, Networks]] = {
    "finetune": (Finetune(), Networks(student=Full(DIT, init="random"))),
    "dmd2": (DMD, Networks(DIT, Full(), Full())),
    "gan": (replace(DMD, gan=Gan(weight=0.3)), Networks(DIT, Full(), Full(), head=HEAD)),
    "lora": (DMD, Networks(DIT, Lora(rank=2), Lora(rank=2))),
}


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_waits_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    method, networks = CASES[case]
    found = []
    for num in (4, 12):
        trainer = Trainer(max_iter=num, batch_size=4, num_threads=1, log_every=num)
        run = Run(method, networks, Latents(), Job(name=f"{case}_{num}"), optim=CLIPPED, trainer=trainer)
        with counted() as counts:
            train(run)
        found.append(counts)
    more = {place: (found[1][place] - found[0][place]) / 8 for place in found[1]}
    waits = {place: share for place, share in more.items() if share > 0 and place.split(":")[0] not in ON_THE_CPU}
    assert waits == {"guard.py:refuse_non_finite": 1.0}


def test_what_is_counted() -> None:
    with counted() as counts:
        bool(torch.ones(()))
        torch.ones(2).tolist()
        torch.ones(2).cpu()
        float(torch.ones(()))
    assert counts.total() == 4
