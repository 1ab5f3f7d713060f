"""The plots of a report: quality against network calls from the scores, losses and health from a run's metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fewstep.config.text import read_yaml_mapping
from fewstep.evaluation.plot import PALETTE, Series, lines
from fewstep.evaluation.report.contents import Chart, Kind, Model, Value
from fewstep.untrusted.text import fault_of, read_json_lines, read_text

_NUM_POINTS = 120  # of a curve; what was logged more often is binned
_LOSS, _HEALTH = "loss/", "health/"
_GREY = "#8A8A8A"
_COLOURS: Mapping[Kind, Sequence[str]] = {
    "real": (_GREY,),
    "codec": (_GREY,),
    "control": (_GREY,),
    "teacher": (PALETTE[0], PALETTE[5], PALETTE[6], "#5E9BD1"),
    "student": (PALETTE[1], PALETTE[2], PALETTE[3], PALETTE[4]),
}


def colours_of(models: Sequence[Model]) -> dict[str, str]:
    """One colour for each model: grey for references, blues for teachers, warm and green ones for students.

    Teachers of one line share its colour.
    """
    out: dict[str, str] = {}
    by_kind: dict[Kind, list[str]] = {}
    for model in models:
        group = model.line or (model.name if model.kind != "teacher" else "")
        groups = by_kind.setdefault(model.kind, [])
        if group not in groups:
            groups.append(group)
        choice = _COLOURS[model.kind]
        out[model.name] = choice[groups.index(group) % len(choice)]
    return out


def quality_plot(models: Sequence[Model], score: str, title: str) -> tuple[str, str, list[str]]:
    """`score` against the number of network calls, as SVG for a wide and for a narrow page, and what the plot leaves out.

    Models of one line are joined, others are points with whiskers, models without calls are level lines. Log axes as far as
    the numbers allow.
    """
    at = [(model, model.scores[score]) for model in models if score in model.scores and _is_finite(model.scores[score])]
    placed = [(model, one, model.num_calls) for model, one in at if model.num_calls is not None]
    notes = [
        f"{m.name}: not measured." for m in models if m.num_calls is not None and m.name not in {p[0].name for p in placed}
    ]
    if not placed:
        return "", "", notes
    values = [one.value for _, one, _ in placed]
    is_log = min(values) > 0 and max(values) > 12 * min(values)
    calls = sorted({num for *_, num in placed})
    colours = colours_of(models)
    series: list[Series] = []
    groups: dict[str, list[tuple[Model, Value, int]]] = {}
    for model, one, num in placed:
        groups.setdefault(model.line or model.name, []).append((model, one, num))
    for name, unordered in groups.items():
        members = sorted(unordered, key=lambda member: member[2])
        ys = np.array([one.value for _, one, _ in members])
        spreads = np.nan_to_num([one.spread for _, one, _ in members])
        # A whisker to zero or below has no end on a log axis: it is cut, at half the smallest number of the plot.
        low = np.maximum(ys - spreads, min(values) / 2) if is_log else ys - spreads
        first = members[0][0]
        series.append(
            Series(
                name,
                [num for *_, num in members],
                ys,
                low,
                ys + spreads,
                mark="line" if len(members) > 1 else "points",
                colour=colours[first.name],
            )
        )
    level = {model.name: one.value for model, one in at if model.num_calls is None}
    for name, value in level.items():
        if is_log and value <= 0:
            notes.append(f"{name}: {value:.2g}, below every log axis.")
    rules = {name: value for name, value in level.items() if value > 0 or not is_log}
    far = max(calls) > 6 * min(calls)

    def figure(labels: Literal["direct", "legend"], width: int, height: int) -> str:
        return lines(
            series,
            x_label="network calls for one clip",
            y_label=title,
            log_x=far,
            log_y=is_log,
            x_ticks=calls,
            rules=rules,
            labels=labels,
            width=width,
            height=height,
        )

    return figure("direct", 1040, 440), figure("legend", 350, 360 + 22 * len(series)), notes


def curves_of(run: Path | str, title: str = "") -> tuple[Chart, ...]:
    """Losses and health monitors of a run folder, as charts: none where nothing was logged.

    Curves of more than 120 points are shown as means of equal stretches with their 10 % to 90 % range. A monitor's limit is
    read from the run's config.yaml. A line that a killed process left unfinished is skipped.
    """
    run = Path(run)
    columns = _columns(run / "metrics.jsonl")
    limits = _limits(run / "config.yaml")
    name = title or run.name
    losses = {key: column for key, column in columns.items() if key.startswith(_LOSS)}
    charts: list[Chart] = []
    if losses:
        is_log = all((ys > 0).all() for _, ys in losses.values())
        series = tuple(_binned(key.removeprefix(_LOSS), *column) for key, column in losses.items())
        ys = np.concatenate([column[1] for column in losses.values()])
        charts.append(Chart(f"{name}: losses", series, log_y=is_log and float(ys.max()) > 10 * float(ys.min())))
    for key, column in columns.items():
        if key.startswith(_HEALTH):
            monitor = key.removeprefix(_HEALTH)
            rules = {f"rings at {limits[monitor]:g}": limits[monitor]} if monitor in limits else {}
            charts.append(Chart(f"{name}: {monitor.replace('_', ' ')}", (_binned(monitor, *column),), rules=rules))
    return tuple(charts)


def chart_plot(chart: Chart) -> str:
    """One chart as SVG, sized for a column of a grid; it can be read at 320 px."""
    return lines(
        chart.series,
        x_label=chart.x_label,
        y_label=chart.y_label,
        log_x=chart.log_x,
        log_y=chart.log_y,
        rules=chart.rules,
        labels="legend",
        width=360,
        height=250,
    )


def _is_finite(one: Value) -> bool:
    return math.isfinite(one.value)


def _columns(path: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Steps and values of each name, as far as they are finite numbers."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for record in read_json_lines(path):
        step: object = record.get("step")
        if not _is_number(step):
            continue
        for name, value in record.items():
            if name != "step" and _is_number(value):
                xs, ys = columns.setdefault(name, ([], []))
                xs.append(float(step))
                ys.append(float(value))
    return {name: (np.array(xs), np.array(ys)) for name, (xs, ys) in columns.items()}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and -1e300 < value < 1e300  # neither NaN nor a number that is no float


def _limits(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with fault_of(path, "It is written anew when the run goes on"):
        health = read_yaml_mapping(read_text(path), str(path)).get("health") or {}
        return {name: float(alarm["limit"]) for name, alarm in health.items() if isinstance(alarm, dict) and "limit" in alarm}


def _binned(name: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> Series:
    if len(x) <= _NUM_POINTS:
        return Series(name, x, y)
    bins = np.array_split(np.argsort(x, kind="stable"), _NUM_POINTS)
    low, high = (np.array([np.quantile(y[rows], q) for rows in bins]) for q in (0.1, 0.9))
    middle = np.array([y[rows].mean() for rows in bins])
    return Series(name, np.array([x[rows].mean() for rows in bins]), middle, np.minimum(low, middle), np.maximum(high, middle))
