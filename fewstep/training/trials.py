"""A sweep: one run for every combination of the values given, or for those that a sampler asks for; each a normal run folder.

    fewstep sweep experiment=analytic_kd optim.lr=1e-3,2e-3 trainer.batch_size=256,512
    OUTPUT_ROOT/analytic/basic/analytic_kd.lr=1e-3,batch_size=256/     and so on: what `fewstep train` writes
    OUTPUT_ROOT/analytic/basic/analytic_kd.sweep/                      trials.json, trials.svg

    fewstep sweep experiment=analytic_kd optim.lr=1e-4..1e-2 --trials 20
    OUTPUT_ROOT/analytic/basic/analytic_kd.trial000/                   the same, and trial.json: the settings of this trial

The run folders are the only state. A trial that has finished is not run again, one that was interrupted goes on with its
settings, and one that another process trains is left to it. So a sweep resumes by the same command, and several machines with
one file system share a sweep by all running it. A grid needs nothing else, which is why it is not Optuna's. A sampler of Optuna
(search.py) is given the run folders anew for every question: its own storage would be a second record of what they know. The
folder of a new trial appears whole, with its trial.json, by one renaming, which fails for all processes but the first.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fewstep.config import Command, ConfigError, build_recipe, compose, dump
from fewstep.errors import UserError
from fewstep.files import Locked, WriteError, lock, whole_folder, write_json, write_text
from fewstep.training import search
from fewstep.training.records import CONFIG, DIVERGED, SUMMARY, RunRecord, best_first, flat, number, score_of, table
from fewstep.training.search import Past, Range, Request, Values
from fewstep.untrusted.text import read_json

TRIAL = "trial.json"
_LONGEST = 120  # characters of a folder's name that hold a trial's settings; beyond, a hash does
_OTHER = "give this sweep a job.name of its own"


@dataclass(frozen=True)
class Trial:
    """One combination: its settings among those that vary, and its run folder."""

    settings: tuple[tuple[str, str], ...]
    folder: Path
    job_name: str
    number: int | None = None  # of one that a sampler asked for
    problem: str = ""  # why its settings cannot be trained

    @property
    def is_over(self) -> bool:
        """Whether the same command would not train it. A diverged trial of a grid is tried again: other settings may differ."""
        if self.problem:
            return True
        ends = ("finished",) if self.number is None else ("finished", "diverged")
        has_ended = any((self.folder / name).is_file() for name in (SUMMARY, DIVERGED))
        return has_ended and RunRecord.read(self.folder).state in ends

    @property
    def is_locked(self) -> bool:
        """Whether a process trains it at this moment."""
        if not self.folder.is_dir():
            return False
        try:
            with lock(self.folder / ".lock"):
                return False
        except Locked:
            return True

    def record(self) -> RunRecord | None:
        """Of its run; None: it has not begun."""
        if self.problem:
            return RunRecord(self.folder, {}, {}, 0, "refused")
        return RunRecord.read(self.folder) if (self.folder / CONFIG).is_file() else None

    def failure(self, record: RunRecord, score: str | None) -> str:
        """Why it counts as failed; "": it does not."""
        if record.state == "diverged":
            return str(read_json(self.folder / DIVERGED, "").get("reason"))
        if record.state == "finished" and score is not None and not math.isfinite(record.values.get(score, math.nan)):
            return f"{score} is {record.values.get(score, 'not in its summary.json')}"
        return self.problem


@dataclass(frozen=True)
class _Stored:
    """trial.json."""

    settings: dict[str, str]
    command: list[str]  # what does not vary
    search: dict[str, str]  # what the sampler was asked for
    problem: str = ""


@dataclass(frozen=True)
class Sweep:
    """The run some of whose settings vary: over a grid, or as a sampler asks."""

    base: Command  # without the settings that vary
    run_type: type[Any]
    name: str  # job.name
    folder: Path  # of the tables
    stages: tuple[str, ...]  # recipes from whose finished runs the trials start
    space: Mapping[str, Values]
    grid: tuple[Trial, ...] = ()
    request: Request | None = None  # None: a grid

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.space)

    @property
    def num(self) -> int:
        return len(self.grid) if self.request is None else self.request.num

    def command(self, trial: Trial) -> tuple[str, ...]:
        """`fewstep train` with the settings of one trial."""
        settings = (f"{key}={value}" for key, value in trial.settings)
        return ("fewstep", "train", *_words(self.base), *settings, f"job.name={trial.job_name}")

    def trials(self) -> tuple[Trial, ...]:
        """Those of the grid, or those that a sampler has asked for so far. Raises ConfigError if these are of another sweep."""
        if self.request is None:
            return self.grid
        return tuple(self._trial(number, stored) for number, stored in sorted(self._stored().items()))

    def changes(self) -> list[str]:
        """What the sampler was asked for otherwise when the newest trial was drawn."""
        stored, now = self._stored(), self._about()
        before = stored[max(stored)].search if stored else now
        return [f"{key}: {change}" for key, change in _differing(before, now).items()]

    def score(self, records: Sequence[RunRecord]) -> str | None:
        """The score that decides, by those of finished runs; None: no run has finished."""
        assert self.request is not None
        return score_of([record for record in records if record.state == "finished"], self.request.by)

    def ask(self) -> Trial | None:
        """The next trial as a sampler asks for it, of which nothing is written yet; None: all combinations have been tried."""
        assert self.request is not None
        trials = self.trials()
        records = {trial.number: record for trial in trials if (record := trial.record()) is not None}
        score = self.score(list(records.values()))
        past: list[Past] = []
        for trial in trials:
            record = records.get(trial.number)
            is_over = record is not None and record.state in ("finished", "diverged", "refused")
            has_score = record is not None and record.state == "finished" and not trial.failure(record, score)
            value = record.values[str(score)] if record is not None and has_score else None
            past.append(Past(cast("int", trial.number), dict(trial.settings), is_over, value))
        drawn = {trial.number for trial in trials}
        free = next(number for number in itertools.count() if number not in drawn)
        settings = search.ask(self.space, self.request, past, free)
        if settings is None:
            return None
        return self._trial(free, _Stored(settings, _words(self.base), self._about(), self._problem(settings)))

    def claim(self, trial: Trial) -> None:
        """Makes the folder of a new trial, unless another process has made one with its number in the meantime."""
        stored = _Stored(dict(trial.settings), _words(self.base), self._about(), trial.problem)
        try:
            with whole_folder(trial.folder) as partial:
                write_json(partial / TRIAL, vars(stored))
        except Locked:  # it is at it at this moment
            return
        except WriteError:
            if not (trial.folder / TRIAL).is_file():
                raise

    def _trial(self, number: int, stored: _Stored) -> Trial:
        name = f"{self.name}.trial{number:03d}"
        settings = tuple((key, stored.settings[key]) for key in self.space)
        return Trial(settings, self._folder_of(number), name, number, stored.problem)

    def _folder_of(self, number: int) -> Path:
        return self.folder.with_name(f"{self.folder.name.removesuffix('.sweep')}.trial{number:03d}")

    def _stored(self) -> dict[int, _Stored]:
        """By number. Raises ConfigError if other settings than those of the space vary, or others are not as they were."""
        start = self._folder_of(0).name.removesuffix("000")
        names = [path.name.removeprefix(start) for path in self.folder.parent.glob("*") if path.name.startswith(start)]
        numbers = [int(name) for name in names if re.fullmatch(r"\d{3,9}", name)]
        stored = {
            place: read_json(self._folder_of(place) / TRIAL, "Remove its folder", _Stored)
            for place in numbers
            if (self._folder_of(place) / TRIAL).is_file()
        }
        for place, one in stored.items():
            if one.settings.keys() != self.space.keys():
                varied = f"{', '.join(one.settings)} vary in {self._folder_of(place)}, here {', '.join(self.space)}"
                raise ConfigError([("sweep", f"{varied}: {_OTHER}")])
            why = f"scores would not be comparable with that of {self._folder_of(place)}: {_OTHER}"
            changes = _differing(_as_settings(one.command), _as_settings(_words(self.base)))
            if changes:
                raise ConfigError([(key, f"{change}: {why}") for key, change in changes.items()])
        return stored

    def _about(self) -> dict[str, str]:
        assert self.request is not None
        values = {key: str(value) if isinstance(value, Range) else ",".join(value) for key, value in self.space.items()}
        by = f"{self.request.by or 'the first of the previews'}, the {'highest' if self.request.highest else 'lowest'}"
        return values | {"--sampler": self.request.sampler, "--seed": str(self.request.seed), "--by": by}

    def _problem(self, settings: Mapping[str, str]) -> str:
        try:
            compose(_with(self.base, settings), self.run_type)
        except ConfigError as error:
            return str(error)
        return ""


def space_of(command: Command, request: Request | None = None) -> dict[str, Values]:
    """The settings of a command that have several values, or a range. Raises ConfigError."""
    space: dict[str, Values] = {}
    problems: list[tuple[str, str]] = []
    for key, _, text in (word.partition("=") for word in command.overrides):
        space.pop(key, None)  # the last one counts
        values = split_values(text)
        try:
            values = Range.read(text) or values
        except UserError as error:
            problems.append((key, str(error)))
        if isinstance(values, Range):
            space[key] = values
            if request is None:
                problems.append((key, f"{text} is a range: say how many trials a sampler is asked for, with --trials 20"))
        elif len(values) > 1:
            space[key] = tuple(values)
            if len(set(values)) < len(values):
                problems.append((key, f"has a value twice: {text}"))
    if not space and not problems:
        problems.append(("sweep", "no setting has several values: give some, separated by commas, as optim.lr=1e-5,5e-6"))
    if "job.name" in space:
        problems.append(("job.name", "has several values, but names the sweep; each trial has a name of its own"))
    if problems:
        raise ConfigError(problems)
    return space


def plan_sweep(command: Command, run_type: type[Any], request: Request | None = None) -> Sweep:
    """The trials of a command some of whose settings have several values. Raises ConfigError with every problem.

    run_type: `Run`, which imports torch. A value that is a list itself stands in brackets. request: a sampler asks for trials,
    and ranges are allowed; None: every combination is a trial, and all are valid, or none is run.
    """
    space = space_of(command, request)
    base = replace(command, overrides=tuple(word for word in command.overrides if word.partition("=")[0] not in space))
    if request is not None:
        return _plan_search(base, run_type, space, request)
    labels = _labels(list(space))
    grid: list[Trial] = []
    problems: dict[tuple[str, str], None] = {}
    run: Any = None
    for values in itertools.product(*cast("dict[str, tuple[str, ...]]", space).values()):
        settings = tuple(zip(space, values, strict=True))
        try:
            run = compose(_with(base, dict(settings)), run_type)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        name = f"{run.job.name}.{_name_of([(labels[key], value) for key, value in settings])}"
        grid.append(Trial(settings, replace(run.job, name=name).folder(), name))
    if problems:
        raise ConfigError(list(problems))
    return Sweep(base, run_type, run.job.name, _tables(run), run.job.after, space, tuple(grid))


def _plan_search(base: Command, run_type: type[Any], space: Mapping[str, Values], request: Request) -> Sweep:
    """Raises ConfigError if no combination is valid."""
    problems: list[tuple[str, str]] = []
    run: Any = None
    for settings in search.candidates(space):
        try:
            run = compose(_with(base, settings), run_type)
            break
        except ConfigError as error:
            if problems == list(error.problems):  # whatever the values are
                break
            problems = list(error.problems)
    if run is None:
        raise ConfigError(problems)
    if request.by is None and not _previews_measure(run):
        raise UserError("--by: which score decides? No preview measures one here; a value of metrics.jsonl does: --by loss/kd")
    written = dict(flat(dump(run)))

    def of_type(key: str, values: Values) -> Values:  # whole numbers where the setting is one, however the ends are written
        if not isinstance(values, Range) or key not in written:
            return values
        is_whole = re.fullmatch(r"-?\d+", written[key]) is not None
        low, high = (math.ceil(values.low), math.floor(values.high)) if is_whole else (values.low, values.high)
        return Range(low, high, is_whole)

    space = {key: of_type(key, values) for key, values in space.items()}
    return Sweep(base, run_type, run.job.name, _tables(run), run.job.after, space, request=request)


def _previews_measure(run: Any) -> bool:
    """Whether previews measure a score of which the lowest is best: those of clips with a teacher or the noise of each clip."""
    from fewstep.training.preview_clips import ClipsPreview

    if isinstance(run.preview, ClipsPreview):
        return "teacher" in run.method.roles or "noise" in run.data.fields
    return run.preview is not None


def _tables(run: Any) -> Path:
    return replace(run.job, name=f"{run.job.name}.sweep").folder()


class Queue:
    """The trials that are left, for several workers at once; of each, `commands` are what it runs.

    One that another process trains comes last: when nothing else is left, its end is waited for, and it goes on here if it was
    not finished there. A trial is given out once.
    """

    def __init__(self, sweep: Sweep):
        self.error: Exception | None = None  # that ended the questions
        self._sweep, self._guard = sweep, threading.Lock()
        self._done: set[Path] = set()  # over, or given out here
        self._is_exhausted = sweep.request is None

    def commands(self, environment: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
        """The next trial's command, again and again; an empty one where others are to be waited for.

        environment: NAME=VALUE of this worker. Its trial is held until the next command is asked for.
        """
        while self.error is None:
            with ExitStack() as held:
                try:
                    with self._guard:
                        free, is_done = self._next(held)
                except Exception as error:  # of a thread, whose errors nobody hears
                    self.error = error
                    return
                if free is not None:
                    yield (*environment, *self._sweep.command(free))
                elif is_done:
                    return
            if free is None:
                yield ()

    def _next(self, held: ExitStack) -> tuple[Trial | None, bool]:
        """A trial that is held by this process from now on, an interrupted one first; and whether there is nothing left."""
        while True:
            trials = self._sweep.trials()
            rest = [trial for trial in trials if trial.folder not in self._done]
            self._done |= {trial.folder for trial in rest if trial.is_over}
            rest = [trial for trial in rest if trial.folder not in self._done]
            for trial in rest:
                if _holds(trial, held):
                    self._done.add(trial.folder)
                    return trial, False
            if self._is_exhausted or len(trials) >= self._sweep.num:
                return None, not rest
            new = self._sweep.ask()
            if new is None:
                self._is_exhausted = True
            elif cast("int", new.number) < self._sweep.num:  # else others have drawn the last ones since `trials` was read
                self._sweep.claim(new)


def first(stage: str) -> Iterator[tuple[str, ...]]:
    """The command that trains a stage, unless it is finished; empty ones while another process trains it."""
    trial = Trial((), build_recipe(stage).job.folder(), stage)
    while not trial.is_over:
        with ExitStack() as held:
            if _holds(trial, held):
                yield ("fewstep", "train", f"experiment={stage}")
                return
        yield ()


def _holds(trial: Trial, held: ExitStack) -> bool:
    """Whether this process alone may train it until `held` is closed."""
    try:
        held.enter_context(lock(trial.folder / ".lock.sweep"))
    except Locked:
        return False
    if trial.is_locked or trial.is_over:
        held.close()
        return False
    return True


def split_values(text: str) -> list[str]:
    """The values of `1,2,[3,4]`: separated by commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values if all(values) else [text]


