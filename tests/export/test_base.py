"""A codec and a text encoder in folders of their own become parts of a student's folder, which read as those do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "stories"))
import materials

from fewstep.export.base import Base
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A tokenizer of videos with its statistics in a file beside it, as originally, and a T5 with its words."""
    materials.cosmos_codec(tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_mean": None, "latents_std": None}))
    torch.manual_seed(0)
    torch.save((torch.randn(2 * 4), 1 + torch.rand(2 * 4)), config.with_name("mean_std.pt"))  # two channels, four latent frames
    materials.t5(tmp_path / "t5")
    return tmp_path


def test_parts_of_their_own_read_as_their_sources(sources: Path) -> None:
    out, index = sources / "student", dict[str, Any]()
    out.mkdir()
    base = Base.of(None, str(sources / "tokenizer"), str(sources / "t5"))
    assert base.copy_parts(out, index) == ""
    (out / "model_index.json").write_text(json.dumps({"_class_name": "X", **index}))
    assert index["vae"] == ["diffusers", "AutoencoderKLCosmos"] and index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "text_encoder", "tokenizer", "vae"]
    ours, theirs = open_codec(out), open_codec(sources / "tokenizer")
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.std, theirs.std) and float(theirs.std.std()) > 0
    pixels = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    torch.testing.assert_close(ours.encode(pixels), theirs.encode(pixels), rtol=0, atol=0)
    words = ["a red ball rolls", ""]
    for one, other in zip(open_text_encoder(out).encode(words), open_text_encoder(sources / "t5").encode(words), strict=True):
        assert torch.equal(one, other)


def test_parts_replace_those_of_a_pipeline(sources: Path) -> None:
    """The words of another encoder come along; what was not replaced is the pipeline's."""
    materials.wan_codec(sources / "pipeline")
    materials.t5(sources / "pipeline" / "text_encoder")
    materials.t5(sources / "pipeline" / "tokenizer")
    parts = {"vae": "AutoencoderKLWan", "text_encoder": "T5EncoderModel", "tokenizer": "PreTrainedTokenizerFast"}
    materials.pipeline(sources / "pipeline", "WanPipeline", **parts)
    torch.manual_seed(3)
    other = sources / "other"
    materials.t5(other, dim=16)
    out, index = sources / "student", dict[str, Any]()
    out.mkdir()
    assert Base.of(sources / "pipeline", None, str(other)).copy_parts(out, index) == "WanPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert (out / "text_encoder" / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not (out / "tokenizer" / "model.safetensors").exists()


def test_a_part_without_weights_or_of_an_unknown_class_is_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (sources / "t5" / "model.safetensors").rename(sources / "t5" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has its weights as a pickle only"):
        Base.of(None, None, str(sources / "t5")).copy_parts(tmp_path / "student", {})
    config = sources / "tokenizer" / "vae" / "config.json"
    config.write_text(json.dumps({"_class_name": "Evil"}))
    with pytest.raises(ValueError, match="no codec of ours, its _class_name is Evil"):
        Base.of(None, str(sources / "tokenizer")).copy_parts(tmp_path / "student", {})
