"""A sweep: one run for every combination of the values given, each a normal run folder beside the others.

    fewstep sweep experiment=analytic_kd optim.lr=1e-3,2e-3 trainer.batch_size=256,512
    OUTPUT_ROOT/analytic/basic/analytic_kd.lr=1e-3,batch_size=256/     and so on: what `fewstep train` writes
    OUTPUT_ROOT/analytic/basic/analytic_kd.sweep/                      trials.json, trials.svg

The run folders are the only state. A trial that has finished is not run again, one that was interrupted goes on, and one that
another process trains is left to it. So a sweep resumes by the same command, and several machines with one file system share a
sweep by all running it. No database is needed for that, which is why the grid is not Optuna's: its storage would be a second
record of what the run folders know. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fewstep.config import Command, ConfigError, compose
from fewstep.files import Locked, lock, write_json, write_text
from fewstep.training.records import SUMMARY, RunRecord, best_first, number, score_of, table

_LONGEST = 120  # characters of a folder's name that hold a trial's settings; beyond, a hash does


@dataclass(frozen=True)
class Trial:
    """One combination: its settings among those that vary, and its run folder."""

    settings: tuple[tuple[str, str], ...]
    folder: Path
    job_name: str
    max_iter: int

    @property
    def is_finished(self) -> bool:
        return RunRecord.read(self.folder).state == "finished" if (self.folder / SUMMARY).is_file() else False

    @property
    def is_locked(self) -> bool:
        """Whether another process trains it at this moment."""
        if not self.folder.is_dir():
            return False
        try:
            with lock(self.folder / ".lock"):
                return False
        except Locked:
            return True


@dataclass(frozen=True)
class Sweep:
    """The run whose settings vary, and its trials, in the order of the values given."""

    base: Command  # without the settings that vary
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]
    folder: Path  # of the tables
    stages: tuple[str, ...]  # recipes from whose finished runs the trials start

    def command(self, trial: Trial) -> tuple[str, ...]:
        """`fewstep train` with the settings of one trial."""
        return ("fewstep", "train", *_words(self.base, trial), f"job.name={trial.job_name}")

    def results(self) -> list[RunRecord]:
        """The runs of the trials that have begun."""
        return [RunRecord.read(trial.folder) for trial in self.trials if (trial.folder / "config.yaml").is_file()]


def plan_sweep(command: Command, run_type: type[Any]) -> Sweep:
    """The trials of a command some of whose settings have several values. Raises ConfigError with every problem of each.

    run_type: `Run`, which imports torch. A value that is a list itself stands in brackets.
    """
    axes = {key: split_values(value) for key, _, value in (word.partition("=") for word in command.overrides)}
    varied = {key: values for key, values in axes.items() if len(values) > 1}
    if not varied:
        raise ConfigError([("sweep", "no setting has several values: give some, separated by commas, as optim.lr=1e-5,5e-6")])
    if "job.name" in varied:
        raise ConfigError([("job.name", "has several values, but names the sweep; each trial has a name of its own")])
    repeated = [key for key, values in varied.items() if len(set(values)) < len(values)]
    if repeated:
        raise ConfigError([(key, f"has a value twice: {','.join(varied[key])}") for key in repeated])
    base = replace(command, overrides=tuple(word for word in command.overrides if word.partition("=")[0] not in varied))
    labels = _labels(list(varied))
    trials: list[Trial] = []
    problems: dict[tuple[str, str], None] = {}
    run: Any = None
    for values in itertools.product(*varied.values()):
        settings = tuple(zip(varied, values, strict=True))
        one = replace(base, overrides=(*base.overrides, *(f"{key}={value}" for key, value in settings)))
        try:
            run = compose(one, run_type)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        name = f"{run.job.name}.{_name_of([(labels[key], value) for key, value in settings])}"
        trials.append(Trial(settings, replace(run.job, name=name).folder(), name, run.trainer.max_iter))
    if problems:
        raise ConfigError(list(problems))
    folder = replace(run.job, name=f"{run.job.name}.sweep").folder()
    return Sweep(base, tuple(varied), tuple(trials), folder, run.job.after)


class Queue:
    """The trials that are left, for several workers at once; of each, `commands` are what it runs.

    One that another process trains comes last: when nothing else is left, its end is waited for, and it goes on here if it was
    not finished there.
    """

    def __init__(self, sweep: Sweep):
        self._sweep, self._rest, self._guard = sweep, list(sweep.trials), threading.Lock()

    def commands(self, environment: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
        """The next trial's command, again and again. environment: NAME=VALUE of this worker."""
        while True:
            with self._guard:
                self._rest = [trial for trial in self._rest if not trial.is_finished]
                free = next((trial for trial in self._rest if not trial.is_locked), None)
                if free is not None:
                    self._rest.remove(free)
                is_done = not self._rest
            if free is not None:
                yield (*environment, *self._sweep.command(free))
            elif is_done:
                return
            else:
                time.sleep(1.0)


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
    records = sweep.results()
    by_folder = {trial.folder: trial for trial in sweep.trials}
    score = score_of(records, score)
    ordered = best_first(records, score, highest) if score else records
    rows = [("trial", "state", "step", score or "score", *(f"{key}" for key in sweep.keys))]
    for record in ordered:
        settings = dict(by_folder[record.folder].settings)
        rows.append(
            (record.folder.name, record.state, str(record.step), number(record.values.get(score or "")), *settings.values())
        )
    missing = len(sweep.trials) - len(records)
    described: list[dict[str, Any]] = [
        {
            "folder": str(record.folder),
            "state": record.state,
            "settings": dict(by_folder[record.folder].settings),
            "values": dict(record.values),
        }
        for record in ordered
    ]
    write_json(sweep.folder / "trials.json", {"by": score, "trials": described})
    picture = _plot(sweep, ordered, score)
    if picture:
        write_text(sweep.folder / "trials.svg", picture)
    return table(rows) + (f"\n{missing} trials have not begun" if missing else "")


def _plot(sweep: Sweep, records: Sequence[RunRecord], score: str | None) -> str:
    """The score over the first setting with numbers for values, a line for each combination of the others; "" without one."""
    settings = {trial.folder: dict(trial.settings) for trial in sweep.trials}
    rows = [
        (settings[record.folder], record.values[score]) for record in records if score is not None and score in record.values
    ]
    axis = next((key for key in sweep.keys if all(_is_number(row[key]) for row, _ in rows)), None)
    if not rows or axis is None:
        return ""
    from fewstep.evaluation.plot import Series, lines

    groups: dict[str, list[tuple[float, float]]] = {}
    labels = _labels(list(sweep.keys))
    for row, value in rows:
        name = ", ".join(f"{labels[key]}={text}" for key, text in row.items() if key != axis)
        groups.setdefault(name or str(score), []).append((float(row[axis]), value))
    series = [Series(name, [x for x, _ in points], [y for _, y in points]) for name, points in groups.items()]
    xs, ys = [x for points in groups.values() for x, _ in points], [y for points in groups.values() for _, y in points]
    far_x, far_y = (min(values) > 0 and max(values) > 5 * min(values) for values in (xs, ys))
    return lines(
        series, title=sweep.folder.name, x_label=axis, y_label=score or "", log_x=far_x, log_y=far_y, background="white"
    )


def _words(base: Command, trial: Trial) -> list[str]:
    experiment = [] if base.experiment is None else [f"experiment={base.experiment}"]
    configs = [f"--config={file}" for file in base.files]
    overrides = [word for word in base.overrides if not word.startswith("job.name=")]
    return [*configs, *experiment, *overrides, *(f"{key}={value}" for key, value in trial.settings)]


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
