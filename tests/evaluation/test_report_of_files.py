"""`fewstep report` of files of scores and of a run: what stands on the page, in rows of the same number."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.evaluation.report.curves import quality_plot
from fewstep.evaluation.report.of_files import is_drawn, mean_difference, report_of

sys.path.insert(0, str(Path(__file__).parent))
import chromium

LEGEND = [
    {"name": "mmd_x", "title": "MMD", "meaning": "Distance.", "better": "lower", "is_headline": True},
    {"name": "ssim", "title": "SSIM", "meaning": "Likeness.", "better": "higher", "is_headline": False},
]


def score(value: float | None) -> dict:
    return {"value": value, "spread": 0.1, "interval": [0, 1], "num": 6, "per_set": [value]}


def clip(seed: int, shade: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ground = rng.integers(40, 200, (1, 4, 6, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(ground + np.arange(5)[:, None, None, None] * 4 + shade, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student whose clips differ by 2, 30 and 9 grey values, the edges they followed, and a run."""
    root = tmp_path_factory.mktemp("scores")
    edges = np.zeros((5, 32, 48, 3), np.uint8)
    edges[:, 10:12] = 255
    for name, more in (("teacher", {"num_calls": 70, "sampler": "unipc, 35 steps"}), ("student", {"num_calls": 1})):
        record = {
            "what": f"models/{name}", "scores": {"mmd_x": score(0.5 if name == "student" else 0.1), "ssim": score(None)},
            "legend": LEGEND, "sets": [{"stems": ["a", "b", "c"], "prompts": ["one", "two", "three"], "per_clip": {}}],
            "anchors": {"real halves": {"mmd_x": score(0.01)}}, "notes": ["few clips."], "protocol": {"version": 1}, **more,
        }  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(record))
        for n, shade in enumerate((2, 30, 9)):
            frames = clip(n, shade if name == "student" else 0)
            video.write(root / name / f"{n:02d}.mp4", frames, 8.0, quality="lossless")
            video.write(root / name / f"{n:02d}.edge.mp4", edges, 8.0, quality="lossless")
            video.write(root / name / f"{n:02d}.real.mp4", clip(n + 9), 8.0, quality="lossless")
        video.write(root / name / "00.seed1.mp4", clip(5), 8.0, quality="lossless")
    run = root / "run"
    (run / "previews").mkdir(parents=True)
    rows = [{"step": n, "loss/kd": 1.0 / (n + 1)} for n in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "log.txt").write_text("12:00:00 ALARM at iteration 3: collapse is 0.2\n")
    video.write(run / "previews" / "step_000000000.mp4", clip(0), 8.0)
    return root


def words(files: Path, *more: str) -> list[str]:
    return ["report", *(str(files / name) for name in ("teacher.json", "student.json", "run")), *more]


def test_clips_of_other_samples_stand_in_a_gallery_of_their_own(files: Path, tmp_path: Path) -> None:
    record = json.loads((files / "student.json").read_text())
    record["sets"][0]["prompts"] = ["four", "five", "six"]
    (tmp_path / "other.json").write_text(json.dumps(record))
    for path in (files / "student").iterdir():
        video.write(tmp_path / "other" / path.name, video.read(path).frames, 8.0, quality="lossless")
    report = report_of([files / "teacher.json", files / "student.json", tmp_path / "other.json"])
    titles = {gallery.title: [row.prompt for row in gallery.rows] for gallery in report.galleries}
    assert titles["The same prompts, side by side"] == ["one", "two", "three"]
    assert titles["Clips of other"] == ["four", "five", "six"]


def test_one_student_at_several_numbers_of_calls_is_a_line(files: Path, tmp_path: Path) -> None:
    record = json.loads((files / "student.json").read_text())
    for calls in (4, 2, 1):
        (tmp_path / f"at{calls}.json").write_text(json.dumps({**record, "num_calls": calls}))
    paths = [tmp_path / f"at{calls}.json" for calls in (4, 2, 1)]
    assert [model.line for model in report_of([files / "teacher.json", *paths]).models if model.kind == "student"] == [
        "student"
    ] * 3
    assert [model.line for model in report_of(paths[:1]).models if model.kind == "student"] == [""]
    models = report_of(paths).models
    wide, _, _ = quality_plot([model for model in models if model.kind == "student"], "mmd_x", "MMD")
    line = re.search(r'<path d="([^"]*)" fill="none" stroke="[^"]*" stroke-width="2" stroke-linejoin', wide)
    assert line is not None
    xs = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", line[1])]
    assert len(xs) == 3 and xs == sorted(xs), "joined in the order of calls, not of files"


