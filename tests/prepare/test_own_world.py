"""A small world of one's own by public commands: free captions to a text encoder, clips of any size to a codec, then data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.cli import main as cli
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.prepare.words import vocabulary

CAPTIONS = ("Walking backward; a brown corridor.", "Turning left, 2 doors ahead!", "walking backward, doors")


def world(root: Path, num: int = 3, frames: int = 10) -> None:
    """Grey gradients that drift, 20 x 24."""
    y, x = np.mgrid[0:20, 0:24]
    (root / "metas").mkdir(parents=True)
    for n in range(num):
        clip = np.stack([np.stack([(4 * x + 6 * t + 40 * n) % 256, (5 * y) % 256, 0 * x + 90], -1) for t in range(frames)])
        video.write(root / "videos" / f"{n}.mp4", clip.astype(np.uint8), 12.0)
        (root / "metas" / f"{n}.txt").write_text(CAPTIONS[n % 3] + "\n")


def test_the_words_of_free_captions() -> None:
    words = vocabulary(CAPTIONS)
    assert words[:3] == (",", "backward", "doors") and set(words) >= {";", "!", "2", ".", "corridor"}


def test_a_world_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_ROOT", "runs")
    world(tmp_path / "clips")
    assert cli(["prepare", "words", "clips", "--out", "words", "--iters", "60", "--dim", "16"]) == 0
    assert "words of 3 captions" in capsys.readouterr().out
    assert cli(["prepare", "words", "clips", "--out", "words", "--dim", "16"]) == 0  # rerun: nothing to do
    assert "words: is there, with the 14 words of these captions" in capsys.readouterr().out
    assert cli(["prepare", "text", "clips", "--text-encoder", "words"]) == 0
    encoder = open_text_encoder("words")
    assert encoder.dim == 16
    with pytest.raises(ValueError, match="has no word for dragon"):
        encoder.encode(["a dragon"])
    assert cli(["prepare", "codec", "clips", "--out", "codec", "--iters", "2", "--batch-size", "2"]) == 0
    assert "trained on 3 windows of 9 x 16 x 24" in capsys.readouterr().out
    assert cli(["prepare", "codec", "clips", "--out", "codec"]) == 1
    assert "codec: is there already" in capsys.readouterr().err
    size = ["--num-frames", "9", "--height", "16", "--width", "24", "--resize", "crop"]
    assert cli(["prepare", "latents", "clips", "--codec", "codec", *size]) == 0
    assert "3 windows of 3 clips" in capsys.readouterr().err
    batch = Folder("clips", x0="latents", mask_text=True, max_tokens=40).open().batch(torch.arange(3))
    assert batch.x0 is not None and batch.x0.shape == (3, 8, 3, 2, 3)
    torch.testing.assert_close(batch.x0.std((0, 2, 3, 4)), torch.ones(8), rtol=0.1, atol=0)  # measured on these very clips
    assert cli(["prepare", "codec", "clips", "--out", "other", "--num-frames", "12"]) == 2
    assert "--num-frames 12: a tokenizer of 4 frames to a latent takes 1 + k * 4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_codec_of_ones_own_reconstructs_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_ROOT", "runs")
    world(tmp_path / "clips", 6)
    assert cli(["prepare", "codec", "clips", "--out", "codec", "--iters", "150", "--batch-size", "4"]) == 0
    codec = open_codec("codec")
    pixels = Folder("clips", text=None, num_frames=9, video_size=(16, 24), resize="crop", start_frame_interval=9).open()
    x0 = pixels.batch(torch.arange(6)).x0
    assert x0 is not None
    error = (codec.decode(codec.encode(x0)).clamp(-1, 1) - x0).square().mean()
    assert 10 * float(torch.log10(4 / error)) > 15
