"""Plots as SVG text, for reports that are one file: point clouds side by side, and lines with spreads.

Nothing is loaded to draw or to show them. Ink is `currentColor`, so a plot set into a page takes the page's colour, dark or
light; background="white" is for files of their own. Colours are those of Okabe & Ito (2008) that colour-blind
readers tell apart, the blue made lighter to stand out on black too; lines also differ in dash and are named at their ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from torch import Tensor

from fewstep.errors import UserError

Points = np.ndarray | Tensor | Sequence[Sequence[float]]  # n 2
Background = Literal["none", "white"]

PALETTE = ("#1F83CE", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "5 2 1 2 1 2", "3 2", "1 4")
_GREY = "#8A8A8A"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_SMALL, _TEXT, _TITLE = 12, 13, 16
_CHAR = 0.56  # mean width of a character in units of the font size
_DOTS_PER_PATH = 400  # dots of one path do not add up where they overlap, dots of different paths do: density shows


@dataclass(frozen=True)
class Series:
    """One line of `lines`: y over x, and a band of spread where low and high are given; or points, each with its whisker."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray | None = None
    high: Sequence[float] | np.ndarray | None = None
    mark: Literal["line", "points"] = "line"
    colour: str = ""  # "": the next of PALETTE


def scatter(
    panels: Mapping[str, Points | Mapping[str, Points]],
    *,
    title: str = "",
    behind: Mapping[str, Points] | None = None,
    limits: tuple[float, float, float, float] | None = None,
    panel_size: int = 260,
    columns: int = 4,
    background: Background = "none",
) -> str:
    """SVG text of 2-D point clouds side by side: {title: points} or {title: {name: points}}, all on the same axes.

    `behind` is drawn in grey in every panel, e.g. {"data": x}. limits are (x low, x high, y low, y high); by default they hold
    99.8 % of all points, and each panel says how many of its points are outside or not finite. Both axes have one scale.
    About 13 bytes a point.
    """
    if not panels:
        raise UserError("there is no panel to draw; give scatter() at least one title with points.")
    clouds = {
        name: {key: _points(points, f"{name} / {key}") for key, points in group.items()}
        if isinstance(group, Mapping)
        else {"": _points(group, name)}
        for name, group in panels.items()
    }
    grey = {name: _points(points, name) for name, points in (behind or {}).items()}
    names = list(dict.fromkeys(key for group in clouds.values() for key in group if key))
    colour = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    left, right, bottom, top = _square_limits([*grey.values(), *(p for g in clouds.values() for p in g.values())], limits)
    columns = min(columns, len(clouds))
    gap, margin_left, head = 22, 46, 30
    legend = [*((name, _GREY) for name in grey), *colour.items()]
    width = margin_left + columns * (panel_size + gap)
    y_start = 14 + (26 if title else 0)
    rows_of_legend = _wrapped(legend, width - margin_left - 10)
    out: list[str] = [_text(margin_left, 26, title, _TITLE, weight=600)] if title else []
    for row in rows_of_legend:
        out += _legend_row(row, margin_left, y_start + 6, "dot")
        y_start += 22
    ticks_x, ticks_y = _ticks(left, right, 4), _ticks(bottom, top, 4)
    num_rows = math.ceil(len(clouds) / columns)
    for i, (name, group) in enumerate(clouds.items()):
        column, row = i % columns, i // columns
        x0, y0 = margin_left + column * (panel_size + gap), y_start + head + row * (panel_size + head + 24)
        scale = panel_size / (right - left)
        out.append(_text(x0 + panel_size / 2, y0 - 9, name, _TEXT, anchor="middle", weight=600))
        out.append(_rect(x0, y0, panel_size, panel_size))
        for tick in ticks_x:
            x = x0 + (tick - left) * scale
            out += [_rule(x, y0, x, y0 + panel_size), _text(x, y0 + panel_size + 16, _number(tick, ticks_x), _SMALL, "middle")]
        for tick in ticks_y:
            y = y0 + (top - tick) * scale
            out.append(_rule(x0, y, x0 + panel_size, y))
            if column == 0:
                out.append(_text(x0 - 7, y + 4, _number(tick, ticks_y), _SMALL, "end"))
        outside = 0
        layers = [(points, _GREY, 0.25) for points in grey.values()]
        layers += [(points, colour.get(key, PALETTE[i % len(PALETTE)]), 0.7) for key, points in group.items()]
        for points, fill, opacity in layers:
            inside = (points[:, 0] >= left) & (points[:, 0] <= right) & (points[:, 1] >= bottom) & (points[:, 1] <= top)
            outside += int((~inside).sum()) if fill != _GREY else 0
            pixels = np.stack([x0 + (points[inside, 0] - left) * scale, y0 + (top - points[inside, 1]) * scale], axis=1)
            out += _dots(pixels, fill, opacity, 1.6 if len(points) > 1_500 else 2.2 if len(points) > 300 else 3.2)
        if outside:
            out.append(_text(x0 + panel_size - 6, y0 + panel_size - 7, f"{outside} outside", _SMALL, "end", opacity=0.75))
    height = y_start + num_rows * (panel_size + head + 24) + 2
    return _document(width, height, out, title or ", ".join(clouds), background)


