"""Options that several verbs share, and what checks them: one thing has one name in every verb (docs/options.md).

Verbs differ in the sentence of --help alone. An underscore for a dash is understood everywhere.
"""

from __future__ import annotations

import gc
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from fewstep.environment import DEVICES
from fewstep.files import unfit
from fewstep.networks.files.hub import no_id
from fewstep.solvers import SOLVERS

UsageError: Any = typer.BadParameter.__base__  # of all wrong use; typer has no public name for it
JSON = "Print machine-readable output and nothing else."
CONTROLS = ("edge", "vis", "depth", "seg", "keypoint")
PRESETS = ("none", "very_low", "low", "medium", "high", "very_high", "random")  # of edge and vis
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # KEY=VALUE, and the lone dashes of Cosmos' commands
# Options with more than one spelling, the first of which is ours.
SPELLINGS = (
    ("--out", "-o", "--output-file"),
    ("--num-steps", "--steps"),
    ("--codec", "--tokenizer-dir"),
    ("--text-encoder", "--encoder"),
    ("--format", "--form"),
)
# The least value of options that are numbers.
LEAST = {
    "--num": 1, "--num-frames": 1, "--height": 1, "--width": 1, "--batch-size": 1, "--num-steps": 1, "--max-tokens": 1,
    "--tile": 1, "--sets": 1, "--seeds": 1, "--calls": 1, "--threads": 1, "--sequence-interval": 1, "--start-frame-interval": 1,
    "--shard-mib": 1, "--steps": 1, "--rank": 1, "--teacher-steps": 1, "--num-pairs": 1, "--kd-iters": 1, "--iters": 1,
    "--num-eval": 1, "--trials": 1, "--dim": 1, "--latent-channels": 1, "--processes": 1, "--context": 1, "--chunk": 1,
    "--span": 1,
    "--given-frames": 0, "--workers": 0, "--verify": 0, "--latency": 0, "--measure": 0, "--keep": 0, "--seed": 0,
}  # fmt: skip


