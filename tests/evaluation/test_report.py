"""The report read back by others: html.parser for numbers and texts, Pillow and PyAV for its clips, numpy for its curves."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from report_sample import GATES, NASTY, SCORES, STAGES, VERDICTS, film, models, small

from fewstep.evaluation.report import Film, Gallery, Gate, Model, Report, Row, Score, Value, curves_of, page, write
from fewstep.evaluation.report.curves import quality_plot
from fewstep.evaluation.report.films import encode
from fewstep.evaluation.report.page import numbers


class Reader(HTMLParser):
    """Elements with their attributes and the text directly or indirectly in them."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.found.append((tag, dict(attrs), texts))
        if tag not in ("meta", "link", "img", "input", "br"):
            self._open.append((tag, texts))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for _, texts in self._open:
            texts.append(data)

    def all(self, tag: str, name: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, "".join(texts))
            for found, attrs, texts in self.found
            if found == tag and (not name or name in (attrs.get("class") or "").split())
        ]


@pytest.fixture(scope="module")
def text() -> str:
    return page(small())


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def wanted_numbers() -> dict[str, float]:
    """Everything the sample says, by the names that the page gives."""
    out: dict[str, float] = {}

    def put(name: str, value: float, spread: float) -> None:
        out[name] = value
        if math.isfinite(value) and math.isfinite(spread) and spread > 0:
            out[f"{name}|spread"] = spread

    headlines = {score.name for score in SCORES if score.is_headline}
    for model in models():
        for name, one in model.scores.items():
            put(f"{model.name}|{name}", one.value, one.spread)
            if model.is_featured and name in headlines:
                put(f"card|{model.name}|{name}", one.value, one.spread)
        if model.clips_per_s is not None:
            put(f"speed|{model.name}", model.clips_per_s.value, model.clips_per_s.spread)
            assert model.num_calls is not None
            put(f"calls|{model.name}", model.num_calls, math.nan)
    for gate in GATES:
        put(f"gate|{gate.name}", gate.value, gate.spread)
        put(f"bound|{gate.name}", gate.bound, math.nan)
    for one in VERDICTS:
        name = f"verdict|{one.score}|{one.whose}"
        put(name, one.value, math.nan)
        put(f"{name}|other", one.other, math.nan)
        put(f"{name}|low", one.low, math.nan)
        put(f"{name}|high", one.high, math.nan)
    for stage in STAGES:
        put(f"seconds|{stage.name}", stage.seconds, math.nan)
    out["gain"] = 251.4 / 3.95
    return out


def test_every_number_is_the_one_that_was_given_and_no_other_is_there(read: Reader) -> None:
    shown = {attrs["data-of"]: (float(attrs["value"] or "nan"), text) for attrs, text in read.all("data")}
    wanted = wanted_numbers()
    assert set(shown) == set(wanted)
    for name, (value, seen) in shown.items():
        assert value == wanted[name] or (math.isnan(value) and math.isnan(wanted[name])), name
        if math.isnan(value):
            assert seen == "none"
        elif not name.startswith("seconds|"):
            number = float(seen.replace("\u2212", "-"))
            decimals = len(seen.partition(".")[2])
            within = 0.5 * 10.0**-decimals if decimals or abs(value) < 1000 else 0.5
            assert abs(number - value) <= within * 1.0001, (name, seen, value)


def test_a_value_and_its_spread_end_at_the_same_decimal(read: Reader) -> None:
    shown = {attrs["data-of"]: text for attrs, text in read.all("data")}
    assert shown["student, 4 steps|frechet"] == "9.13" and shown["student, 4 steps|frechet|spread"] == "0.83"
    assert shown["teacher, 1 step|frechet"] == "310.0" and shown["real clips|frechet"] == "\u22120.12"
    for name in shown:
        if f"{name}|spread" in shown:
            assert len(shown[name].partition(".")[2]) == len(shown[f"{name}|spread"].partition(".")[2]), name


def test_gates_are_judged_by_their_numbers(read: Reader) -> None:
    judged = {attrs["data-name"]: attrs["class"] for attrs, _ in read.all("li", "gate")}
    met = {"4 steps: ratio", "1 step: gap closed", "below zero"}
    assert judged == {gate.name: f"gate {'met' if gate.name in met else 'missed'}" for gate in GATES}
    marks = [attrs["aria-label"] for attrs, _ in read.all("span", "mark")]
    assert marks.count("met") == 3 and marks.count("not met") == 2
    assert "3 of 5 bounds are met" in [text for _, text in read.all("h2")]


def test_the_numbers_are_there_for_programs_too(read: Reader) -> None:
    (inside,) = (text for attrs, text in read.all("script") if attrs.get("id") == "numbers")
    assert json.loads(inside) == numbers(small()) and "NaN" not in inside
    student = json.loads(inside)["models"][-1]
    assert student["scores"]["recall"] == {"value": None, "spread": 0.0123, "n": 511}
    assert student["scores"]["frechet"]["value"] == 14.85 and student["network_calls"] == 1


