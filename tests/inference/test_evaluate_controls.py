"""`fewstep evaluate MODEL --control NAMES`: what a model of several branches receives, and what its clips are scored for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep.cli import main
from fewstep.data.files import video
from fewstep.evaluation.fidelity import ANNOTATED, SAME, UNRELATED
from fewstep.inference.evaluate import line

NUM = 6
SCORES = {
    "edge": ["edge_f1", "edge_recall"],
    "vis": ["vis_ssim"],
    "depth": ["depth_rmse"],
    "seg": ["seg_iou", "seg_recall"],
    "keypoint": ["keypoint_distance", "keypoint_pck"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scenes."""
    root = tmp_path_factory.mktemp("controls")
    assert main(["prepare", "toyworld", "--out", str(root / "held"), "--num", str(NUM), "--seed", "7400003"]) == 0
    return root


def evaluated(root: Path, model: str | Path, name: str, *words: str) -> dict[str, Any]:
    out = root / "scores" / f"{name}.json"
    sampling = ("--num-steps", "2", "--guidance", "1", "--max-tokens", "40", "--mask-text", "--sets", "1")
    assert main(["evaluate", str(model), "--prompts", str(root / "held"), "--out", str(out), *sampling, *words]) == 0
    return json.loads(out.read_text())


def test_all_controls_are_scored_on_generated_clips_with_three_anchors_each(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = evaluated(root, fewstep.TOY, "all", "--control", ",".join(SCORES))
    said = capsys.readouterr().out.splitlines()
    names = [name for scores in SCORES.values() for name in scores]
    assert set(record["scores"]) == set(names) and not any("no file" in note for note in record["notes"])
    anchors = record["anchors"]
    assert all(set(anchors[title]) == set(names) for title in (SAME, ANNOTATED, UNRELATED))
    assert record["measured_by"] == "control fidelity (edge medium, vis very_low)"  # those with which the files were made
    for name in names:
        best, annotated, chance = (anchors[title][name]["value"] for title in (SAME, ANNOTATED, UNRELATED))
        is_lower = name in ("depth_rmse", "keypoint_distance")
        assert best == (0 if is_lower else 1)
        assert (annotated < chance) if is_lower else (annotated > chance), name  # the annotator tells clips apart
    for title in (SAME, ANNOTATED, UNRELATED):  # below the scores, for whoever reads the terminal alone
        (shown,) = (text for text in said if text.startswith(f"  {title}: "))
        assert f"edge_f1 {anchors[title]['edge_f1']['value']:.3g}" in shown and "edge_recall" not in shown
    student = record | {"num_calls": 4}
    assert "its teacher: the same command" in line({key: value for key, value in student.items() if key != "sampler"})
    assert "its teacher" not in line(record)
    assert anchors[ANNOTATED]["edge_f1"]["value"] == anchors[ANNOTATED]["vis_ssim"]["value"] == 1  # files are lossless


@pytest.mark.slow
def test_a_model_of_three_branches_receives_the_controls_that_are_named_and_no_other(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given the edges alone, its clips are those of the model that has no other branch.

    Given none, a folder whose index names the base alone is the base; one that is nothing without its branches is refused."""
    shutil.copytree(fewstep.TOY, root / "three")
    for name in ("depth", "vis"):
        shutil.copytree(fewstep.TOY / "controlnet_edge", root / "three" / f"controlnet_{name}", dirs_exist_ok=True)
    evaluated(root, fewstep.TOY, "one", "--control", "edge")
    evaluated(root, root / "three", "three_edge", "--control", "edge")
    evaluated(root, root / "three", "three_all", "--control", "edge,depth,vis")
    clips = {
        name: [video.read(root / "scores" / name / f"{n:02d}.mp4").frames for n in range(NUM)]
        for name in ("one", "three_edge", "three_all")
    }
    assert all((a == b).all() for a, b in zip(clips["one"], clips["three_edge"], strict=True))
    assert all((a != b).any() for a, b in zip(clips["one"], clips["three_all"], strict=True))
    words = ("--prompts", str(root / "held"), "--out", str(root / "x.json"))
    index = json.loads((root / "three" / "model_index.json").read_text())
    (root / "three" / "model_index.json").write_text(
        json.dumps({**index, "controlnet_edge": ["diffusers", "CosmosControlNetModel"]})
    )
    assert main(["evaluate", str(root / "three"), *words, "--control", "seg"]) == 2
    assert f"--control: {root / 'three'} is conditioned on depth, edge, vis; name" in capsys.readouterr().err
