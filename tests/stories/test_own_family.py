"""A network family and a scorer, each in a file of a user's own: trained, exported, sampled and scored by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main
from fewstep.data.files import video
from fewstep.diffusion import features
from fewstep.inference.model import open_model
from fewstep.networks.encoders.words import WordsConfig, WordsEncoder, WordsModel

NETWORK = Path(__file__).parents[2] / "examples" / "my_network.py"
SCORER = '''
from dataclasses import dataclass

from fewstep.config import kind
from fewstep.evaluation import Record, Score, Scorer, mean_over_clips


@kind("my_brightness", group="scorer")
@dataclass(frozen=True)
class Brightness(Scorer):
    """How bright clips are."""

    legend = (Score("brightness", "Brightness", "Mean of all pixels of a clip.", "as real", is_headline=True),)

    def score(self, samples, reference):
        return Record("pixels", {"brightness": mean_over_clips([float(clip.mean()) for clip in samples.clips])})
'''
TINY = ("latent_channels=2", "num_heads=2", "head_dim=12", "num_layers=3", "text_dim=8")


def pipeline(folder: Path) -> Path:
    """A pipeline's folder with a small codec and a text encoder, for the student to be completed with."""
    from diffusers import AutoencoderKLCosmos, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0],
    ).save_pretrained(folder / "vae")  # fmt: skip
    words = WordsConfig(("a", "red", "ball"), dim=8, num_layers=1, num_heads=2, max_tokens=6)
    WordsEncoder(WordsModel(words).eval()).save(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "LTXPipeline", "vae": ["diffusers", "AutoencoderKLCosmos"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_family_and_a_scorer_of_ones_own_walk_from_training_to_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))
    config = ["--config", str(NETWORK)]
    train = [
        "experiment=my_ltx_dmd2",
        *(f"networks.teacher.{word}" for word in TINY),
        "data.shape=[2,3,4,4]",
        "data.text=[6,8]",
    ]
    train += ["method.student.t_list=[1.0,0.75]", "method.student.renoise=ode"]
    train += ["trainer.max_iter=2", "trainer.batch_size=2", "trainer.num_threads=1", "data.num=4"]
    assert main(["train", *config, *train]) == 0
    run, student = tmp_path / "runs" / "examples" / "my" / "my_ltx_dmd2", tmp_path / "student"
    base = pipeline(tmp_path / "base")
    assert main(["export", str(run), "--out", str(student), "--base", str(base), "--format", "diffusers", *config]) == 0
    clip = ["--num-frames", "9", "--height", "16", "--width", "16", "--fps", "8", "--prompt", "a red ball"]
    assert main(["generate", str(student), *clip, "--out", str(tmp_path / "clips" / "videos"), "--device", "cpu", *config]) == 0
    assert video.read(tmp_path / "clips" / "videos" / "output.mp4").frames.shape == (9, 16, 16, 3)

    (tmp_path / "scorer.py").write_text(SCORER)
    words = ["--scorer", "my_brightness", "--config", str(tmp_path / "scorer.py"), "--num", "1", "--sets", "1"]
    assert main(["evaluate", str(tmp_path / "clips"), "--out", str(tmp_path / "scores.json"), *words]) == 0
    assert 0 < json.loads((tmp_path / "scores.json").read_text())["scores"]["brightness"]["value"] < 255
    capsys.readouterr()

    # As a teacher: found by the class in its folder. It refuses first frames, and blocks behind a tap do not run.
    model = open_model(base_with(student, base))
    net: Any = model.network
    assert model.is_teacher and main(["generate", str(base), *clip, "--input", "x.mp4", "--device", "cpu", *config]) == 2
    assert "x.mp4" in capsys.readouterr().err
    x, t = torch.randn(1, 2, 3, 4, 4), torch.tensor([0.4], dtype=torch.float64)
    from fewstep.batch import Condition

    cond = Condition(text=torch.randn(1, 6, 8))
    whole, alone = net(x, t, cond, taps=(1,)).features, features(net, x, t, cond, (1,))
    assert torch.equal(whole[0], alone[0]) and net.traits.first_frames == "none"
    with pytest.raises(ValueError, match="cannot be given first frames"):
        net.begin(cond, None)


def base_with(student: Path, base: Path) -> Path:
    """The pipeline, completed with the student's network: a teacher."""
    (student / "transformer").rename(base / "transformer")
    return base
