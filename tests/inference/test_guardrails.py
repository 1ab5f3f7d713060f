"""Guardrails and prompt upsamplers of `fewstep generate`, over tiny models of the real classes of transformers.

Language models whose answers are known: one layer of LlamaForCausalLM with one-hot embeddings and uniform attention, so that
the logits of the next token are a table of the last token and of the words so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import TOY
from fewstep.cli import main as cli
from fewstep.data.files import video
from fewstep.errors import UserError
from fewstep.inference.command import read_command
from fewstep.inference.generate import generate
from fewstep.inference.guardrails import Blocklist, FrameClassifier, LlamaGuard, TextClassifier
from fewstep.inference.prompts import Blocked
from fewstep.inference.upsamplers import CausalLm

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}<answer>"
TEACHER = f"{TOY} --num-frames 5 --height 32 --width 32 --fps 8 --num-steps 1 --sampler euler --device cpu --quality lossless"
CPU = torch.device("cpu")


def write_language_model(folder: Path, scores: Mapping[tuple[str, str], float], chat: str | None = CHAT) -> str:
    """scores: of (next word, word before): the last word counts 1, each word so far 1 / the number of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "<answer>", *dict.fromkeys(word for pair in scores for word in pair)]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]  # its stubs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", chat_template=chat)
    tokenizer.save_pretrained(folder)
    width = len(ids) + len(ids) % 2  # rotary embeddings need an even number
    config = LlamaConfig(
        vocab_size=width, hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, head_dim=width,
        eos_token_id=ids["<end>"], bos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    layer: Any = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data = torch.eye(width)
    layer.self_attn.v_proj.weight.data = torch.eye(width)
    layer.self_attn.o_proj.weight.data = torch.eye(width) / width**0.5  # takes back what the norm has multiplied
    for (after, before), score in scores.items():
        model.lm_head.weight.data[ids[after], ids[before]] = score
    model.save_pretrained(folder)
    return str(folder)


GUARD = {
    ("safe", "<answer>"): 2.0, ("unsafe", "<answer>"): 1.0, ("unsafe", "bomb"): 100.0, ("S1", "unsafe"): 500.0,
    ("<end>", "safe"): 500.0, ("<end>", "S1"): 900.0, ("a", "a"): 0.0, ("ball", "ball"): 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_language_model(tmp_path_factory.mktemp("guard"), GUARD)


def write_text_classifier(folder: Path, label: str) -> str:
    """A BertForSequenceClassification that calls every text `label`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]  # its stubs
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    labels = {0: "Safe", 1: "violence"}
    config = BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.classifier.bias.data = torch.tensor([0.0, 3.0]) if label == "violence" else torch.tensor([3.0, 0.0])
    model.save_pretrained(folder)
    return str(folder)


# ---- the plug-ins by themselves --------------------------------------------------------------------------------------


def test_words_are_found_whatever_their_case_accents_and_signs(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# weapons\nBomb\nnaïve  plan # of two words\n")
    judge = Blocklist(str(tmp_path / "words.txt")).open(CPU)
    assert judge("A BOMB, exploding") == "it contains 'bomb'"
    assert judge("a nai\u0308ve-plan") == "it contains 'naive plan'"
    assert judge("bombastic balls and a plan") is None
    for text, message in (("# nothing\n", "is empty"), (None, "cannot be read")):
        (tmp_path / "other.txt").write_text(text) if text else (tmp_path / "other.txt").unlink()
        with pytest.raises(UserError, match=message):
            Blocklist(str(tmp_path / "other.txt")).check()


def test_a_language_model_passes_what_it_calls_safe_and_nothing_else(guard: str, tmp_path: Path) -> None:
    judge = LlamaGuard(guard).open(CPU)
    assert judge("a ball") is None
    assert judge("a bomb") == "the model answers 'unsafe S1'"
    silent = write_language_model(tmp_path / "silent", {("<end>", "<answer>"): 1.0})
    assert LlamaGuard(silent).open(CPU)("a ball") == "the model answers ''"
    without_chat = write_language_model(tmp_path / "plain", GUARD, chat=None)
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        LlamaGuard(without_chat).open(CPU)
    qwen = {("Safety:", "<answer>"): 2.0, ("Safe", "Safety:"): 9.0, ("<end>", "Safe"): 99.0}
    assert LlamaGuard(write_language_model(tmp_path / "qwen", qwen)).open(CPU)("a ball") is None


def test_a_classifier_of_texts_blocks_by_its_label(tmp_path: Path) -> None:
    assert TextClassifier(write_text_classifier(tmp_path / "safe", "Safe")).open(CPU)("a ball") is None
    violent = write_text_classifier(tmp_path / "violence", "violence")
    from transformers import AutoTokenizer, BertForSequenceClassification

    ids = AutoTokenizer.from_pretrained(violent)("a ball", return_tensors="pt")
    logits = BertForSequenceClassification.from_pretrained(violent)(input_ids=ids.input_ids).logits[0]
    assert TextClassifier(violent).open(CPU)("a ball") == f"violence ({logits.softmax(-1)[1]:.2f})"
    assert TextClassifier(violent, safe=("violence",)).open(CPU)("a ball") is None
    with pytest.raises(UserError, match=r"none of its labels \(safe, violence\) is known as safe \(good\): .*safe=\[LABEL\]"):
        TextClassifier(violent, safe=("good",)).check()
    from transformers import BertConfig, BertModel

    base = BertModel(BertConfig(vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    config = json.loads((tmp_path / "violence" / "config.json").read_text())
    base.save_pretrained(tmp_path / "violence")  # a model without a head: transformers alone would draw a random one
    (tmp_path / "violence" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its weights lack classifier"):
        TextClassifier(violent).open(CPU)


def test_a_classifier_of_frames_is_asked_for_frames_at_even_distances(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipForImageClassification, SiglipImageProcessorPil

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SiglipConfig(
        text_config={**size, "vocab_size": 8}, vision_config={**size, "image_size": 16, "patch_size": 8},
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = SiglipForImageClassification(config).eval()
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    black, white = (np.full((1, 24, 24, 3), value, np.uint8) for value in (0, 255))

    def logits(frames: np.ndarray) -> torch.Tensor:
        pixels = processor(images=[frames[0]], return_tensors="pt").pixel_values
        with torch.no_grad():
            return model(pixel_values=pixels).logits[0]

    model.classifier.weight.data *= 100
    middle = (logits(black) + logits(white)) / 2
    model.classifier.bias.data -= middle - middle.mean()
    if logits(black)[1] > logits(black)[0]:  # black frames are normal
        model.classifier.weight.data = model.classifier.weight.data.flip(0)
        model.classifier.bias.data = model.classifier.bias.data.flip(0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    judge = FrameClassifier(str(tmp_path)).open(CPU)
    clip = np.repeat(black, 20, 0)
    assert judge(clip) is None
    clip[16] = white[0]
    assert judge(clip) == f"frame 16 is nsfw ({logits(white).softmax(-1)[1]:.2f})"
    clip[16], clip[19] = black[0], white[0]
    assert str(judge(clip)).startswith("frame 19 is nsfw")
    clip[19], clip[9] = black[0], white[0]
    assert judge(clip) is None  # between frames 8 and 16
    assert str(FrameClassifier(str(tmp_path), every=3).open(CPU)(clip)).startswith("frame 9 is nsfw")


def test_a_prompt_is_rewritten_by_a_language_model(tmp_path: Path) -> None:
    table = {("a", "<answer>"): 9.0, ("red", "a"): 30.0, ("sphere", "red"): 90.0, ("<end>", "sphere"): 300.0}
    chat = write_language_model(tmp_path / "chat", table)
    rewrite = CausalLm(chat).open(CPU)
    assert rewrite("whatever") == rewrite("whatever") == "a red sphere"
    assert CausalLm(chat, max_new_tokens=2).open(CPU)("whatever") == "a red"
    plain = {("blue", "Paragraph:"): 9.0, ("<end>", "blue"): 90.0}
    assert CausalLm(write_language_model(tmp_path / "plain", plain, chat=None)).open(CPU)("whatever") == "blue"
    silent = write_language_model(tmp_path / "silent", {("<end>", "<answer>"): 1.0})
    with pytest.raises(UserError, match="answers nothing to 'whatever'"):
        CausalLm(silent).open(CPU)("whatever")


# ---- in the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guardrail llama_guard=PLACE/nowhere", "no guardrail at 'PLACE/nowhere'"),
        ("--guardrail llama_guard=PLACE", "no guardrail at 'PLACE': it has no config.json"),
        ("--guardrail frame_classifier=PLACE/half", "its weights are missing"),
        ("--guardrail blocklist=PLACE/nowhere.txt", "cannot be read"),
        ("--upsampler causal_lm=PLACE/half", "no prompt upsampler at 'PLACE/half': its weights are missing"),
        ("--prompt_upsampler_dir PLACE/nowhere", "no prompt upsampler at"),
    ],
)
def test_what_is_asked_for_and_missing_gives_no_clip(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    for name in ("model.outline_of", "generate.outline_of", "generate.texts_of"):
        monkeypatch.setattr(f"fewstep.inference.{name}", refuse)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({"id2label": {"0": "safe"}}))
    words = words.replace("PLACE", str(tmp_path))
    code = cli(["generate", *TEACHER.split(), "--prompt", "a red sphere", "--out", str(tmp_path / "out"), *words.split()])
    assert code == 1
    assert message.replace("PLACE", str(tmp_path)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_guardrail_gives_no_clip(guard: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(guard, tmp_path / "guard"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    words = [*TEACHER.split(), "--prompt", "a", "--out", str(tmp_path / "out"), "--guardrail", f"llama_guard={folder}"]
    with pytest.raises(UserError, match="guard: cannot be opened"):
        generate(read_command(words))
    assert not (tmp_path / "out").exists()


OWN = """
from dataclasses import dataclass
from fewstep.config import kind
from fewstep.inference.guardrails import Guardrail
from fewstep.inference.upsamplers import Upsampler

@kind("dark", group="guardrail")
@dataclass(frozen=True)
class Dark(Guardrail):
    judges = "frames"
    limit: int = 0
    def open(self, device):
        return lambda frames: "too dark" if frames.mean() < self.limit else None

@kind("longer", group="upsampler")
@dataclass(frozen=True)
class Longer(Upsampler):
    def open(self, device):
        return lambda prompt: prompt.replace("ball", "red sphere")
"""


def test_a_guardrail_blocks_some_clips_and_the_others_are_made(
    guard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red sphere rolls right\na bomb\na blue sphere rolls left\n")
    (tmp_path / "words.txt").write_text("blue\n")
    common = ["generate", *TEACHER.split(), "--prompts", str(tmp_path / "p.txt")]
    assert (
        cli([*common[:-2], "--prompt", "a red sphere rolls right", "--name", "p_0000", "--out", str(tmp_path / "plain")]) == 0
    )
    guards = ["--guardrail", f"llama_guard={guard}", "--guardrail", f"blocklist={tmp_path / 'words.txt'}"]
    assert cli([*common, "--out", str(tmp_path / "out"), *guards]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fewstep: 2 of 3 clip(s) blocked by a guardrail and not written: ")
    assert "'p_0001' (llama_guard: the model answers 'unsafe S1')" in message
    assert "'p_0002' (blocklist: it contains 'blue')" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p_0000.json", "p_0000.mp4", "p_0000.txt"]
    assert (tmp_path / "out" / "p_0000.mp4").read_bytes() == (tmp_path / "plain" / "p_0000.mp4").read_bytes()
    assert (
        cli([*common, "--out", str(tmp_path / "out"), *guards]) == 1
    )  # the same again: nothing is made, the rest still blocked
    (tmp_path / "e.pickle").write_bytes(b"")
    blind = [*TEACHER.split(), "--embedding", str(tmp_path / "e.pickle"), "--out", str(tmp_path / "blind"), *guards[:2]]
    with pytest.raises(Blocked, match="an embedding instead of a prompt, which no guardrail can read"):
        generate(read_command(blind))


def test_plug_ins_of_ones_own_rewrite_prompts_and_block_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    common = ["generate", *TEACHER.split(), "--config", str(tmp_path / "own.py")]
    plain = [*common, "--prompt", "a red sphere rolls right", "--out", str(tmp_path / "plain")]
    assert cli(plain) == 0
    short = [*common, "--prompt", "a ball rolls right", "--upsampler", "longer"]
    assert cli([*short, "--out", str(tmp_path / "long"), "--guardrail", "dark=0"]) == 0
    assert (tmp_path / "long" / "output.txt").read_text() == "a red sphere rolls right\n"
    record = json.loads((tmp_path / "long" / "output.json").read_text())
    assert (record["prompt"], record["made"]["clip"]["prompt"]) == ("a red sphere rolls right", "a ball rolls right")
    frames = [video.read(tmp_path / folder / "output.mp4").frames for folder in ("plain", "long")]
    np.testing.assert_array_equal(*frames)
    (tmp_path / "words.txt").write_text("red\n")
    assert cli([*short, "--out", str(tmp_path / "words"), "--guardrail", f"blocklist={tmp_path / 'words.txt'}"]) == 1
    assert "blocklist: it contains 'red'" in capsys.readouterr().err  # what the upsampler wrote is judged, too
    assert cli([*short, "--out", str(tmp_path / "dark"), "--guardrail", "dark=255", "--offload"]) == 1
    assert "dark: too dark" in capsys.readouterr().err
    assert not (tmp_path / "words").exists() and not (tmp_path / "dark").exists()
