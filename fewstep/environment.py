"""The environment variables that this package reads."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import UserError

DEVICES = r"(cpu|cuda|mps|xpu)(:\d{1,3})?"  # names of devices, as torch has them


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that torchrun started."""

    rank: int
    size: int
    local: int  # among the processes of this machine: the number of its GPU
    attempt: int = 0  # how often torchrun has started all of them anew

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def ranks() -> Ranks:
    """RANK, WORLD_SIZE, LOCAL_RANK and TORCHELASTIC_RESTART_COUNT, which torchrun sets; a process alone where they are not set.

    Raises UserError.
    """
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
    return Ranks(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0), attempt)


def has_terminal() -> bool:
    """Whether messages go to a terminal, where bars can be drawn; or FORCE_COLOR is set, as rich reads it."""
    return sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))


def output_root() -> Path:
    """The folder that holds the run folders: OUTPUT_ROOT, or `checkpoints` in the working directory."""
    return Path(os.environ.get("OUTPUT_ROOT") or "checkpoints")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}, not a number. Start the processes with torchrun")
    return int(text)
