"""FastGen's three stages by documented commands: the student streams clips longer than those it was trained on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.files import video

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines
from shell import IN_BOTH_FORMS, walk


@IN_BOTH_FORMS
@pytest.mark.parametrize("family", ["wan", pytest.param("predict25", marks=pytest.mark.slow)])
def test_pairs_causal_kd_bridge_self_forcing(tmp_path: Path, real: bool, family: str) -> None:
    teacher = tiny_pipelines.PIPELINES[family](tmp_path / family)
    walk("causal.sh", tmp_path, real=real, TEACHER=str(teacher), NAME=family)
    card = json.loads((tmp_path / "student" / "student.json").read_text())
    assert card["network"]["kind"] == "causal" and card["by_chunk"] == {"first_times": None, "context_noise": 0.0}
    assert card["times"] == [0.999, 0.937, 0.833, 0.624]
    film, streamed = (video.read(tmp_path / folder / "output.mp4").frames for folder in ("clips", "streamed"))
    assert len(film) == 33 and np.array_equal(film, streamed)
    figures = json.loads((tmp_path / "streamed" / "output.json").read_text())["stream"]
    assert figures["chunks"] == 9 and figures["chunks_in_rates"] == 6  # a span of three chunks has filled
    assert figures["end_to_end_fps"] < figures["denoise_fps"]
