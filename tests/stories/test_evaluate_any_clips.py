"""A user's own clips, 64 x 64 and 320 x 176, of two lengths and without captions, scored against others, to the report."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.evaluation import pixels
from fewstep.evaluation.clips import HALVES

NUM = 20


def scene(seed: int, num_frames: int = 9, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Two textured discs that drift over a textured ground."""
    rng = np.random.default_rng(seed)
    ground = cv2.GaussianBlur(rng.uniform(0, 255, (*size, 3)), (0, 0), 3)
    ground = 60 + 120 * (ground - ground.min()) / np.ptp(ground)
    y, x = np.mgrid[: size[0], : size[1]]
    clip = np.repeat(ground[None], num_frames, axis=0)
    for _ in range(2):
        place, speed = rng.uniform(16, np.array(size) - 16, 2), rng.uniform(-2, 2, 2)
        colour, radius = rng.uniform(0, 255, 3), rng.uniform(6, 12)
        for frame in range(num_frames):
            top, left = place + frame * speed
            inside = (y - top) ** 2 + (x - left) ** 2 < radius**2
            clip[frame][inside] = colour * (0.8 + 0.2 * np.sin(0.8 * (x - left)[inside]))[:, None]
    return np.clip(clip, 0, 255).astype(np.uint8)


def damaged(clip: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 20, clip.shape)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip])
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for n in range(NUM):
        fresh = scene(1000 + n)
        video.write(
            root / "real" / f"{n:03d}.mp4", scene(n, 9 + 2 * (n % 2)), 24.0, quality="lossless"
        )  # a plain folder of mp4
        video.write(root / "good" / "videos" / f"{n:03d}.mp4", fresh, 24.0, quality="lossless")
        video.write(root / "bad" / "videos" / f"{n:03d}.mp4", damaged(fresh, n), 24.0, quality="lossless")
        video.write(root / "frozen" / "videos" / f"{n:03d}.mp4", np.repeat(fresh[:1], 9, axis=0), 24.0, quality="lossless")
    return root


