"""`fewstep evaluate --scorer`: a scorer in a file of one's own, and control fidelity, on clips that are not toy clips."""

import json
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli import main
from fewstep.data.controls import Edge, Vis
from fewstep.data.files import masks, video
from fewstep.evaluation.bootstrap import halves, student_quantile

NUM, FRAMES, SIZE = 6, 9, (24, 40)

MINE = '''
from dataclasses import dataclass

import numpy as np

from fewstep.config import kind
from fewstep.evaluation import Record, Score, Scorer, half_sampled, mean_over_clips


@kind("my_contrast", group="scorer")
@dataclass(frozen=True)
class Contrast(Scorer):
    """How strongly pixels differ."""

    scale: float = 1.0

    legend = (
        Score("contrast", "Contrast", "Standard deviation of all pixels of a clip.", "as real", is_headline=True),
        Score("range", "Range", "Difference between the largest and the smallest contrast.", "lower"),
    )

    def score(self, samples, reference):
        clips = list(samples.clips)
        assert len(samples.prompts) == len(clips)
        values = [self.scale * float(clip.std()) for clip in clips]
        scores = {"contrast": mean_over_clips(values), "range": half_sampled(np.ptp, np.array(values))}
        return Record("pixels", scores, notes=(f"{clips[0].shape}",), per_clip={"contrast": values})
'''