def test_speed_bars_are_linear_from_zero(read: Reader) -> None:
    bars = [attrs["style"] or "" for attrs, _ in read.all("span", "bar")]
    widths = [float(re.search(r"([\d.]+)%", bar)[1]) for bar in bars]  # type: ignore[index]
    assert widths == pytest.approx(
        [100 * v / 251.4 for v in (3.95, 66.3, 68, 251.4)] + [100 * v / 70 for v in (70, 4, 4, 1)], abs=0.01
    )


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_shown_as_they_are_and_never_run(text: str, read: Reader) -> None:
    assert len(read.all("script")) == 2  # the numbers and the player
    assert [t for _, t in read.all("h1")] == [NASTY] and read.all("title")[0][1] == NASTY
    assert [t for _, t in read.all("pre")] == [stage.command for stage in STAGES]
    assert NASTY in [t for _, t in read.all("dd")] and NASTY in [t for _, t in read.all("small")]
    assert [t for _, t in read.all("h3") if t.startswith("a <red>")] == [f"{NASTY} 0", f"{NASTY} 1"]
    assert "alert(1)" not in re.sub(r"&lt;/script&gt;&lt;script&gt;alert\(1\)|\\u003cscript>alert\(1\)", "", text)


def test_nothing_is_loaded_from_elsewhere(read: Reader) -> None:
    for tag, attrs, _ in read.found:
        for name in ("src", "href", "poster", "action", "data", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    styles = "".join(text for _, text in read.all("style"))
    assert "url(" not in styles and "@import" not in styles
    (policy,) = [a["content"] or "" for a, _ in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_everything_seen_has_a_name_for_those_who_do_not_see(read: Reader) -> None:
    images = read.all("img", "source")
    assert len(images) == 13 and all((attrs["alt"] or "").strip() for attrs, _ in images)
    assert f"student, 1 step: {NASTY} 1" not in [
        attrs["alt"] for attrs, _ in images
    ]  # 6 clips a row: the seventh model has none
    assert f"student, 4 steps: {NASTY} 1" in [attrs["alt"] for attrs, _ in images]
    assert "Frechet distance against network calls for one clip: UniPC" in [t[:58] for _, t in read.all("title")]
    for attrs, inside in read.all("button"):
        assert attrs.get("aria-label") or inside.strip()
    assert all(attrs.get("aria-label") for attrs, _ in [*read.all("select"), *read.all("input")])


def test_a_report_of_nothing_but_a_title_is_a_page() -> None:
    bare = Reader(page(Report("only a title")))
    assert not bare.all("section") and [t for _, t in bare.all("h1")] == ["only a title"]


def test_faults_are_told_all_at_once() -> None:
    frames = np.zeros((2, 8, 8, 3), np.float32)
    bad = Report(
        "t",
        models=[Model("student", "a", 0, scores={"fid": Value(1.0)}), Model("student", "a")],
        galleries=[Gallery("g", [Row("p", [Film("f", frames, "real")])], 0)],  # type: ignore[list-item]
    )
    with pytest.raises(ValueError, match="cannot be written") as error:
        page(bad)
    for part in (
        "two models are called 'a'",
        "fid; add a Score",
        "fps must be above 0",
        "float32 (2, 8, 8, 3)",
        "0 network calls",
    ):
        assert part in str(error.value)


def test_it_is_written_whole(tmp_path: Path) -> None:
    path = write(small(1), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == page(small(1)) and [p.name for p in path.parent.iterdir()] == ["report.html"]


# ---- clips -----------------------------------------------------------------------------------------------------------


def pillow_frames(data: bytes, num: int, fps: float) -> np.ndarray:
    """What Pillow makes of an animated WebP, each picture repeated for as long as it stays."""
    image = Image.open(io.BytesIO(data))
    out: list[np.ndarray] = []
    clock = 0.0
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        image.load()
        clock += image.info.get("duration", 0)
        stay = max(1, round(clock * fps / 1000) - len(out))
        out += [np.asarray(image.convert("RGB"))] * stay
    return np.stack(out + [out[-1]] * (num - len(out)))


@pytest.mark.parametrize("frozen", [False, True])
def test_small_clips_are_exact(read: Reader, frozen: bool) -> None:
    if frozen:
        frames = np.repeat(film(0)[:1], 7, axis=0)
        (one,) = encode([frames], [24], 10**6)
        assert one.is_exact and np.array_equal(pillow_frames(one.data, 7, 24), frames)
        return
    shown = [
        base64.b64decode((attrs["src"] or "").removeprefix("data:image/webp;base64,")) for attrs, _ in read.all("img", "source")
    ]
    for i in range(2):
        for k in range(6):
            assert np.array_equal(pillow_frames(shown[6 * i + k], 6, 16), film(10 * i + k))


def test_large_clips_keep_their_look_and_shape() -> None:
    frames = np.repeat(np.repeat(film(1, 5, 24, 42), 10, axis=1), 10, axis=2)[:, 1:, 1:]  # 239 x 419, odd on both sides
    (one,) = encode([frames], [24], 10**6)
    assert (one.mime, one.is_exact, one.height, one.width, one.num_frames) == ("video/mp4", False, 239, 419, 5)
    with av.open(io.BytesIO(one.data)) as container:
        made = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert made.shape[0] == 5 and abs(made.shape[1] - 239) <= 1 and abs(made.shape[2] - 419) <= 1
    error = made[:, :238, :418].astype(float) - frames[:, :238, :418]
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 27


def test_many_large_clips_are_compressed_until_they_fit() -> None:
    clips = [np.random.default_rng(i).integers(0, 256, (3, 180, 320, 3), dtype=np.uint8) for i in range(2)]
    sizes = [sum(len(one.data) for one in encode(clips, [24, 24], budget)) * 4 / 3 for budget in (10**9, 200_000, 1)]
    assert sizes[0] > 200_000 >= sizes[1] > sizes[2]


def test_eight_prompts_of_six_clips_stay_under_five_megabytes() -> None:
    """With the worst there is at this size, noise of +-16 in every pixel."""
    rng = np.random.default_rng(0)
    frames = [(128 + rng.normal(0, 6, (17, 32, 32, 3))).clip(0, 255).astype(np.uint8) for _ in range(6)]
    rows = [Row(f"prompt {i}", [Film(f"model {k}", frames[k], "student") for k in range(6)]) for i in range(8)]
    assert len(page(Report("t", galleries=[Gallery("g", rows, 16)]))) < 5_000_000


# ---- plots -----------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def test_quality_is_placed_by_calls_and_score_on_log_axes() -> None:
    wide, narrow, notes = quality_plot(models(), "frechet", "Frechet distance")
    assert notes == ["real clips: -0.12, below every log axis."]
    for svg in (wide, narrow):
        root = ElementTree.fromstring(svg)
        inner = next(element for element in root.iter(f"{SVG}svg") if element is not root)
        circles = [(float(c.get("cx", "")), float(c.get("cy", "")), float(c.get("r", ""))) for c in inner.iter(f"{SVG}circle")]
        # teacher's line: 2, 4, 70 calls; then the students
        given = [(2, 310), (4, 44.4), (70, 7.4321), (4, 9.13), (1, 14.85)]
        assert [r for *_, r in circles] == [3.2] * 3 + [6] * 2
        x, y = np.array([c[0] for c in circles]), np.array([c[1] for c in circles])
        log = np.log(np.array(given, float))
        for seen, true, sign in ((x, log[:, 0], 1), (y, log[:, 1], -1)):
            slope, at = np.polyfit(true, seen, 1)
            assert sign * slope > 0 and np.abs(at + slope * true - seen).max() < 0.15
        texts = {element.text for element in root.iter(f"{SVG}text")}
        assert {"UniPC", "student, 4 steps", "student, 1 step", "tokenizer", "network calls for one clip"} <= texts


def test_quality_goes_without_logs_where_a_number_is_not_positive() -> None:
    some = [
        Model("student", "s", 4, scores={"f": Value(-0.2, 0.3, 9)}),
        Model("teacher", "t", 70, scores={"f": Value(9.0)}),
    ]
    wide, _, notes = quality_plot([*some, Model("student", "u", 1, scores={"f": Value(math.nan)})], "f", "F")
    assert "\u22120.2" in wide or ">0<" in wide
    assert notes == ["u: not measured."]
    assert quality_plot([Model("real", "r", scores={"f": Value(1.0)})], "f", "F") == ("", "", [])


def test_curves_are_those_of_the_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loss = rng.random(1000) + 0.5
    lines = [json.dumps({"step": i, "loss/vsd": loss[i], "lr/student": 1e-3}) for i in range(1000)]
    lines[400] = json.dumps({"step": 400, "loss/vsd": math.nan})  # json.dumps writes NaN, as the run's log would
    lines += [json.dumps({"step": 500, "health/drift": 0.25}), '{"step": 1000, "loss/v']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text("health:\n  every: 9\n  drift:\n    limit: 0.5\n    action: warn\n")
    losses, drift = curves_of(tmp_path, "run")
    assert losses.title == "run: losses" and drift.title == "run: drift" and drift.rules == {"rings at 0.5": 0.5}
    (series,) = losses.series
    kept = np.delete(loss, 400)
    sizes = [len(part) for part in np.array_split(kept, 120)]
    assert np.average(series.y, weights=sizes) == pytest.approx(kept.mean()) and len(series.x) == 120
    assert series.y[0] == pytest.approx(kept[:9].mean()) and series.low is not None and series.high is not None
    assert np.all(np.asarray(series.low) <= series.y) and np.all(series.y <= np.asarray(series.high))
    assert (list(drift.series[0].x), list(drift.series[0].y)) == ([500], [0.25])


def test_a_gate_without_a_number_is_not_met() -> None:
    assert not Gate("a", math.nan, 1, "lower").is_met and not Gate("a", math.nan, 1, "higher").is_met
    assert Gate("a", 1, 1, "lower").is_met and Gate("a", 1, 1, "higher").is_met


def test_scores_need_no_model_and_models_no_score() -> None:
    assert "Frechet" not in page(Report("t", scores=[Score("frechet", "Frechet", "m", "lower", True)]))
    assert page(Report("t", models=[Model("real", "r")]))
