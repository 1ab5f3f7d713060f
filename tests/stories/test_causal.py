"""FastGen's three stages by documented commands: the student streams clips longer than those it was trained on."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.networks.encoders.streaming import StreamingDecoder

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines
from shell import IN_BOTH_FORMS, walk


@IN_BOTH_FORMS
@pytest.mark.parametrize("family", ["wan", pytest.param("predict25", marks=pytest.mark.slow)])
def test_pairs_causal_kd_bridge_self_forcing(tmp_path: Path, real: bool, family: str) -> None:
    teacher = tiny_pipelines.PIPELINES[family](tmp_path / family)
    walk("causal.sh", tmp_path, real=real, TEACHER=str(teacher), NAME=family)
    card = json.loads((tmp_path / "student" / "student.json").read_text())
    assert card["network"]["kind"] == "causal" and card["sampler"]["by_chunk"] == {"first_times": None, "context_noise": 0.0}
    assert card["sampler"]["times"] == [0.999, 0.937, 0.833, 0.624]
    film, streamed = (video.read(tmp_path / folder / "output.mp4").frames for folder in ("clips", "streamed"))
    assert len(film) == 33 and np.array_equal(film, streamed)
    figures = json.loads((tmp_path / "streamed" / "output.json").read_text())["stream"]
    assert figures["chunks"] == 9 and figures["chunks_in_rates"] == 6  # a span of three chunks has filled
    assert figures["end_to_end_fps"] < figures["denoise_fps"]
    switched = video.read(tmp_path / "switched" / "output.mp4").frames
    assert np.array_equal(switched[:17], film[:17])
    assert len(switched) == 33 and not np.array_equal(switched[17:], film[17:])
    if not real and family == "wan":
        _interrupted(tmp_path, teacher, film)


def _interrupted(folder: Path, teacher: Path, film: np.ndarray) -> None:
    """Ctrl-C in the third chunk: the frames made so far are a clip that plays, and the same command makes it whole."""
    words = ["generate", str(folder / "student"), "--codec", str(teacher), "--text-encoder", str(teacher), "--stream"]
    words += ["--out", str(folder / "broken"), "--prompt", "a red square moves up", "--num-frames", "33"]
    words += ["--height", "32", "--width", "32", "--quality", "lossless"]
    decode = StreamingDecoder.__call__

    def broken(decoder: StreamingDecoder, latents: torch.Tensor) -> torch.Tensor:
        if decoder.num_latents == 2:
            raise KeyboardInterrupt
        return decode(decoder, latents)

    with patch.object(StreamingDecoder, "__call__", broken):
        assert main(words) == 1
    clip, about = folder / "broken" / "output.mp4", folder / "broken" / "output.json"
    assert np.array_equal(video.read(clip).frames, film[:5])
    assert json.loads(about.read_text())["frames"] == 5 and json.loads(about.read_text())["interrupted"]
    assert sorted(path.name for path in clip.parent.iterdir()) == ["output.json", "output.mp4", "output.txt"]
    assert main(words) == 0
    assert np.array_equal(video.read(clip).frames, film) and "interrupted" not in json.loads(about.read_text())