def scene(seed: int) -> np.ndarray:
    """A bright box that moves over a grey floor, with some texture."""
    rng = np.random.default_rng(seed)
    clip = np.full((FRAMES, *SIZE, 3), 60, np.uint8) + rng.integers(0, 6, (1, *SIZE, 1), dtype=np.uint8)
    top, left, colour = int(rng.integers(2, 8)), int(rng.integers(2, 10)), rng.integers(150, 255, 3)
    for frame in range(FRAMES):
        clip[frame, top : top + 12, left + frame : left + frame + 14] = colour
    return clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and the edges and blurs they were conditioned on: those of the clips themselves."""
    root = tmp_path_factory.mktemp("clips")
    for n in range(NUM):
        clip = scene(n)
        video.write(root / "videos" / f"{n}.mp4", clip, 8.0, quality="lossless")
        video.write(root / "edge" / f"{n}.mp4", Edge("low")(clip), 8.0, quality="lossless")
        video.write(root / "vis" / f"{n}.mp4", Vis("low")(clip), 8.0, quality="lossless")
    return root


def evaluated(out: Path, *words: str) -> dict:
    assert main(["evaluate", *words, "--out", str(out), "--num", str(NUM // 2), "--sets", "2"]) == 0
    return json.loads(out.read_text())


def test_a_scorer_in_a_file_of_ones_own_scores_clips_of_any_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    words = (str(folder), "--config", str(tmp_path / "mine.py"), "--scorer", "my_contrast", "scale=0.5")
    record = evaluated(tmp_path / "scores.json", *words)
    value = record["scores"]["contrast"]
    each = [0.5 * float(video.read(folder / "videos" / f"{n}.mp4").frames.std()) for n in range(NUM)]
    assert value["value"] == pytest.approx(np.mean(each)) and value["num"] == NUM and value["spread"] > 0
    assert value["per_set"] == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])
    assert record["legend"] == [
        {
            "name": "contrast",
            "title": "Contrast",
            "meaning": "Standard deviation of all pixels of a clip.",
            "better": "as real",
            "is_headline": True,
        },
        {
            "name": "range",
            "title": "Range",
            "meaning": "Difference between the largest and the smallest contrast.",
            "better": "lower",
            "is_headline": False,
        },
    ]
    assert record["scorers"] == [{"kind": "my_contrast", "scale": 0.5}] and record["notes"] == ["(9, 24, 40, 3)"]
    assert f"contrast {value['value']:.3g} +- " in capsys.readouterr().out
    assert video.read(tmp_path / "scores" / "00.mp4").frames.shape == (FRAMES, *SIZE, 3)


def test_a_scorer_of_ones_own_is_paired(folder: Path, tmp_path: Path) -> None:
    """By what its record keeps: contrast of each clip, and the range of random halves."""
    (tmp_path / "mine.py").write_text(MINE.replace("my_contrast", "my_paired"))
    contrasts: list[list[float]] = []
    for name, factor in (("a", 0.5), ("b", 0.9)):
        for n in range(NUM):
            clip = (factor * video.read(folder / "videos" / f"{n}.mp4").frames).astype(np.uint8)
            video.write(tmp_path / name / f"{n}.mp4", clip, 8.0, quality="lossless")
        words = ("--config", str(tmp_path / "mine.py"), "--scorer", "my_paired", "--out", str(tmp_path / f"{name}_scores.json"))
        assert main(["evaluate", str(tmp_path / name), *words, "--sets", "1"]) == 0
        contrasts.append([float(video.read(tmp_path / name / f"{n}.mp4").frames.std()) for n in range(NUM)])
    files = [str(tmp_path / f"{name}_scores.json") for name in "ab"]
    assert main(["evaluate", "--compare", *files, "--out", str(tmp_path / "ab.json")]) == 0
    rows = {row["score"]: row for row in json.loads((tmp_path / "ab.json").read_text())["differences"]}
    assert rows["contrast"]["how"] == "clip by clip" and rows["range"]["how"] == "same halves"
    assert rows["range"]["difference"] == pytest.approx(np.ptp(contrasts[1]) - np.ptp(contrasts[0]))
    picks = [half.numpy() for half in halves(NUM, 20)]
    differences = [np.ptp(np.array(contrasts[1])[pick]) - np.ptp(np.array(contrasts[0])[pick]) for pick in picks]
    error = np.std(differences, ddof=1)
    reach = student_quantile(1 / (1 / 19 + 1 / (NUM - 1))) * error
    assert rows["range"]["high"] - rows["range"]["difference"] == pytest.approx(reach)


def test_clips_keep_the_controls_that_were_made_of_them_and_others_do_not(folder: Path, tmp_path: Path) -> None:
    same = evaluated(tmp_path / "same.json", str(folder), "--scorer", "control", "preset=low")["scores"]
    assert same["edge_f1"]["value"] == 1 and same["edge_recall"]["value"] == 1
    assert same["vis_ssim"]["value"] > 0.99
    assert {name: score["num"] for name, score in same.items()} == {"edge_f1": 6, "edge_recall": 6, "vis_ssim": 6}
    others = tmp_path / "others"  # the clips in another order: each is compared with the controls of another one
    for n in range(NUM):
        video.write(others / "videos" / f"{n}.mp4", scene((n + 1) % NUM), 8.0, quality="lossless")
    words = (str(others), "--prompts", str(folder), "--scorer", "control", "preset=low")
    apart = evaluated(tmp_path / "apart.json", *words)["scores"]
    assert apart["edge_f1"]["value"] < 0.6 and apart["vis_ssim"]["value"] < same["vis_ssim"]["value"] - 0.02
    assert apart["edge_f1"]["spread"] > 0
    only = evaluated(tmp_path / "only.json", *words, "--control", "edge")["scores"]
    assert sorted(only) == ["edge_f1", "edge_recall"] and only["edge_f1"] == apart["edge_f1"]


def test_depth_and_objects_are_compared_with_those_measured_on_the_clips(folder: Path, tmp_path: Path) -> None:
    wanted, made = tmp_path / "wanted", tmp_path / "made"
    rng = np.random.default_rng(0)
    for n in range(NUM):
        depth = np.repeat(rng.integers(20, 120, (FRAMES, *SIZE, 1), dtype=np.uint8), 3, axis=-1)
        mask = np.zeros((FRAMES, *SIZE), bool)
        mask[:, 4:12, 4:20] = True
        for root, factor, shift in ((wanted, 1, 0), (made, 2, 4)):  # twice as near, and moved by a quarter of the width
            video.write(root / "videos" / f"{n}.mp4", scene(n), 8.0, quality="lossless")
            video.write(root / "depth" / f"{n}.mp4", factor * depth, 8.0, quality="lossless")
            masks.write(root / "seg" / f"{n}.pickle", [("box", np.roll(mask, shift, axis=2))])
    words = ("--scorer", "control", "--prompts", str(wanted))
    scores = evaluated(tmp_path / "a.json", str(made), *words)["scores"]
    assert scores["depth_rmse"]["value"] == pytest.approx(0, abs=0.01)  # a factor costs nothing; the file rounds its colours
    assert scores["seg_iou"]["value"] == pytest.approx(12 / 20) and scores["seg_recall"]["value"] == 1
    for path in (made / "depth").iterdir():
        path.unlink()
    record = evaluated(tmp_path / "b.json", str(made), *words)
    assert "depth_rmse" not in record["scores"]
    assert record["notes"] == [
        "depth: 3 of 3 clips have no file to compare; measure theirs with: fewstep prepare controls DIR --type depth."
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--scorer", "contrl"), "scorer: no scorer is named 'contrl'; did you mean control?"),
        (("--scorer", "control", "preset=loww"), "scorer.preset: "),
        ((), "--num 3: a set needs at least 4 clips"),
        (("--num", "4"), "--real: this scorer compares with real clips; give their folder"),
        (("--features", "resnet"), "no features is named 'resnet'"),
        (("--features", "transnet", "--scorer", "control"), "--features is for the scorer clips, not for control"),
        (("preset=low",), "preset=low: is a setting of a scorer: say which with --scorer NAME"),
        (("--scorer", "toyworld"), "--num 3: a set needs at least 12 clips"),
        (("--scorer", "control", "--control", "edg"), "--control edg: there are depth, edge"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_refused_before_a_clip_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    assert main(["evaluate", str(folder), "--out", str(tmp_path / "x.json"), "--num", "3", *words]) != 0
    assert text in capsys.readouterr().err