def show(sweep: Sweep, score: str | None, highest: bool = False) -> str:
    """The table of trials, the best first; also written, with a plot, to the folder of the sweep."""
    begun = {record.folder: (trial, record) for trial in sweep.trials() if (record := trial.record()) is not None}
    records = [record for _, record in begun.values()]
    score = score_of(records, score)
    reasons = (
        {} if sweep.request is None else {folder: trial.failure(record, score) for folder, (trial, record) in begun.items()}
    )
    records = [replace(record, values={}) if reasons.get(record.folder) else record for record in records]  # not in the order
    ordered = best_first(records, score, highest) if score else records
    rows = [("trial", "state", "step", score or "score", *sweep.keys)]
    described: list[dict[str, Any]] = []
    failures: list[str] = []
    for record in ordered:
        trial = begun[record.folder][0]
        cells = [_cell(value, sweep.space[key]) for key, value in trial.settings]
        rows.append((record.folder.name, record.state, str(record.step), number(record.values.get(score or "")), *cells))
        described.append(
            {
                "folder": str(record.folder),
                "state": record.state,
                "settings": dict(trial.settings),
                "values": dict(begun[record.folder][1].values),
            }
        )
        if reasons.get(record.folder):
            described[-1]["failure"] = reasons[record.folder]
            failures.append(f"{record.folder.name} counts as failed: {reasons[record.folder]}")
    missing = sweep.num - len(records)
    write_json(sweep.folder / "trials.json", {"by": score, "trials": described})
    picture = _plot(sweep, [(dict(begun[record.folder][0].settings), record) for record in ordered], score)
    if picture:
        write_text(sweep.folder / "trials.svg", picture)
    return "\n".join([table(rows), *failures, *([f"{missing} trials have not begun"] if missing > 0 else [])])


