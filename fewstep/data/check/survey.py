"""Reads a data set once, from end to end, and lists everything that is wrong with it before a GPU is paid for.

    report = survey("datasets/robots")
    report.is_trainable, report.rows(), report.problems

Every file of every sample is read by the very readers that training uses, several samples at once. A problem is an error if the
data cannot be trained on as it is, and a warning if it can but a person should look at it. look.py reads one sample,
problems.py compares them, sheet.py draws them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.config import apply_overrides
from fewstep.data.check.look import Look, Problem, Sample, files_of, look_at
from fewstep.data.check.problems import problems_of, unread
from fewstep.data.folder.dataset import Folder, layout
from fewstep.data.folder.layout import Layout
from fewstep.errors import some

Watch = Callable[[Iterable[Any], int, str], Iterable[Any]]  # shows how far a long loop is: fewstep.progress.track


@dataclass(frozen=True)
class Survey:
    root: Path
    form: str
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    facts: tuple[tuple[str, str], ...] = ()  # more rows of the table

    @property
    def is_trainable(self) -> bool:
        return bool(self.samples) and not any(problem.level == "error" for problem in self.problems)

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much), as a table of a page shows it."""
        rows = [("samples", str(len(self.samples)))]
        for folder, num in sorted(Counter(part for sample in self.samples for part in sample.parts).items()):
            rows.append((f"with {folder}", str(num)))
        rows += _spread("frames", [s.num_frames for s in self.samples])
        rows += _commonest("size (height x width)", [f"{s.size[0]} x {s.size[1]}" for s in self.samples if s.size])
        rows += _commonest("fps", [f"{s.fps:g}" for s in self.samples if s.fps])
        seconds = [s.num_frames / s.fps for s in self.samples if s.num_frames and s.fps]
        rows += _spread("seconds", seconds)
        rows += [("seconds, all", f"{sum(seconds):.1f}")] if seconds else []
        rows += _spread("motion (levels per frame)", [s.motion for s in self.samples])
        rows += _spread("words of a caption", [s.num_words for s in self.samples])
        captions = {s.caption for s in self.samples if s.caption}
        rows += [("different captions", str(len(captions)))] if captions else []
        for folder in sorted({folder for s in self.samples for folder in s.num_tokens}):
            rows += _spread(f"tokens in {folder}", [s.num_tokens.get(folder) for s in self.samples])
        for folder in sorted({folder for s in self.samples for folder in s.shapes}):
            shapes = ["x".join(map(str, s.shapes[folder])) for s in self.samples if folder in s.shapes]
            rows += _commonest(f"shape of {folder}", shapes)
        for kind, name in (("duplicates", "duplicates"), ("still", "near-static clips")):
            rows.append((name, str(sum(len(p.stems) for p in self.problems if p.kind == kind))))
        return [*rows, *self.facts]

    def plain(self) -> dict[str, Any]:
        """The same for machines: what json holds."""
        return {
            "root": str(self.root),
            "form": self.form,
            "trainable": self.is_trainable,
            "table": dict(self.rows()),
            "problems": [asdict(problem) for problem in self.problems],
            "samples": [asdict(sample) | {"num_words": sample.num_words} for sample in self.samples],
        }


def with_settings(survey: Survey, overrides: Sequence[str]) -> Survey:
    """The survey, and whether the data set opens with these settings of a run: num_frames=17, data.pairs=[noise], ..."""
    if not overrides:
        return survey
    spec = apply_overrides(Folder(str(survey.root)), [word.removeprefix("data.") for word in overrides])
    try:
        data = spec.open()
    except ValueError as error:
        wrong = [Problem("error", "settings", line) for line in str(error).splitlines()]
        return replace(survey, problems=(*wrong, *survey.problems))
    return replace(survey, facts=(("samples with these settings", str(len(data))),))


def survey(root: str | os.PathLike[str], *, num_threads: int | None = None, watch: Watch | None = None) -> Survey:
    """Reads all samples of the folder. ValueError only if it is no data set at all; what is wrong in it is a `Problem`."""
    place = Layout.open(root)
    files = files_of(place)
    stems = files.stems
    if not stems:
        empty = Problem("error", "empty", f"{place.root}: has no sample. Put clips into {layout.VIDEOS.folder}/")
        return Survey(place.root, place.form, (), (*(files.broken or (empty,)), *unread(files)))
    threads = num_threads or min(os.cpu_count() or 1, 16)
    with ThreadPoolExecutor(threads) as pool:
        looks: Iterable[Look] = pool.map(lambda stem: look_at(files, stem), stems)
        looks = list(watch(looks, len(stems), f"reading {place.root}") if watch else looks)
    samples = tuple(look.sample for look in looks)
    return Survey(place.root, place.form, samples, tuple(problems_of(files, looks)))


def _spread(name: str, values: Iterable[float | None]) -> list[tuple[str, str]]:
    there = [value for value in values if value is not None]
    if not there:
        return []
    low, mid, high = min(there), float(np.median(there)), max(there)
    text = f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}, median {mid:.4g}"
    return [(name, text)]


def _commonest(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    if not values:
        return []
    counts = Counter(values).most_common()
    return [(name, counts[0][0] if len(counts) == 1 else some([f"{value} ({num})" for value, num in counts]))]