def evaluated(folders: Path, name: str, *words: str) -> dict:
    out = folders / "scores" / f"{name}{'_more' if words else ''}.json"
    where = ("--real", str(folders / "real"), "--out", str(out), "--sets", "1", "--features", "descriptors,random_network")
    assert main(["evaluate", str(folders / name), *where, *words]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def records(folders: Path) -> dict[str, dict]:
    return {name: evaluated(folders, name) for name in ("good", "bad", "frozen")}


def test_clips_that_are_worse_score_worse_with_intervals_that_do_not_touch(records: dict[str, dict]) -> None:
    good, bad, frozen = (records[name] for name in ("good", "bad", "frozen"))
    for name in ("mmd_descriptors", "mmd_random_network", "frechet_random_network"):
        assert good["scores"][name]["interval"][1] < bad["scores"][name]["interval"][0], name
    assert good["scores"]["mmd_descriptors"]["value"] < 0.5 * frozen["scores"]["mmd_descriptors"]["value"]
    assert frozen["scores"]["motion"]["value"] == pytest.approx(0, abs=0.01) and frozen["scores"]["flicker"]["value"] == 0
    real = good["anchors"]["one half of the real clips against the other"]
    assert real["motion"]["value"] > 0.1 and real["flicker"]["value"] > 0.05  # so "as real" tells frozen clips
    low, high = good["scores"]["motion"]["interval"]
    assert low < real["motion"]["value"] < high
    assert good["scores"]["coverage_descriptors"]["value"] > bad["scores"]["coverage_descriptors"]["value"] + 0.3
    assert good["protocol"]["frames_height_width"] == [[9, 64, 64]] and good["protocol"]["fps"] == [24.0]
    assert good["protocol"] == {**bad["protocol"]}  # only the clips differ
    assert any("undetermined" in note for note in good["notes"])  # 20 clips, 58 features


def test_clips_with_a_truth_have_psnr_and_ssim(folders: Path) -> None:
    record = evaluated(folders, "bad", "--truth", str(folders / "good"))
    each = record["sets"][0]["per_clip"]["psnr"]
    errors = [np.mean((scene(1000 + n).astype(float) - damaged(scene(1000 + n), n)) ** 2) for n in range(NUM)]
    assert each == pytest.approx([10 * np.log10(255**2 / error) for error in errors], abs=1e-6)
    assert record["scores"]["psnr"]["value"] == pytest.approx(np.mean(each)) and 0.2 < record["scores"]["ssim"]["value"] < 0.9


def test_nothing_of_the_toy_world_takes_part(folders: Path) -> None:
    record = evaluated(folders, "good", "--num", "8", "--sets", "3")
    assert [row["kind"] for row in record["scorers"]] == ["clips"] and len(record["sets"]) == 2
    assert record["scores"]["mmd_descriptors"]["num"] == 16


def test_the_command_of_the_original_tools_pastes(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    words = ("--pred_video_paths", f"{folders}/good/videos/*.mp4", "--gt_video_paths", f"{folders}/real/*.mp4")
    assert main(["evaluate", *words, "--num_frames", "5", "--output_file", str(out), "--features", "descriptors"]) == 0
    record = json.loads(out.read_text())
    assert record["protocol"]["frames_height_width"] == [[5, 64, 64]] and record["protocol"]["clips_per_set"] == NUM
    assert record["num_reference"] == NUM and record["scores"]["mmd_descriptors"]["num"] == NUM
    real = [pixels.in_time(video.read(file, count=5).frames)["flicker"] for file in sorted((folders / "real").glob("*.mp4"))]
    assert record["anchors"][HALVES]["flicker"]["value"] == pytest.approx(np.mean(real))  # real clips are cut as well


def test_clips_that_are_cut_off_are_named_together_before_one_is_measured(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(6):
        content = (folders / "real" / f"{n:03d}.mp4").read_bytes()
        (tmp_path / f"{n}.mp4").write_bytes(content[: len(content) // 2] if n in (1, 4) else content)
    words = ("--real", str(folders / "real"), "--out", str(tmp_path / "scores.json"), "--features", "descriptors")
    assert main(["evaluate", str(tmp_path), *words]) == 1
    text = capsys.readouterr().err
    assert "2 of 26 clips cannot be scored" in text and f"{tmp_path}/1.mp4" in text and f"{tmp_path}/4.mp4" in text
    assert not (tmp_path / "scores.json").exists()


def test_clips_of_other_rates_than_the_real_ones_and_clips_left_out_are_noted(folders: Path, tmp_path: Path) -> None:
    for n in range(6):
        video.write(tmp_path / f"{n}.mp4", scene(n), (24.0, 12.0)[n % 2], quality="lossless")
    words = ("--real", str(folders / "real"), "--out", str(tmp_path / "scores.json"), "--features", "descriptors")
    assert main(["evaluate", str(tmp_path), *words, "--num", "4", "--sets", "1"]) == 0
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["protocol"]["fps"] == [12.0, 24.0]
    assert any(note.startswith("The clips play 12, 24 frames a second, the real ones 24:") for note in record["notes"])
    assert "4 of 6 clips are scored; all are with --num 6 --sets 1." in record["notes"]


def test_a_comparison_says_which_differences_are_real_and_refuses_unlike_protocols(
    folders: Path, records: dict[str, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = folders / "scores"
    out = tmp_path / "differences.json"
    assert main(["evaluate", "--compare", str(scores / "good.json"), str(scores / "bad.json"), "--out", str(out)]) == 0
    assert "worse" in capsys.readouterr().out
    rows = {row["score"]: row for row in json.loads(out.read_text())["differences"]}
    for name, how in (
        ("mmd_descriptors", "same halves"),
        ("coverage_descriptors", "same halves"),
        ("sharpness", "clip by clip"),
    ):
        assert rows[name]["verdict"] == "worse" and rows[name]["how"] == how, rows[name]
    assert rows["mmd_descriptors"]["low"] > 0
    each = [json.loads((scores / f"{name}.json").read_text())["sets"][0]["per_clip"]["sharpness"] for name in ("good", "bad")]
    real = json.loads((scores / "good.json").read_text())["anchors"]["one half of the real clips against the other"][
        "sharpness"
    ]
    wanted = abs(np.mean(each[1]) - real["value"]) - abs(np.mean(each[0]) - real["value"])
    assert rows["sharpness"]["difference"] == pytest.approx(wanted)
    assert main(["evaluate", "--compare", str(scores / "good.json"), str(scores / "good.json"), "--out", str(out)]) == 0
    assert {row["verdict"] for row in json.loads(out.read_text())["differences"]} <= {"no difference", "not measured"}
    evaluated(folders, "bad", "--num-frames", "7")
    assert main(["evaluate", "--compare", str(scores / "good.json"), str(scores / "bad_more.json")]) == 1
    text = capsys.readouterr().err
    assert "unlike protocols" in text and "frames_height_width is [[7, 64, 64]], not [[9, 64, 64]]" in text
    assert "score both with --num-frames 7, or fewer" in text  # the protocols differ in nothing else


def test_a_process_that_is_just_beginning_the_same_scores_is_no_stranger(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds clips of somebody's own is refused; one in which another process is writing its mark is not."""
    words = ("evaluate", str(folders / "good"), "--real", str(folders / "real"), "--num", "8", "--features", "descriptors")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / ".of_scores.partial").touch()
    assert main([*words, "--sets", "1", "--out", str(tmp_path / "scores.json")]) == 0
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "holiday.mp4").touch()
    assert main([*words, "--sets", "1", "--out", str(tmp_path / "own.json")]) == 2
    assert "which holds others" in capsys.readouterr().err


def test_clips_of_320_x_176_and_their_report(tmp_path: Path) -> None:
    """From a fresh data set to a page that says what differs: two models, one of which makes damaged clips."""
    for n in range(6):
        clip = scene(2000 + n, 5, (176, 320))
        video.write(tmp_path / "real" / f"{n}.mp4", scene(n, 5, (176, 320)), 24.0)
        video.write(tmp_path / "good" / "videos" / f"{n}.mp4", clip, 24.0)
        video.write(tmp_path / "bad" / "videos" / f"{n}.mp4", damaged(clip, n), 24.0)
    for name in ("good", "bad"):
        where = (
            "--real",
            str(tmp_path / "real"),
            "--out",
            str(tmp_path / "scores" / f"{name}.json"),
            "--sets",
            "1",
            "--keep",
            "2",
        )
        assert main(["evaluate", str(tmp_path / name), *where, "--features", "descriptors"]) == 0
    good, bad = (json.loads((tmp_path / "scores" / f"{name}.json").read_text()) for name in ("good", "bad"))
    assert good["protocol"]["frames_height_width"] == [[5, 176, 320]]
    for name in ("mmd_descriptors", "niqe_like"):
        assert good["scores"][name]["interval"][1] < bad["scores"][name]["interval"][0], name
    page = tmp_path / "report.html"
    files = (str(tmp_path / "scores" / "good.json"), str(tmp_path / "scores" / "bad.json"))
    assert main(["report", *files, "--out", str(page), "--bound", "niqe_like<=1000"]) == 0
    text = page.read_text()
    for score in ("mmd_descriptors", "niqe_like"):
        for name, record in (("good", good), ("bad", bad)):
            value = record["scores"][score]["value"]
            assert f'value="{value!r}" data-of="{name}|{score}"' in text  # every number stands there as it is in the file
    assert text.count("<video") == 2 * 2 and page.stat().st_size < 5_000_000