def _cell(text: str, values: Values) -> str:
    return number(float(text)) if isinstance(values, Range) and not values.is_whole else text


def _plot(sweep: Sweep, trials: Sequence[tuple[dict[str, str], RunRecord]], score: str | None) -> str:
    """The score over the first setting with numbers for values, a line for each combination of the others; "" without one.

    Trials of a sampler are points.
    """
    rows = [(settings, record.values[score]) for settings, record in trials if score is not None and score in record.values]
    axis = next((key for key in sweep.keys if all(_is_number(row[key]) for row, _ in rows)), None)
    if not rows or axis is None:
        return ""
    from fewstep.evaluation.plot import Series, lines

    groups: dict[str, list[tuple[float, float]]] = {}
    labels = _labels(list(sweep.keys))
    for row, value in rows:
        name = ", ".join(f"{labels[key]}={text}" for key, text in row.items() if key != axis and sweep.request is None)
        groups.setdefault(name or str(score), []).append((float(row[axis]), value))
    mark = "line" if sweep.request is None else "points"
    series = [Series(name, [x for x, _ in points], [y for _, y in points], mark=mark) for name, points in groups.items()]
    xs, ys = [x for points in groups.values() for x, _ in points], [y for points in groups.values() for _, y in points]
    far_x, far_y = (min(values) > 0 and max(values) > 5 * min(values) for values in (xs, ys))
    return lines(
        series, title=sweep.folder.name, x_label=axis, y_label=score or "", log_x=far_x, log_y=far_y, background="white"
    )


def _with(base: Command, settings: Mapping[str, str]) -> Command:
    return replace(base, overrides=(*base.overrides, *(f"{key}={value}" for key, value in settings.items())))


def _words(base: Command) -> list[str]:
    experiment = [] if base.experiment is None else [f"experiment={base.experiment}"]
    configs = [f"--config={file}" for file in base.files]
    return [*configs, *experiment, *(word for word in base.overrides if not word.startswith("job.name="))]


def _as_settings(words: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    pairs = {key: (before.get(key, "(not given)"), now.get(key, "(not given)")) for key in {**before, **now}}
    return {key: f"{old} -> {new}" for key, (old, new) in pairs.items() if old != new}


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _name_of(settings: Sequence[tuple[str, str]]) -> str:
    """A part of a folder's name that says the settings; other characters than plain ones, and great length, become a hash."""
    text = ",".join(f"{key}={value}" for key, value in settings)
    plain = re.sub(r"[^\w.,=+-]", "", text)
    if plain == text and len(text) <= _LONGEST:
        return text
    return f"{plain[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _is_number(text: str) -> bool:
    try:
        return cast("float", float(text)) == float(text)
    except ValueError:
        return False