def test_the_page_has_every_model_every_row_and_what_limits_them(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(words(files, "--out", str(out), "--bound", "mmd_x<=0.3", "--title", "A page")) == 0
    page = out.read_text()
    assert '<data value="0.5" data-of="student|mmd_x">' in page and '<data value="0.01" data-of="real halves|mmd_x">' in page
    assert "0 of 1 bounds are met" in page and "student: mmd_x" in page
    assert "few clips." in page and "ALARM at iteration 3" in page and "iteration 0" in page
    assert re.findall(r'data-difference="([\d.]+)"', page) == ["2.0000", "30.0000", "9.0000"]
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_a_row_has_the_real_clip_the_control_and_each_model_with_the_control_over_it(files: Path) -> None:
    report = report_of([files / "teacher.json", files / "student.json"])
    films = report.galleries[0].rows[1].films
    assert [film.name for film in films] == [
        *("real clip", "edge", "teacher", "teacher, edge over it", "student", "student, edge over it"),
    ]
    assert [film.kind for film in films[:3]] == ["real", "control", "teacher"]
    np.testing.assert_array_equal(films[4].frames, clip(1, 30))
    over = films[5].frames
    assert (over[:, 10:12] == (255, 48, 48)).all() and (over[:, 12:] == clip(1, 30)[:, 12:]).all()
    assert [row.prompt for row in report.galleries[1].rows] == ["teacher: one", "student: one"]  # two noises of one prompt
    assert mean_difference(clip(0), clip(0)) == 0 and not is_drawn(clip(0))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--bound", "mmd_x=3"), "is written NAME<=VALUE"),
        (("--bound", "fid<=3"), "no student has this score; there are mmd_x, ssim"),
    ],
)
def test_wrong_bounds_are_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str
) -> None:
    assert main(words(files, "--out", str(tmp_path / "x.html"), *more)) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "x.html").exists()


@pytest.mark.skipif(chromium.found() is None, reason="no chromium in the path: apt-get install chromium")
def test_rows_sort_by_difference_with_the_keyboard_and_nothing_complains(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(words(files, "--out", str(out))) == 0
    prompts = "[...document.querySelector('.gallery').querySelectorAll('.row h3')].map(h => h.firstChild.textContent)"
    with chromium.browser() as tab:
        for width, is_dark in ((1280, False), (390, True)):
            tab.open(out, width, 844, is_dark)
            tab.wait("document.documentElement.dataset.ready === 'yes'")
            assert not tab.errors and all(url.startswith(("file:", "data:", "blob:")) for url in tab.requests)
            assert tab.js("document.documentElement.scrollWidth") <= width
            assert tab.js(prompts) == ["one", "two", "three"]
            tab.js("document.querySelector('.order').focus()")
            for key, code in (("ArrowDown", 40),):
                for kind in ("keyDown", "keyUp"):
                    tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
            tab.wait("document.querySelector('.gallery').dataset.order === 'largest'", 10)
            assert tab.js(prompts) == ["two", "three", "one"]


@pytest.mark.slow
def test_sixty_four_pairs_of_noisy_clips_fit_into_15_mb(files: Path, tmp_path: Path) -> None:
    root = tmp_path / "many"
    rng = np.random.default_rng(0)
    for name in ("teacher", "student"):
        record = json.loads((files / f"{name}.json").read_text())
        record["sets"] = [{"stems": [str(n) for n in range(64)], "prompts": [], "per_clip": {}}]
        root.mkdir(exist_ok=True)
        (root / f"{name}.json").write_text(json.dumps(record))
        for n in range(64):
            frames = np.clip(clip(n)[:, :, :32].astype(int).repeat(2, axis=1).repeat(2, axis=2), 0, 255)
            noisy = np.clip(frames.repeat(3, axis=0) + rng.integers(-30, 30, (15, 64, 64, 3)), 0, 255).astype(np.uint8)
            video.write(root / name / f"{n:02d}.mp4", noisy, 8.0, quality="lossless")
    out = tmp_path / "report.html"
    assert main(["report", str(root / "teacher.json"), str(root / "student.json"), "--out", str(out)]) == 0
    assert out.stat().st_size <= 15e6 and out.read_text().count('class="film"') == 128
