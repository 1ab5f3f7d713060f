"""The text is XML, its marks are where the numbers say, and labels keep apart. How it looks was looked at."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.evaluation.plot import Series, _apart, _number, _ticks, lines, scatter

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def dots(svg: str) -> np.ndarray:
    """The pixel places of all dots."""
    places = [
        re.findall(r"M([-\d.]+) ([-\d.]+)h0", path.get("d", "")) for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
    ]
    return np.array([[float(x), float(y)] for path in places for x, y in path])


def test_scatter_places_points_on_one_scale() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    svg = scatter({"data": points, "student": torch.tensor(points)}, title="a < b & c", limits=(-1, 3, -1, 3))
    places = dots(svg)
    assert len(places) == 6
    corner, right, up = places[:3]
    assert right[0] - corner[0] == pytest.approx(65, abs=0.11) and right[1] == corner[1]
    assert corner[1] - up[1] == pytest.approx(65, abs=0.11) and up[0] == corner[0]
    shift = places[3:] - places[:3]
    assert np.all(shift == shift[0]) and shift[0][0] == 282
    assert {"a < b & c", "data", "student", "0"} <= set(texts(svg))


def test_scatter_says_what_it_leaves_out() -> None:
    points = np.concatenate([np.random.default_rng(0).normal(size=(3000, 2)), [[1e6, 0], [np.nan, 0]]])
    svg = scatter({"student": {"after": points}}, behind={"data": points[:500]}, limits=(-9, 9, -9, 9))
    assert len(dots(svg)) == 3500 and "2 outside" in texts(svg)
    chosen = scatter({"student": points})  # by default the one far point does not shrink the rest to a dot
    assert 2980 < len(dots(chosen)) < 3000 and np.ptp(dots(chosen)[:, 0]) > 150
    assert {"data", "after", "student"} <= set(texts(svg))
    assert len(svg) < 20 * 3500


def test_plots_are_self_contained_and_take_the_ink_of_the_page() -> None:
    for svg in (scatter({"a": np.eye(2)}), lines([Series("a", [1, 2], [3, 4])])):
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg" and root.get("fill") == "currentColor"
        assert not re.search(r"href|url\(|<script|<style|\bid=", svg)
        assert f"{SVG}rect" not in {element.tag for element in root.iter()}
    white = ElementTree.fromstring(scatter({"a": np.eye(2)}, background="white"))
    assert next(white.iter(f"{SVG}rect")).get("fill") == "#fff" and white.get("color")


def test_lines_place_values_on_log_axes() -> None:
    svg = lines([Series("run", [1, 10, 100], [1, 0.1, 0.001])], log_x=True, log_y=True)
    circles = list(ElementTree.fromstring(svg).iter(f"{SVG}circle"))
    x, y = ([float(c.get(axis, "")) for c in circles] for axis in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert y[2] - y[1] == pytest.approx(2 * (y[1] - y[0]), abs=0.21)
    assert {"1", "10", "100", "0.1", "0.01", "0.001", "run"} <= set(texts(svg))


def test_lines_draw_bands_rules_gaps_and_names() -> None:
    x = np.arange(5)
    y = np.array([1, 2, np.nan, 2, 1.0])
    series = [Series("student <1>", x, y, y - 0.1, y + 0.1), Series("teacher", x, x + 1.0)]
    for labels in ("direct", "legend"):
        svg = lines(series, title="t", x_label="step", y_label="FD", rules={"floor": 0.5}, labels=labels)
        assert {"student <1>", "teacher", "floor", "step", "FD", "t"} <= set(texts(svg))
        paths = [path.get("d", "") for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
        assert any(path.count("M") == 2 and path.count("L") == 2 for path in paths)  # a line with a gap
        assert any("fill-opacity" in path.attrib for path in ElementTree.fromstring(svg).iter(f"{SVG}path"))
    assert "NaN" not in svg and "nan" not in svg


@pytest.mark.parametrize("level", [0.0, 5.0, -3e-9, 1e12])
def test_constant_series_have_axes(level: float) -> None:
    svg = lines([Series("flat", [1, 2, 3], [level] * 3)])
    assert len([text for text in texts(svg) if text not in ("flat",)]) >= 4


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1), (-3.7, 12), (0.0012, 0.0019), (99_000, 101_000), (-1e-7, 1e-7)):
        ticks = _ticks(low, high, 5)
        assert 3 <= len(ticks) <= 11 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-12)
        step = (ticks[1] - ticks[0]) / 10 ** np.floor(np.log10(ticks[1] - ticks[0]) + 1e-9)
        assert any(np.isclose(step, nice) for nice in (1, 2, 5, 10))
        assert len({_number(tick, ticks) for tick in ticks}) == len(ticks)


def test_numbers_are_short() -> None:
    assert _number(0.1 + 0.2, [0.1, 0.3]) == "0.3"
    assert _number(-2.0, [-2, 2]) == "\u22122"
    assert _number(1e-5, [1e-6, 1e-5, 1e-3]) == "1e\u22125"
    assert _number(250_000.0, [1e5, 2.5e5]) == "2.5e5"
    assert _number(0.0, [0, 1e-9]) == "0"


def test_labels_keep_apart_and_inside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        wanted = rng.uniform(-20, 220, rng.integers(1, 12)).tolist()
        places = sorted(_apart(wanted, 15, 0, 200))
        assert places[0] >= -1e-9 and places[-1] <= 200 + 1e-9
        assert all(b - a >= 15 - 1e-9 for a, b in pairwise(places))
    assert _apart([10, 100], 15, 0, 200) == [10, 100]
    assert len(_apart([1.0] * 30, 15, 0, 200)) == 30  # more than fit: closer, but in order


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scatter({}), "no panel"),
        (lambda: scatter({"a": np.zeros((3, 3))}), r"'a' have shape \(3, 3\)"),
        (lambda: scatter({"a": np.full((3, 2), np.nan)}), "no point is finite"),
        (lambda: scatter({"a": np.eye(2)}, limits=(1, 0, 0, 1)), "limits"),
        (lambda: lines([]), "no series"),
        (lambda: lines([Series("a", [1], [np.nan])]), "no finite number"),
        (lambda: lines([Series("a", [1, 2], [1])]), r"lengths \[2, 1\]"),
        (lambda: lines([Series("a", [1, 2], [1, 0])], log_y=True), "log_y=False"),
        (lambda: lines([Series("a", [1], [1])], log_y=True, rules={"r": 0}), "rule"),
        (lambda: lines([Series("a", [1], [1], low=[0])]), "one edge of a band"),
        (lambda: lines([Series("a" * 200, [1], [1])]), "leaves no room"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_control_characters_do_not_break_the_xml() -> None:
    assert "ab" in texts(scatter({"a\x00\x1b\ud800b": np.eye(2)}))


def test_points_have_whiskers_and_colours_of_their_own() -> None:
    series = [Series("line", [1, 3], [1, 3]), Series("point", [2], [2.0], [1.5], [2.5], mark="points", colour="#123456")]
    for labels in ("direct", "legend"):
        root = ElementTree.fromstring(lines(series, labels=labels))
        inner = next(element for element in root.iter(f"{SVG}svg") if element is not root)
        ends = [c for c in inner.iter(f"{SVG}circle") if c.get("fill") != "#123456"]
        (point,) = (c for c in inner.iter(f"{SVG}circle") if c.get("fill") == "#123456")
        (whisker,) = (p.get("d", "") for p in inner.iter(f"{SVG}path") if p.get("stroke") == "#123456")
        x, low, high = (float(v) for v in re.match(r"M([\d.]+) ([\d.]+)V([\d.]+)", whisker).groups())  # type: ignore[union-attr]
        y = [float(c.get("cy", "")) for c in ends]
        unit = (y[0] - y[1]) / 2
        assert x == float(point.get("cx", "")) and low - high == pytest.approx(unit, abs=0.21)
        assert float(point.get("cy", "")) == pytest.approx((y[0] + y[1]) / 2, abs=0.11)
        names = [t for t in root.iter(f"{SVG}text") if t.text == "point"]
        assert len(names) == 1 and names[0].get("fill") is None  # in the ink of the page, whose contrast is good