def lines(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    rules: Mapping[str, float] | None = None,
    labels: Literal["direct", "legend"] = "direct",
    width: int = 720,
    height: int = 400,
    background: Background = "none",
) -> str:
    """SVG text of a line chart: linear or log axes, bands for spread, names at the line ends ("direct") or in a legend above.

    `rules` are dashed horizontal lines with a name, e.g. {"teacher, 35 steps": 1.3}. Points that are not finite break a line.
    Zero and negative numbers are refused on a log axis; a band that reaches them is cut at the edge of the plot.
    """
    if not series:
        raise UserError("there is no series to draw; give lines() at least one Series.")
    data = [_checked(one, log_x, log_y) for one in series]
    rules = dict(rules or {})
    if log_y and any(value <= 0 for value in rules.values()):
        raise UserError("a rule at zero or below has no place on a log axis; drop it or set log_y=False.")
    xs = np.concatenate([x for x, *_ in data])
    heights = [values for _, *curves in data for values in curves]
    if x_ticks is not None:
        xs = np.concatenate([xs, np.asarray(x_ticks, float)])
    across, up = _Axis(xs, log_x, pad=0.02), _Axis(np.concatenate([*heights, list(rules.values())]), log_y, pad=0.05)
    horizontal = list(x_ticks) if x_ticks is not None else across.ticks(7)
    vertical = up.ticks(6)
    legend = [(one.name, one.colour or PALETTE[i % len(PALETTE)]) for i, one in enumerate(series)]
    is_direct = labels == "direct"
    widest = max(len(name) for name in (*(name for name, _ in legend), *rules))
    right = 40 + widest * _CHAR * _SMALL if is_direct else 24
    tick_width = max(len(_number(tick, vertical)) for tick in vertical) * _CHAR * _SMALL
    x0, x1 = 18 + tick_width + (22 if y_label else 0), width - right
    y0 = 18 + (28 if title else 0)
    out: list[str] = [_text(x0, 26, title, _TITLE, weight=600)] if title else []
    if not is_direct:
        for row in _wrapped(legend, x1 - x0):
            dashes = {one.name: _DASHES[i % len(_DASHES)] for i, one in enumerate(series) if one.mark == "line"}
            out += _legend_row(row, x0, y0 + 4, "line", dashes)
            y0 += 22
    y1 = height - (48 if x_label else 30)
    if x1 - x0 < 80 or y1 - y0 < 60:
        raise UserError(f"{width} x {height} leaves no room for the plot. Make it larger, or use labels='legend'.")

    def px(values: np.ndarray) -> np.ndarray:
        return x0 + across.place(values) * (x1 - x0)

    def py(values: np.ndarray) -> np.ndarray:
        return y1 - up.place(values) * (y1 - y0)

    last = -math.inf
    for tick in horizontal:
        x, text = float(px(np.array(tick))), _number(tick, horizontal)
        out.append(_rule(x, y0, x, y1))
        half = len(text) * _CHAR * _SMALL / 2
        if x - half > last + 4:  # given ticks can be close together: the line stays, the number goes
            out.append(_text(x, y1 + 18, text, _SMALL, "middle"))
            last = x + half
    for tick in vertical:
        y = float(py(np.array(tick)))
        out += [_rule(x0, y, x1, y), _text(x0 - 8, y + 4, _number(tick, vertical), _SMALL, "end")]
    out.append(_rect(x0, y0, x1 - x0, y1 - y0))
    if x_label:
        out.append(_text((x0 + x1) / 2, height - 10, x_label, _TEXT, "middle"))
    if y_label:
        middle = (y0 + y1) / 2
        out.append(_text(18, middle, y_label, _TEXT, "middle", turn=-90))
    inner: list[str] = []  # a nested svg clips what leaves the plot, without an id that could clash in a page
    for i, (x, _, *band) in enumerate(data):
        if band and series[i].mark == "line":
            inner.append(_band(px(x) - x0, py(band[0]) - y0, py(band[1]) - y0, legend[i][1]))
    for name, value in rules.items():
        y = float(py(np.array(value))) - y0
        inner.append(f'<path d="M0 {_f(y)}H{_f(x1 - x0)}" stroke="currentColor" stroke-dasharray="4 4" opacity=".7"/>')
        if not is_direct:
            inner.append(_text(x1 - x0 - 6, y - 5 if y > 18 else y + 14, name, _SMALL, "end", opacity=0.85))
    for i, (x, y, *band) in enumerate(data):
        if series[i].mark == "points":
            inner += _marks(px(x) - x0, [py(values) - y0 for values in (y, *band)], legend[i][1])
        else:
            inner += _curve(px(x) - x0, py(y) - y0, legend[i][1], _DASHES[i % len(_DASHES)])
    out.append(f'<svg x="{_f(x0)}" y="{_f(y0)}" width="{_f(x1 - x0)}" height="{_f(y1 - y0)}">{"".join(inner)}</svg>')
    if is_direct:
        ends = [(float(py(np.array(value))), x1, name, "currentColor") for name, value in rules.items()]
        for i, (x, y, *_) in enumerate(data):
            finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
            if len(finite):
                ends.append((float(py(y[finite[-1]])), float(px(x[finite[-1]])), *legend[i]))
        for (y, x, name, colour), at in zip(ends, _apart([end[0] for end in ends], 15, y0 + 6, y1 - 4)):
            # A line that stops early keeps its height to the frame; the lead bends only outside of it.
            lead = f"M{_f(x + 4)} {_f(y)}H{_f(x1)}" if x < x1 - 6 else f"M{_f(x1)} {_f(y)}"
            look = f'stroke="{colour}" stroke-dasharray="1 3" fill="none" opacity=".8"'
            out.append(f'<path d="{lead}L{_f(x1 + 9)} {_f(at)}" {look}/>')
            # In the page's ink: a palette that suits lines on white and on black is too pale for letters on one of them.
            out.append(
                f'<circle cx="{_f(x1 + 12)}" cy="{_f(at)}" r="3.5" fill="{colour}"/>' if colour != "currentColor" else ""
            )
            out.append(_text(x1 + (20 if colour != "currentColor" else 12), at + 4, name, _SMALL, weight=600))
    axes = f"{y_label} against {x_label}: " if x_label and y_label else ""
    return _document(width, height, out, title or axes + ", ".join(name for name, _ in legend), background)


