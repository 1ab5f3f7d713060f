"""Options that several verbs share, the same in each, and what checks them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

JSON = "Print machine-readable output and nothing else."
CONTROLS = ("edge", "vis", "depth", "seg", "keypoint")
DEVICE = typer.Option(help="Device, for instance cpu or cuda:0. Default: a GPU if there is one.")
# Options of a teacher's sampler; what is not given is as published for the model.
STEPS = typer.Option("--steps", "--num-steps", help="Steps of a teacher's solver. Default: as published.")
SAMPLER = typer.Option(help="A teacher's solver: euler, heun, dpmpp_2m, unipc or res_2ab. Default: as published.")
SHIFT = typer.Option(help="Shift of a teacher's grid in flow time. Default: as published.")
SIGMA_MAX = typer.Option(help="Where the grid of an EDM teacher begins. Default: as published, 80.")
GUIDANCE = typer.Option(help="w in uncond + w (cond - uncond) of a teacher; 1 is off; Cosmos writes g = w - 1.")
OWN = typer.Option(help="FILE.py that registers networks, scorers or controls of your own.")
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # KEY=VALUE, and the lone dashes of Cosmos' commands


def one_of(*names: str) -> Any:  # Any: a callback, as typer has them
    """Refuses other values of an option than these, before anything is imported for the command."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}.")
        return value

    return check


@contextmanager
def imports() -> Iterator[None]:
    """Python looks for no garbage meanwhile: torch and diffusers make a million objects that stay (a tenth of the time)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load(config: Path | None) -> None:
    """Imports a file of the user's own for the kinds that it registers."""
    from fewstep.config import load_file

    if config is not None:
        load_file(config)
