"""An evaluation that is killed and continued, or divided over processes, gives the scores of an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.evaluation import measured
from fewstep.evaluation.clips import AnyClips
from fewstep.evaluation.features.descriptors import Descriptors

NUM = 14


def drifting(seed: int, num_frames: int = 5, size: int = 32) -> NDArray[np.uint8]:
    """A texture that drifts."""
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.uniform(0, 255, (size, size + 2 * num_frames, 3)), (0, 0), 1.5)
    wide = 255 * (wide - wide.min()) / np.ptp(wide)
    return np.stack([wide[:, 2 * n : 2 * n + size] for n in range(num_frames)]).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for n in range(NUM):
        video.write(root / "made" / f"{n:02d}.mp4", drifting(n, 5 + n % 2), 8.0, quality="lossless")
        video.write(root / "real" / f"{n:02d}.mp4", drifting(100 + n), 8.0, quality="lossless")
    return root


def evaluated(folders: Path, out: Path, *words: str) -> dict[str, Any] | None:
    where = (str(folders / "made"), "--real", str(folders / "real"), "--out", str(out), "--sets", "2", "--num", "7")
    assert main(["evaluate", *where, "--features", "descriptors", "--batch-size", "3", *words]) == 0
    return json.loads(out.read_text()) if out.is_file() else None


@pytest.fixture(scope="module")
def undisturbed(folders: Path) -> dict[str, Any]:
    record = evaluated(folders, folders / "one" / "scores.json")
    assert record is not None
    return record


def test_a_killed_evaluation_goes_on_and_measures_no_clip_twice(
    folders: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "WRITE_S", 0.0)
    rows: list[int] = []
    features = Descriptors.features

    def counted(extractor: Descriptors, clips: NDArray[np.uint8]) -> Any:
        if 1000 not in rows and sum(rows) > 14 + 7 + 2:  # within the second set, after the real clips and the first one
            rows.append(1000)
            raise KeyboardInterrupt
        rows.append(len(clips))
        return features(extractor, clips)

    monkeypatch.setattr(Descriptors, "features", counted)
    out = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        evaluated_raw(folders, out)
    assert not out.exists() and list((tmp_path / "scores").glob("measured-*"))
    before = sum(row for row in rows if row < 1000)
    again = evaluated(folders, out)
    assert sum(row for row in rows if row < 1000) == 14 + 14 > before  # each clip once: real ones, and those of both sets
    assert again == undisturbed  # bit for bit, through JSON
    assert not list((tmp_path / "scores").glob("measured-*"))
    assert sorted(path.name for path in (tmp_path / "scores").glob("*.mp4")) == sorted(
        path.name for path in (folders / "one" / "scores").glob("*.mp4")
    )


def evaluated_raw(folders: Path, out: Path) -> None:
    """As `evaluated`, past the command line, which makes a message of an interrupt."""
    from fewstep.inference.evaluate import run
    from fewstep.inference.evaluation import Evaluation

    scorer = AnyClips((Descriptors(),))
    run(Evaluation(str(folders / "made"), None, str(folders / "real"), out, 7, 2, batch_size=3, scorers=(scorer,)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_give_what_one_does_and_the_last_one_writes(
    folders: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    out = tmp_path / "scores.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(order[0]))
    assert evaluated(folders, out) is None
    monkeypatch.setenv("RANK", str(order[1]))
    record = evaluated(folders, out)
    assert record is not None and record["protocol"] == undisturbed["protocol"]
    for own, whole in zip(record["sets"], undisturbed["sets"], strict=True):
        assert own["stems"] == whole["stems"]
        for name, column in whole["per_clip"].items():
            assert own["per_clip"][name] == pytest.approx(column, rel=1e-9), name
    for name, score in undisturbed["scores"].items():
        assert record["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-9, abs=1e-12), name
        assert record["scores"][name]["spread"] == pytest.approx(score["spread"], rel=1e-6, abs=1e-12), name


def test_the_protocol_of_one_model_scores_the_next_and_refuses_other_clips(
    folders: Path, undisturbed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = folders / "one" / "scores" / "protocol.yaml"
    out = tmp_path / "again.json"
    words = ("evaluate", str(folders / "made"), "--out", str(out), "--protocol")
    assert main([*words, str(protocol)]) == 0
    assert json.loads(out.read_text())["protocol"] == undisturbed["protocol"]
    assert main([*words, str(protocol), "--sets", "1"]) == 2
    assert "--sets: is fixed by --protocol" in capsys.readouterr().err
    settings = yaml.safe_load(protocol.read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**settings, "real": str(folders / "made")}))
    assert main([*words, str(tmp_path / "other.yaml")]) == 2
    assert "real changed since it was written" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**settings, "nums": 3}))
    assert main([*words, str(tmp_path / "wrong.yaml")]) == 2
    assert "nums" in capsys.readouterr().err
