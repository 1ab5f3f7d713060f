"""The scorers of an evaluation: those that are named, or those that suit the clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError, apply_overrides, choices, parse
from fewstep.data.files import video
from fewstep.data.folder.layout import CAPTIONS, Layout
from fewstep.data.folder.samples import read_caption
from fewstep.errors import UserError
from fewstep.evaluation.clips import AnyClips
from fewstep.evaluation.fidelity import ControlFidelity
from fewstep.evaluation.score import AnyScorer, Scorer
from fewstep.inference.clip_sets import control_kinds
from fewstep.inference.evaluation import Evaluation, is_data_set


@dataclass(frozen=True)
class _Choice:
    scorer: AnyScorer


def scorer_of(name: str | None, settings: Sequence[str] = (), features: str | None = None) -> Scorer | None:
    """The scorer of that name with settings KEY=VALUE; None if nothing says which.

    features: feature networks of the scorer `clips`, NAME or NAME=FILE, separated by commas.
    """
    if features is not None:
        if name not in (None, "clips"):
            raise ConfigError(f"--features is for the scorer clips, not for {name}")
        name = "clips"
    if name is None:
        if settings:
            raise ConfigError([(settings[0], "is a setting of a scorer: say which with --scorer NAME")])
        return None
    value: dict[str, Any] = {"kind": name}
    if features is not None:
        parts = [part.strip().partition("=") for part in features.split(",")]
        value["features"] = [{"kind": kind, **({"weights": file} if file else {})} for kind, _, file in parts]
    choice = parse(_Choice, {"scorer": value})
    return apply_overrides(choice, [f"scorer.{setting}" for setting in settings]).scorer


def scorers_of(task: Evaluation) -> tuple[Scorer, ...]:
    """The scorers of the task; raises UserError if it lacks something that one of them needs."""
    scorers = task.scorers
    if not scorers:
        fidelity = (ControlFidelity(),) if task.controls else ()
        scorers = fidelity if fidelity and task.real is None else (_suitable(task), *fidelity)
    control_kinds(task.controls)
    for scorer in scorers:
        if task.per_set < scorer.min_clips:
            raise UserError(f"--num {task.num}: a set needs at least {scorer.min_clips} clips, and better hundreds")
        if "real" in scorer.needs and task.real is None:
            raise UserError("--real: this scorer compares with real clips; give their folder")
    return scorers


def _suitable(task: Evaluation) -> Scorer:
    """The scorer that was made for clips like these, or the one for clips of any kind."""
    files = task.files()
    stem, first = next(iter(files.items()))
    folder = Path(task.what) if task.is_of_clips else task.prompts_folder
    captions = Layout.open(folder).files(CAPTIONS) if is_data_set(folder) else {}
    texts = (read_caption(captions[stem]),) if stem in captions else ()
    kinds: dict[str, Any] = choices("scorer")
    return next((kind() for kind in kinds.values() if kind().suits(video.probe(first), texts)), AnyClips())
