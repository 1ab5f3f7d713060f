"""What a report is made of: plain frozen records that any evaluation can fill; nothing here depends on a model or a data set.

    Report(
        title="A 70-call teacher becomes a 1-call student",
        models=[Model("real", "real clips"), Model("teacher", "teacher, 35 steps", num_calls=70, guidance=5.0, scores=...)],
        scores=[Score("frechet", "Frechet distance", "How far ...", better="lower", is_headline=True)],
        galleries=[Gallery("Same noise", rows=[Row("a red ball ...", [Film("real clip", frames, kind="real")])], fps=16)],
        gates=[Gate("4 steps: ratio to the teacher", value=1.3, bound=1.5, better="lower", spread=0.1)],
    )

The page shows these numbers and no others: what is not in a record is not claimed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluation.plot import Series
from fewstep.evaluation.score import Better as Better
from fewstep.evaluation.score import Score, Value
from fewstep.evaluation.verdict import Verdict

Kind = Literal["real", "codec", "teacher", "student", "control"]


@dataclass(frozen=True)
class Model:
    """A source of clips with its scores: real clips, a codec, a model with its sampler. `kind` decides colour and place."""

    kind: Kind  # real and codec: references; teacher: joined to a line by `line`; student: a point of its own
    name: str  # unique, short: "teacher, 35 steps"
    num_calls: int | None = None  # network calls for one clip; guidance doubles them unless it is distilled
    guidance: float | None = None  # w of uncond + w (cond - uncond); 1 is off
    scores: Mapping[str, Value] = field(default_factory=dict[str, Value])
    clips_per_s: Value | None = None
    line: str = ""  # in the plot of quality against calls, models of one line are joined: "teacher, UniPC"
    note: str = ""  # sampler, grid, weights: shown in the table
    is_featured: bool = True  # in the cards and bars; the others are in the table and the plot only


@dataclass(frozen=True)
class Film:
    """One clip of a gallery."""

    name: str
    frames: NDArray[np.uint8]  # T H W 3
    kind: Kind
    about: str = ""  # under the name: "70 calls"


@dataclass(frozen=True)
class Row:
    """Clips of one prompt, from the same noise where they were generated."""

    prompt: str
    films: Sequence[Film]
    difference: float | None = None  # of the models of the row, in grey values: the page can sort by it


@dataclass(frozen=True)
class Gallery:
    """Rows that play together, in step."""

    title: str
    rows: Sequence[Row]
    fps: float
    about: str = ""


@dataclass(frozen=True)
class Chart:
    """A line plot: losses, health, anything over anything. `curves.curves_of` reads them from a run."""

    title: str
    series: Sequence[Series]
    x_label: str = "iteration"
    y_label: str = ""
    about: str = ""
    log_x: bool = False
    log_y: bool = False
    rules: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Gate:
    """A bound set beforehand and the number that must keep it. Whether it is met is computed from the two."""

    name: str
    value: float
    bound: float
    better: Literal["lower", "higher"]
    spread: float = math.nan
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """False for nan: what was not measured is not met."""
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


@dataclass(frozen=True)
class Stage:
    """A command that was run, as a reader would type it, and how long it took."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything on the page, top to bottom. Empty parts are left out."""

    title: str
    summary: str = ""  # two sentences: what was done, how good it is
    verdicts: Sequence[Sequence[Verdict]] = ()  # each against one other model
    warnings: Sequence[str] = ()  # sentences beside the verdicts
    galleries: Sequence[Gallery] = ()
    gates: Sequence[Gate] = ()
    models: Sequence[Model] = ()
    scores: Sequence[Score] = ()
    spread: str = "the standard error, or the deviation between evaluation seeds if that is larger"
    quality: str = "frechet"  # the score that is plotted against the number of network calls
    charts: Sequence[Chart] = ()
    stages: Sequence[Stage] = ()
    time_is: str = "start to end"  # what all stages together are
    limits: Sequence[str] = ()  # paragraphs
    environment: Mapping[str, str] = field(default_factory=dict[str, str])  # {"device": ..., "torch": ...}

    def problems(self) -> list[str]:
        """Everything that would make the page wrong or unclear, collected."""
        out = [f"two {what} are called {name!r}" for what, names in self._names() for name in _repeated(names)]
        legend = {score.name for score in self.scores}
        scores = {name for model in self.models for name in model.scores}
        if unknown := sorted(scores - legend):
            out.append(f"scores without an explanation: {', '.join(unknown)}; add a Score for each to Report.scores")
        for gallery in self.galleries:
            if not gallery.fps > 0:
                out.append(f"gallery {gallery.title!r}: fps must be above 0, not {gallery.fps}")
            for row in gallery.rows:
                for film in row.films:
                    frames = film.frames
                    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
                        form = f"{frames.dtype} {frames.shape}"
                        out.append(f"gallery {gallery.title!r}, {film.name!r} of {row.prompt!r}: not uint8 T H W 3 but {form}")
        for model in self.models:
            if model.num_calls is not None and model.num_calls < 1:
                out.append(f"{model.name!r} has {model.num_calls} network calls; None says that it makes none")
        return out

    def _names(self) -> Iterable[tuple[str, list[str]]]:
        yield "models", [model.name for model in self.models]
        yield "scores", [score.name for score in self.scores]
        yield "gates", [gate.name for gate in self.gates]


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, num in Counter(names).items() if num > 1]
