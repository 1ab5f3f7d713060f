"""The toy world's text encoder: what it reads, what padding does to it, what it learned, and that files bring it back whole."""

import json
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.encoders.words import GAP, WordsConfig, WordsEncoder, WordsModel, open_words
from fewstep.prepare.words import train
from fewstep.toyworld.captions import VOCABULARY

SHIPPED = fewstep.TOY / "text_encoder"
CAPTIONS = ["a red sphere is thrown to the right, a blue box slides to the left. They collide.", "a green box is dropped."]


def tiny() -> WordsEncoder:
    torch.manual_seed(0)
    model = WordsModel(WordsConfig(VOCABULARY, dim=16, num_layers=1, num_heads=2))
    return WordsEncoder(model.eval().requires_grad_(False))


def test_an_embedding_is_the_same_alone_and_beside_a_longer_caption() -> None:
    encoder = tiny()
    both, mask = encoder.encode(CAPTIONS)
    alone, _ = encoder.encode(CAPTIONS[1:])
    num = alone.shape[1]
    assert mask.sum(1).tolist() == [20, 6]
    torch.testing.assert_close(both[1, :num], alone[0], atol=1e-6, rtol=0)
    assert not both[1, num:].any()


def test_tokens_are_words_and_punctuation_in_their_order() -> None:
    encoder = tiny()
    words = encoder.module.config.words
    assert [words[i - 2] for i in encoder.tokens("A red box, dropped.")] == ["a", "red", "box", ",", "dropped", "."]


def test_unknown_words_and_long_prompts_are_refused_by_name() -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match=r"no word for crimson, dragon; it knows \. , a the"):
        encoder.encode(["a crimson dragon"])
    with pytest.raises(ValueError, match="is 41 tokens long, this encoder reads 40"):
        encoder.encode(["a " * 41])
    with pytest.raises(ValueError, match="no prompt"):
        encoder.encode([])


def test_an_empty_prompt_is_one_gap() -> None:
    encoder = tiny()
    embeddings, mask = encoder.encode([""])
    assert mask.tolist() == [[True]]
    torch.testing.assert_close(embeddings, encoder.module(torch.tensor([[GAP]])))


def test_files_bring_back_the_very_encoder(tmp_path: Path) -> None:
    encoder = tiny()
    encoder.save(tmp_path)
    again = open_text_encoder(tmp_path)
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="is not of a text encoder of words"):
        open_words(tmp_path)


def test_training_learns_the_language() -> None:
    # Two captions that differ in one word each: whoever knows the grammar can fill any other gap, so that the loss falls from
    # ln 28 = 3.3 to what two equal chances leave open, far below one nat.
    encoder, losses = train(
        [c.replace("red", colour) for c in CAPTIONS for colour in ("red", "cyan")], VOCABULARY, num_steps=150, batch_size=16
    )
    assert losses[0] > 2.5
    assert sum(losses[-20:]) / 20 < 0.6
    assert encoder.encode(CAPTIONS)[0].shape == (2, 20, 64)


def test_the_shipped_encoder_knows_every_word_and_tells_who_is_red() -> None:
    encoder = open_words(SHIPPED)
    assert set(VOCABULARY) == set(encoder.module.config.words)
    (one, other), _ = encoder.encode(["a red sphere rolls to the left.", "a blue sphere rolls to the left."])
    # "sphere" has another embedding beside "red" than beside "blue": colour is bound to its object before the network sees it.
    assert (one[2] - other[2]).norm() > 0.1 * one[2].norm()
