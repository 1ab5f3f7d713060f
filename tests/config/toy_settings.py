"""A run small enough to be read at a glance: what the tests of the configuration are configured with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt, MinLen
from pydantic import AllowInfNan

from fewstep.config import (
    ConfigError,
    OneOf,
    compose,
    kind,
    read_command,
    recipe,
)


@kind("kd", group="toy_method")
@dataclass(frozen=True)
class Kd:
    t_list: tuple[float, ...]  # descending, without the final 0
    lr: float = 1.0


@kind("dmd2", group="toy_method")
@dataclass(frozen=True)
class Dmd2:
    guidance: float = 5.0  # the edge recipe
    lr: Annotated[float, Gt(0)] = 2.0

    def problems(self) -> list[tuple[str, str]]:
        return [("warn:guidance", "is high")] if self.guidance > 10 else []


AnyMethod = Annotated[Any, OneOf("toy_method")]


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3  # per step
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup_iters: int = 0

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.lr > 0 else [("lr", f"is {self.lr}: nothing would be trained")]


@dataclass(frozen=True)
class Trainer:
    max_iter: int = 1000  # iterations
    precision: Literal["fp32", "bf16"] = "fp32"
    num_steps: Literal[1, 2, 4] = 1
    compile: bool = False


@dataclass(frozen=True)
class Checkpoint:
    save_iter: int = 500
    load_path: str | None = None


@dataclass(frozen=True)
class Stage:
    size: int
    methods: tuple[AnyMethod, ...] = ()


@dataclass(frozen=True)
class Run:
    method: AnyMethod
    second: AnyMethod | None = None
    optim: Optim = Optim(lr=3e-4)
    critic_optim: Optim | None = None
    trainer: Trainer = Trainer()
    checkpoint: Checkpoint = Checkpoint()
    name: str = "run"
    folder: Path | None = None
    weights: tuple[str, ...] | None = None
    stages: tuple[Stage, ...] = ()
    controls: Mapping[str, AnyMethod] = field(default_factory=dict)
    cap: Annotated[float, AllowInfNan()] = math.inf
    counts: Annotated[tuple[int, ...], MinLen(1)] = (1,)

    def problems(self) -> list[tuple[str, str]]:
        wrong = self.optim.warmup_iters > self.trainer.max_iter
        return [("optim.warmup_iters", "is longer than the run")] if wrong else []


SHARED: dict[str, Dmd2] = {"edge": Dmd2()}


@recipe("toy")
def toy() -> Run:
    """A toy run.

    Not its first line.
    """
    return Run(Dmd2(), controls=SHARED, stages=(Stage(8), Stage(16)))


def run(*words: str) -> Run:
    return compose(read_command(["experiment=toy", *words]), Run)


def message(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run(*words)
    return sorted(str(caught.value).split("\n"))