def one_of(*names: str) -> Any:  # Any: a callback, as typer has them
    """Refuses other values of an option than these, before anything is imported for the command."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}.")
        return value

    return check


def positive(value: float | None) -> float | None:
    """Refuses numbers that are not above 0, infinite, or none at all."""
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value:g} is not a number above 0.")
    return value


def crf(value: str | None) -> str | None:
    """Refuses what is no quality of an mp4."""
    if value is not None and value != "lossless" and not (value.isdecimal() and int(value) <= 51):
        raise typer.BadParameter(f"{value!r} is neither lossless nor a CRF from 0 (best) to 51.")
    return value


def folder_to_read(value: Path | None) -> Path | None:
    """Refuses a data set that is not there."""
    if value is not None and not value.is_dir():
        reason = "is a file, where a folder is needed" if value.exists() else "there is no such folder"
        raise typer.BadParameter(f"{str(value)!r}: {reason}.")
    return value


def clips_to_read(value: Any) -> Any:  # Any: a path or a text, or None
    """Refuses clips that are not there: a folder; of a pattern like clips/*.mp4 only its reader knows."""
    if value is not None and "*" not in str(value):
        folder_to_read(Path(value))
    return value


def folder_to_write(value: Path | None) -> Path | None:
    """Refuses a folder in whose place a file stands."""
    return _to_write(value, is_folder=True)


def store_to_write(value: str | None) -> str | None:
    """The same, of a folder or of an address elsewhere."""
    if value is not None and "://" not in value:
        folder_to_write(Path(value))
    return value


def file_to_write(value: Path | None) -> Path | None:
    """Refuses a file in whose place a folder stands."""
    return _to_write(value, is_folder=False)


def scores_to_write(value: Path | None) -> Path | None:
    """The same, of a file beside which a folder of its name is written."""
    value = file_to_write(value)
    if value is not None and not value.suffix:
        raise typer.BadParameter(f"{str(value)!r} has no suffix: write {value.name}.json; clips go into a folder {value.name}.")
    return value


def file_to_read(value: Path | None) -> Path | None:
    """Refuses a file that is not there."""
    if value is not None and not value.is_file():
        reason = "is a folder, where a file is needed" if value.is_dir() else "there is no such file"
        raise typer.BadParameter(f"{str(value)!r}: {reason}.")
    return value


def device(value: str | None) -> str | None:
    """Refuses what is no name of a device."""
    if value is not None and not re.fullmatch(DEVICES, value):
        raise typer.BadParameter(f"{value!r} is no device: cpu, cuda, cuda:1, mps ..")
    return value


def _to_write(value: Path | None, is_folder: bool) -> Path | None:
    reason = None if value is None else unfit(value, is_folder)
    if reason is not None:
        raise typer.BadParameter(f"{str(value)!r} {reason}.")
    return value


def model_to_read(value: str | None) -> str | None:
    """Refuses what is neither a folder nor a name on the hub."""
    reason = None if value is None or Path(value).is_dir() else no_id(value)
    if reason is not None:
        raise typer.BadParameter(f"{value!r}: {reason}.")
    return value


def option(name: str, help: str, **rules: Any) -> Any:  # Any: as typer annotates an option, and what it takes
    """An option under every spelling of its name, with the least value that it may have."""
    spellings = next((each for each in SPELLINGS if each[0] == name), (name,))
    least = {"min": LEAST[name]} if name in LEAST else {}
    rules = {"callback": model_to_read} | rules if name in ("--codec", "--text-encoder") else rules
    return typer.Option(*spellings, help=help, **least, **rules)


def size_of(height: int | None, width: int | None) -> tuple[int, int] | None:
    """Both sides of a picture, or none of them."""
    if (height is None) != (width is None):
        raise UsageError("--height and --width go together.")
    return None if height is None or width is None else (height, width)


def _auto(value: str | None) -> str | None:
    return None if value == "auto" else one_of("auto", *SOLVERS)(value)


DEVICE = option("--device", "Device, for instance cpu or cuda:0. Default: a GPU if there is one.", callback=device)
PRECISION = option("--precision", "Precision of the network and the codec: fp32 or bf16.", callback=one_of("fp32", "bf16"))
OWN = option("--config", "FILE.py that registers networks, scorers or controls of your own.", callback=file_to_read)
SHARD = option("--shard", "torchrun's processes hold a part of the weights each, instead of all of them.")
CONTEXT = option("--context", "Processes of torchrun that make each clip together, for a shorter wait.")
# A teacher's sampler; what is not given is as published for the model.
STEPS = option("--num-steps", "Steps of a teacher's solver. Default: as published.")
SAMPLER = option("--sampler", f"A teacher's solver: {', '.join(SOLVERS)}. Default: auto, as published.", callback=_auto)
SHIFT = option("--shift", "Shift of a teacher's grid in flow time. Default: as published.", callback=positive)
SIGMA_MAX = option("--sigma-max", "Where the grid of an EDM teacher begins. Default: as published, 80.", callback=positive)
GUIDANCE = option("--guidance", "w in uncond + w (cond - uncond) of a teacher; 1 is off; Cosmos writes g = w - 1.")
GUIDANCE_LOW = option("--guidance-low", "w of the low-noise expert of Wan A14B.")
# What the network receives from a data set.
TEXT = option("--text", "Folder of the text embeddings in the data set.")
MAX_TOKENS = option("--max-tokens", "Number of tokens that text is padded to.")
MASK_TEXT = option("--mask-text", "Give the network a mask of the padding; Cosmos has none.")
BATCH_SIZE = option("--batch-size", "Number of clips that go through the network together.")
QUALITY = option("--quality", "Quality of the mp4: lossless, or a CRF from 0 to 51.", callback=crf)
GIVEN_FRAMES = option("--given-frames", "Number of clean latent frames of the clip that the model receives.")


@contextmanager
def imports() -> Iterator[None]:
    """Python looks for no garbage meanwhile, nor among these objects later: a million, which stay (a tenth of the time)."""
    was_on, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_on:
            gc.enable()


def next_step(*words: object) -> None:
    """Says which command usually follows, to people at a terminal; scripts and pipes get the results alone."""
    if sys.stdout.isatty():
        print("next:", shlex.join(str(word) for word in words))


def load(config: Path | None) -> None:
    """Imports a file of the user's own for the kinds that it registers."""
    from fewstep.config import load_file

    if config is not None:
        load_file(config)
