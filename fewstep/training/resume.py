"""What a run that goes on finds in its folder: how far it is, and which settings have changed since.

A changed setting is named, old value and new one, and the file with the old ones stays as config.001.yaml, config.002.yaml ..
Refused is what the weights of a checkpoint were not trained for: another method, other networks.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.config import ConfigError, parse, to_yaml
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.errors import UserError, some
from fewstep.files import move, write_text
from fewstep.networks.files.checkpoints import POINTER
from fewstep.training.checkpoint import read_progress
from fewstep.training.records import CONFIG, flat
from fewstep.training.run import Run
from fewstep.untrusted.text import read_json

ABSENT = "(not there)"
# Settings of networks that say where weights come from; the other ones say what network it is.
ADDRESSES = ("init", "teacher_init", "pretrained", "branches", "text_projection_from")
ROLES = ("networks.student", "networks.critic", "networks.head", "networks.teacher")


class Change(NamedTuple):
    """A setting that differs between the folder's config.yaml and a run."""

    key: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"

    @property
    def is_refused(self) -> bool:
        """True where the weights of a checkpoint would go on as something that they were not trained as."""
        if self.key == "method.kind":
            return True
        return self.key.startswith(ROLES) and self.key.rpartition(".")[2] not in ADDRESSES


@dataclass(frozen=True)
class Resumption:
    """A checkpoint of a run, and what has changed since the run was started."""

    checkpoint: Path
    step: int
    changes: tuple[Change, ...]
    is_over: bool = False  # checkpoint.patience has ended it

    @classmethod
    def of(cls, run: Run, checkpoint: Path) -> Resumption:
        """Raises ConfigError if the run cannot go on from `checkpoint` under its settings."""
        changes = changes_in(run.job.folder(), run)
        advice = (
            f"the checkpoint {checkpoint} was trained otherwise. Give the new run another job.name; it can start from these "
            f"weights with checkpoint.load_path={run.job.folder()}"
        )
        refused = [(change.key, f"{change.before} -> {change.after}: {advice}") for change in changes if change.is_refused]
        if refused:
            raise ConfigError(refused)
        progress = read_progress(checkpoint)
        return cls(checkpoint, progress.step, changes, run.checkpoint.is_over(progress.stale))

    def text(self) -> str:
        """The changes, for people; "" if there are none."""
        return some([str(change) for change in self.changes], 12, "; ")

    def results(self, last: int) -> dict[str, Any] | None:
        """summary.json, if the run has finished; None while there is something to do: at least to write that again."""
        if self.step < last and not self.is_over:
            return None
        with suppress(UserError):  # it is not there, or damaged
            results = read_json(self.checkpoint.parent.parent / "summary.json", "")
            return results if results.get("step") == self.step else None  # of fewer iterations, before a fault
        return None

    def nothing_to_do(self, last: int) -> str:
        """Why nothing is trained, for people."""
        folder = self.checkpoint.parent.parent
        ignored = f" Settings that differ from {folder / CONFIG} have no effect: {self.text()}." if self.changes else ""
        longer = "larger checkpoint.patience" if self.is_over else "larger trainer.max_iter"
        return (
            f"{folder}: nothing to do, iteration {self.step} of {last}.{ignored} "
            f"Train longer with a {longer}, or anew with another job.name"
        )


def changes_in(folder: Path, run: Run) -> tuple[Change, ...]:
    """What differs between config.yaml in `folder` and `run`, in the order of the settings."""
    path = folder / CONFIG
    if not path.is_file():
        return ()
    try:
        content = read_yaml_mapping(read_text(path), str(path))
    except ConfigError as error:
        return (Change(CONFIG, f"cannot be read ({error})", "this run's"),)
    with suppress(ConfigError):  # of another version; as this one would write it
        content = read_yaml_mapping(to_yaml(parse(type(run), content)), str(path))
    before = dict(flat(content))
    after = dict(flat(read_yaml_mapping(to_yaml(run), "the run")))
    changes = [
        Change(key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in (after | before)
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]
    kinds = [change.key.removesuffix("kind") for change in changes if change.key.endswith(".kind")]  # what is below follows
    return tuple(
        change for change in changes if change.key.endswith(".kind") or not any(change.key.startswith(kind) for kind in kinds)
    )


def write_config(folder: Path, run: Run) -> Path | None:
    """Writes config.yaml; one with other settings is kept under the next number, and its path returned."""
    path, text = folder / CONFIG, to_yaml(run)
    backup: Path | None = None
    if path.is_file() and path.read_bytes() != text.encode() and (folder / "checkpoints" / POINTER).is_file():
        numbers = [int(name) for old in folder.glob("config.*.yaml") if (name := old.name.split(".")[1]).isdecimal()]
        backup = folder / f"config.{max(numbers, default=0) + 1:03d}.yaml"
        move(path, backup)
    write_text(path, text)
    return backup
