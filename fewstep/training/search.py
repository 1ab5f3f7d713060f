"""The settings that a sampler of Optuna asks for next, given the trials so far.

A study in memory is built anew for every question, and nothing of Optuna is stored: the run folders are the only state of a
sweep. The seed, the number of the trial and the trials before it decide what is asked for. Imports no torch, and Optuna only to
ask (0.2 s).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from random import Random
from typing import Any

from fewstep.errors import UserError

# What each sampler needs beside optuna itself.
SAMPLERS = {"tpe": (), "random": (), "qmc": ("scipy",), "cmaes": ("cmaes",), "gp": ("scipy",)}
_WITH_STATE = ("qmc", "cmaes")  # which keep something in the study whenever they are asked
_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_TRIES, _RANDOM_TRIES = 10, 100  # at a combination that no trial has had yet, by the sampler, then at random


@dataclass(frozen=True)
class Range:
    """LOW..HIGH, both included. Uniform in the logarithm where HIGH is at least ten times LOW, and LOW above 0."""

    low: float
    high: float
    is_whole: bool

    @classmethod
    def read(cls, text: str) -> Range | None:
        """None: it is no range. Of whole numbers if both ends are written as such. Raises UserError if it is empty."""
        match = _RANGE.fullmatch(text)
        if match is None:
            return None
        low, high = float(match[1]), float(match[2])
        if not low < high < math.inf:
            raise UserError(f"{text}: the second number of a range must be larger than the first")
        return cls(low, high, all(re.fullmatch(r"[+-]?\d+", end) for end in match.groups()))

    def __str__(self) -> str:
        kind = "whole" if self.is_whole else "real"
        return f"{_text(self, self.low)}..{_text(self, self.high)} ({kind}, {'log' if self.is_log else 'linear'})"

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low

    def at(self, place: float) -> str:
        """The value at a place from 0, the low end, to 1."""
        if place in (0.0, 1.0):
            return _text(self, self.high if place else self.low)
        if self.is_log:
            return _text(self, self.low * (self.high / self.low) ** place)
        return _text(self, self.low + place * (self.high - self.low))


Values = Range | tuple[str, ...]  # of a setting


@dataclass(frozen=True)
class Request:
    """How many trials, and which settings a sampler is asked for; by: the score that decides, None: the previews' first."""

    num: int
    sampler: str = "tpe"
    seed: int = 0
    by: str | None = None
    highest: bool = False

    def __post_init__(self) -> None:
        for package in ("optuna", *SAMPLERS[self.sampler]):
            if find_spec(package) is None:
                raise UserError(f"--sampler {self.sampler} needs {package}: pip install 'fewstep[sweep]'")


@dataclass(frozen=True)
class Past:
    """A trial that was asked for: its settings, and once it is over its score; None: it has failed."""

    number: int
    settings: Mapping[str, str]
    is_over: bool = False
    score: float | None = None


def candidates(space: Mapping[str, Values]) -> Iterator[dict[str, str]]:
    """Settings that show whether any are valid: the low ends of all ranges, the high ends, some in between; always the same."""
    random = Random(0)
    yield {key: _at(values, 0.0) for key, values in space.items()}
    yield {key: _at(values, 1.0) for key, values in space.items()}
    for _ in range(22):
        yield {key: _at(values, random.random()) for key, values in space.items()}


def ask(space: Mapping[str, Values], request: Request, past: Sequence[Past], number: int) -> dict[str, str] | None:
    """The settings of trial `number`; None: every combination that was asked for has been tried.

    Trials of the past with values that the space does not hold are left out. Running ones count as such: the samplers keep
    away from them where they can (TPE and GP).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it greets each study
    failed = optuna.trial.TrialState.FAIL
    study = optuna.create_study(direction="maximize" if request.highest else "minimize")
    for trial in past:
        values = {key: _value(space[key], trial.settings[key]) for key in space}
        if None in values.values():
            continue
        study.sampler = _sampler(request, trial.number)
        study.enqueue_trial(values)  # the answer to the next question, whatever the sampler says
        question = study.ask()
        if request.sampler in _WITH_STATE:
            _ = question.relative_params  # asks it all the same, which moves its state on
        _suggest(question, space)
        if trial.is_over:
            study.tell(question, trial.score, failed if trial.score is None else None)
    for attempt in range(_TRIES + _RANDOM_TRIES):
        study.sampler = _sampler(request, number, attempt)
        question = study.ask()
        settings = _suggest(question, space)
        if all(settings != trial.settings for trial in past):
            return settings
        study.tell(question, state=failed)
    return None


def _sampler(request: Request, number: int, attempt: int = 0) -> Any:  # Any: of optuna, an extra
    """With a seed for this trial: two processes that ask at once, and one that comes back, have no common state."""
    import numpy as np
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    seed = int(np.random.SeedSequence((request.seed, number, attempt)).generate_state(1)[0])
    match request.sampler if attempt < _TRIES else "random":
        case "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=True)
        case "gp":
            return samplers.GPSampler(seed=seed)
        case "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case "qmc":
            first = samplers.RandomSampler(seed=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return samplers.QMCSampler(  # one sequence for the whole sweep
                    scramble=True, seed=request.seed, independent_sampler=first, warn_independent_sampling=False
                )
        case _:
            return samplers.RandomSampler(seed=seed)


def _suggest(trial: Any, space: Mapping[str, Values]) -> dict[str, str]:  # Any: as above
    for key, values in space.items():
        if not isinstance(values, Range):
            trial.suggest_categorical(key, values)
        elif values.is_whole:
            trial.suggest_int(key, int(values.low), int(values.high), log=values.is_log)
        else:
            trial.suggest_float(key, values.low, values.high, log=values.is_log)
    return {key: _text(values, trial.params[key]) for key, values in space.items()}


def _at(values: Values, place: float) -> str:
    return values.at(place) if isinstance(values, Range) else values[min(int(place * len(values)), len(values) - 1)]


def _text(values: Values, value: Any) -> str:  # Any: as Optuna gives it
    if not isinstance(values, Range):
        return str(value)
    return str(round(value)) if values.is_whole else repr(float(value))


def _value(values: Values, text: str) -> Any:  # Any: as Optuna wants it
    """None: the range or the list does not hold it."""
    if not isinstance(values, Range):
        return text if text in values else None
    value = int(text) if values.is_whole and re.fullmatch(r"[+-]?\d+", text) else _real(text)
    is_inside = value is not None and values.low <= value <= values.high
    return value if is_inside and not (values.is_whole and isinstance(value, float)) else None


def _real(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
