"""`fewstep generate` names what does not fit before it reads weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.cli import main as cli
from fewstep.data.files import arrays

sys.path.insert(0, str(Path(__file__).parent))
from generating import SIZE, made, write_picture


def test_a_word_that_the_text_encoder_does_not_know_is_refused_before_the_network_is_opened(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was opened")

    monkeypatch.setattr("fewstep.inference.model.Outline.open", refuse)
    with pytest.raises(ValueError, match="has no word for purple"):
        made(tmp_path, str(student), "--prompt", "a purple ball")


def test_beyond_the_envelope_it_warns_and_against_its_training_it_refuses(student: Path, teacher: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made(
        tmp_path / "a",
        str(student),
        "--prompt",
        "a ball",
        "--height",
        "32",
        "--num-frames",
        "5",
        "--sampler",
        "heun",
        "--negative-prompt",
        "red",
        told=told,
    )
    said = "\n".join(told)
    assert "5 frames: this student was trained on 9" in said
    assert "32 pixels high: this student was trained on 16" in said
    assert "--sampler has no effect" in said and "--negative-prompt has no effect" in said
    with pytest.raises(ValueError, match=r"--num-steps 8: this student takes 2.*guidance w = 3: .*--force"):
        made(tmp_path / "b", str(student), "--prompt", "a ball", "--num-steps", "8", "--guidance", "3")
    told.clear()
    forced = ["--num-steps", "3", "--guidance", "2", "--force"]
    assert made(tmp_path / "b", str(student), "--prompt", "a ball", "--negative-prompt", "red", *forced, told=told) == 1
    assert "warning: --num-steps 3" in told[0] and "--negative-prompt" not in "".join(told)
    with pytest.raises(ValueError, match="is a teacher"):
        made(tmp_path / "c", str(teacher), "--prompt", "a ball", "--use_distilled", *SIZE)
    with pytest.raises(ValueError, match="does not say what clips it makes: give --num-frames, --height, --width"):
        made(tmp_path / "c", str(teacher), "--prompt", "a ball")


def test_mistakes_are_told_before_anything_is_read(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--input .*none\.mp4: no such file \(for clip 'output'\)"):
        made(tmp_path, "no/such/model", "--prompt", "a", "--input", "none.mp4")
    with pytest.raises(ValueError, match="no model at"):
        made(tmp_path, str(tmp_path / "nothing"), "--prompt", "a")
    rows = "\n".join(json.dumps({"prompt": "a ball", "name": "same"}) for _ in range(2))
    (tmp_path / "p.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="two clips are called 'same'"):
        made(tmp_path, str(student), "--prompts", str(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match="--num-input-frames 2: this codec takes 1"):
        made(tmp_path / "o", str(student), "--prompt", "a", "--input", str(write_picture(tmp_path)), "--num-input-frames", "2")
    assert cli(["generate", str(student), "--prompt", "a purple ball", "--out", str(tmp_path / "o")]) == 1
    assert "has no word for purple" in capsys.readouterr().err
    assert cli(["generate", str(student), "--promt", "a"]) == 2


def _without_weights(folder: Path, place: Path) -> Path:
    """A copy in which no file of weights is: whatever is said of it, nothing large was read."""
    return Path(shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt")))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("student", "--num-steps 8 --guidance 3", "--num-steps 8: this student takes 2.*guidance w = 3"),
        ("student", "--num-frames 10 --chunk-frames 10", r"10 frames do not fit; it takes 1 \+ k \* 4: 9 or 13"),
        ("student", "--height 18", "18 x 16 pixels do not fit; both sides must be multiples of 4"),
        ("student", "--width 20", r"--width 20: .* makes multiples of 8 pixels, 16 or 24 for instance"),
        ("student", "--control edge --input IN", "control 'edge': this network is led by no control"),
        ("student", "--input IN --num-input-frames 2", r"--num-input-frames 2: this codec takes 1 \+ k \* 4"),
        ("student", "--input IN --num-input-frames 9", "nothing is left to be made of 9 frames"),
        ("student", "--num-frames 17 --overlap 2", "--overlap 2: this codec takes 1"),
        ("teacher", "", "does not say what clips it makes: give --num-frames, --height, --width"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --sigma-max 70", "--sigma-max has no effect on this teacher"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --guidance-low 3", "no pair of experts"),
        ("teacher", "--num-frames 9 --height 16 --width 16 --use-distilled", "is a teacher"),
        ("teacher", "--num-frames 9 --height 15 --width 16", "15 x 16 pixels do not fit"),
    ],
)
def test_a_call_that_does_not_fit_is_named_before_weights_are_read(
    model: str, arguments: str, message: str, student: Path, teacher: Path, clip: Path, tmp_path: Path
) -> None:
    folder = _without_weights(student if model == "student" else teacher, tmp_path / "model")
    words = arguments.replace("IN", str(clip)).split()
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "out", str(folder), "--prompt", "a ball", *words)


def test_what_is_beyond_the_envelope_is_named_before_weights_are_read(student: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match="text_encoder: cannot be opened"):
        folder = str(_without_weights(student, tmp_path / "model"))
        made(tmp_path / "out", folder, "--prompt", "a ball", "--width", "32", "--fps", "30", "--shift", "3", told=told)
    assert "--shift has no effect" in told[0] and "32 pixels wide" in told[1] and "30 frames per second" in told[2]


def test_a_codec_of_other_channels_and_texts_of_others_are_named(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("fewstep.inference.model.Outline.open", refuse)
    arrays.write_pickle(tmp_path / "e.pickle", [np.zeros((4, 7), np.float32)])
    with pytest.raises(ValueError, match="its embeddings have 7 channels, but this network reads 8"):
        made(tmp_path, str(student), "--embedding", str(tmp_path / "e.pickle"))
    config = json.loads((teacher / "vae" / "config.json").read_text()) | {"latent_channels": 3}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}))
    with pytest.raises(ValueError, match=r"its latents have 3 channels, but .* works on 2\. Give the codec"):
        made(tmp_path, str(teacher), "--prompt", "a ball", *SIZE, "--codec", str(tmp_path / "vae"))