class _Axis:
    """A map from values to 0..1 over a padded range, linear or log."""

    def __init__(self, values: np.ndarray, is_log: bool, pad: float):
        self.is_log = is_log
        finite = values[np.isfinite(values)]
        finite = finite[finite > 0] if is_log else finite
        if not len(finite):
            raise UserError("there is no finite number to draw. Look at what was measured before plotting it.")
        scaled = np.log10(finite) if is_log else finite
        low, high = float(scaled.min()), float(scaled.max())
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
            half = 0.5 if is_log else max(abs(low) * 0.1, 0.5)
            low, high = low - half, high + half
        self.low, self.high = low - pad * (high - low), high + pad * (high - low)

    def place(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.log10(np.maximum(values, 1e-300)) if self.is_log else values
        return (scaled - self.low) / (self.high - self.low)

    def ticks(self, num: int) -> list[float]:
        if not self.is_log:
            return _ticks(self.low, self.high, num)
        span = self.high - self.low
        if span < 0.7:  # less than a factor of five: linear ticks read better
            return [tick for tick in _ticks(10**self.low, 10**self.high, num) if tick > 0]
        factors = (1, 2, 5) if span < 2.2 else (1, 3) if span < 3.5 else (1,)
        every = max(1, math.ceil(span / num)) if factors == (1,) else 1
        decades = [d for d in range(math.floor(self.low), math.ceil(self.high) + 1) if d % every == 0]
        candidates = [factor * 10.0**d for d in decades for factor in factors]
        return [tick for tick in candidates if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]


def _ticks(low: float, high: float, num: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `num` of them."""
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, among: Sequence[float]) -> str:
    """The shortest text that tells `value` from the other ticks; very large and very small ones as 2e-5."""
    sizes = [abs(tick) for tick in among if tick != 0] or [1.0]
    size = abs(value) if max(sizes) >= 1e3 * min(sizes) else max(sizes)  # a log axis decides tick by tick
    text = f"{value:.6g}"
    if value != 0 and not 1e-3 <= size < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "\u2212")


def _points(values: Points, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 2:
        raise UserError(f"the points of {name!r} have shape {array.shape}, not (n, 2). Pick two columns to look at.")
    return array.astype(np.float64)


def _square_limits(
    clouds: Sequence[np.ndarray], limits: tuple[float, float, float, float] | None
) -> tuple[float, float, float, float]:
    """Limits with equal spans, so that one unit is as long across as up."""
    if limits is None:
        finite = [points[np.isfinite(points).all(axis=1)] for points in clouds]
        if not sum(map(len, finite)):
            raise UserError("no point is finite. Look at what was sampled before plotting it.")
        # Of each cloud, so that one student run wild does not push the others into a corner by its mere number.
        low = np.min([np.quantile(points, 0.001, axis=0) for points in finite if len(points)], axis=0)
        high = np.max([np.quantile(points, 0.999, axis=0) for points in finite if len(points)], axis=0)
        margin = 0.06 * max(float((high - low).max()), 1e-9)
        limits = (low[0] - margin, high[0] + margin, low[1] - margin, high[1] + margin)
    x0, x1, y0, y1 = map(float, limits)
    if not (x1 > x0 and y1 > y0):
        raise UserError(f"limits must be (x low, x high, y low, y high), not {limits}.")
    half = max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, x + half, y - half, y + half


def _checked(one: Series, log_x: bool, log_y: bool) -> list[np.ndarray]:
    """x, y and, if there is a band, low and high, as float arrays of one length, by x."""
    if (one.low is None) != (one.high is None):
        raise UserError(f"the series {one.name!r} has one edge of a band. Give both low and high, or neither.")
    columns = [one.x, one.y] if one.low is None or one.high is None else [one.x, one.y, one.low, one.high]
    arrays = [np.asarray(values, dtype=np.float64).reshape(-1) for values in columns]
    if len({len(array) for array in arrays}) != 1:
        raise UserError(f"the series {one.name!r} has columns of lengths {[len(a) for a in arrays]}. Make them equal.")
    for is_log, values, axis in ((log_x, arrays[0], "x"), (log_y, arrays[1], "y")):
        if is_log and (values <= 0).any():
            raise UserError(f"the series {one.name!r} has {axis} <= 0, which a log axis cannot show. Use log_{axis}=False.")
    order = np.argsort(arrays[0], kind="stable")
    return [array[order] for array in arrays]


def _apart(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the targets, at least `gap` apart and within [low, high] as far as there is room."""
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    gap = min(gap, (high - low) / max(len(targets) - 1, 1))
    # Clusters of touching labels; each sits where its members want to be on average.
    clusters: list[tuple[float, int]] = []  # first position, number of labels
    for i in order:
        position, num = min(max(targets[i], low), high), 1
        while clusters and position < clusters[-1][0] + clusters[-1][1] * gap:
            first, count = clusters.pop()
            centre = ((first + (count - 1) * gap / 2) * count + (position + (num - 1) * gap / 2) * num) / (count + num)
            num += count
            position = min(max(centre - (num - 1) * gap / 2, low), high - (num - 1) * gap)
        clusters.append((position, num))
    placed = [first + k * gap for first, num in clusters for k in range(num)]
    out = [0.0] * len(targets)
    for i, position in zip(order, placed):
        out[i] = position
    return out


# Drawing. Coordinates carry one decimal: a tenth of a pixel.


def _f(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # adding 0 makes -0 a plain one


def _dots(pixels: np.ndarray, colour: str, opacity: float, size: float) -> list[str]:
    out = []
    num_paths = math.ceil(len(pixels) / _DOTS_PER_PATH)
    for start in range(num_paths):
        path = "".join(f"M{_f(x)} {_f(y)}h0" for x, y in pixels[start::num_paths].tolist())
        look = f'stroke="{colour}" stroke-width="{2 * size:g}" stroke-linecap="round" stroke-opacity="{opacity}"'
        out.append(f'<path d="{path}" {look}/>')
    return out


def _curve(x: np.ndarray, y: np.ndarray, colour: str, dash: str) -> list[str]:
    path, is_drawing = [], False
    finite = np.isfinite(x) & np.isfinite(y)
    for a, b, is_known in zip(x.tolist(), y.tolist(), finite.tolist()):
        if is_known:
            path.append(f"{'L' if is_drawing else 'M'}{_f(a)} {_f(b)}")
        is_drawing = is_known
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    out = [f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"{dashes}/>']
    if finite.sum() <= 40:
        out += [f'<circle cx="{_f(a)}" cy="{_f(b)}" r="3.2" fill="{colour}"/>' for a, b in zip(x[finite], y[finite])]
    return out


def _marks(x: np.ndarray, ys: Sequence[np.ndarray], colour: str) -> list[str]:
    """Points, with whiskers if the edges of a band are given."""
    y, *band = ys
    finite = np.isfinite(x) & np.isfinite(y)
    out = []
    if band:
        low, high = (np.nan_to_num(np.clip(edge, -1e4, 1e4), nan=1e4)[finite] for edge in band)
        whiskers = "".join(
            f"M{_f(a)} {_f(b)}V{_f(c)}M{_f(a - 5)} {_f(c)}h10M{_f(a - 5)} {_f(b)}h10" for a, b, c in zip(x[finite], low, high)
        )
        out.append(f'<path d="{whiskers}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return out + [f'<circle cx="{_f(a)}" cy="{_f(b)}" r="6" fill="{colour}"/>' for a, b in zip(x[finite], y[finite])]


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> str:
    finite = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    there = [f"{_f(a)} {_f(b)}" for a, b in zip(x[finite], np.clip(low[finite], -1e4, 1e4))]
    back = [f"{_f(a)} {_f(b)}" for a, b in zip(x[finite][::-1], np.clip(high[finite][::-1], -1e4, 1e4))]
    return f'<path d="M{"L".join(there + back)}Z" fill="{colour}" fill-opacity=".18"/>' if there else ""


def _text(
    x: float,
    y: float,
    text: str,
    size: int,
    anchor: Literal["start", "middle", "end"] = "start",
    *,
    weight: int = 400,
    fill: str = "currentColor",
    opacity: float = 1.0,
    turn: float = 0.0,
) -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-weight="{weight}"' if weight != 400 else ""
    more += f' fill="{fill}"' if fill != "currentColor" else ""
    more += f' opacity="{opacity:g}"' if opacity != 1 else ""
    more += f' transform="rotate({turn:g} {_f(x)} {_f(y)})"' if turn else ""
    return f'<text x="{_f(x)}" y="{_f(y)}" font-size="{size}"{more}>{_clean(text)}</text>'


def _rect(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<path d="M{_f(x)} {_f(y)}h{_f(width)}v{_f(height)}h{_f(-width)}z" fill="none" stroke="currentColor" opacity=".45"/>'
    )


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{_f(x0)} {_f(y0)}L{_f(x1)} {_f(y1)}" stroke="currentColor" opacity=".12"/>'


def _wrapped(legend: Sequence[tuple[str, str]], width: float) -> list[list[tuple[str, str]]]:
    """The legend's entries in rows that fit into `width`."""
    rows: list[list[tuple[str, str]]] = []
    space = 0.0
    for entry in legend:
        need = len(entry[0]) * _CHAR * _SMALL + 44
        if not rows or space < need:
            rows.append([])
            space = width
        rows[-1].append(entry)
        space -= need
    return rows


def _legend_row(
    row: Sequence[tuple[str, str]], x: float, y: float, kind: Literal["dot", "line"], dashes: Mapping[str, str] | None = None
) -> list[str]:
    out = []
    for name, colour in row:
        if kind == "dot":
            out.append(f'<circle cx="{_f(x + 8)}" cy="{_f(y)}" r="4.5" fill="{colour}"/>')
        else:
            dash = f' stroke-dasharray="{dashes[name]}"' if dashes and dashes.get(name) else ""
            out.append(f'<path d="M{_f(x)} {_f(y)}h22" stroke="{colour}" stroke-width="2.5"{dash}/>')
            if dashes is not None and name not in dashes:  # a point, not a line
                out[-1] = f'<circle cx="{_f(x + 11)}" cy="{_f(y)}" r="5" fill="{colour}"/>'
        start = 18 if kind == "dot" else 28
        out.append(_text(x + start, y + 4, name, _SMALL))
        x += start + len(name) * _CHAR * _SMALL + 16
    return out


def _clean(text: str) -> str:
    """Text that XML can hold: markup escaped, control characters and lone surrogates dropped."""
    characters = (
        c for c in text if c in "\t\n" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000 and ord(c) not in (0xFFFE, 0xFFFF))
    )
    return escape("".join(characters))


def _document(width: float, height: float, parts: Sequence[str], title: str, background: Background) -> str:
    ink = ' color="#1a1a1a"' if background == "white" else ""
    paper = f'<rect width="{_f(width)}" height="{_f(height)}" fill="#fff"/>' if background == "white" else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_f(width)}" height="{_f(height)}" '
        f'viewBox="0 0 {_f(width)} {_f(height)}" role="img" font-family="{_FONT}" fill="currentColor"{ink} '
        f'style="max-width:100%;height:auto"><title>{_clean(title)}</title>{paper}{"".join(filter(None, parts))}</svg>'
    )
