"""Our text encoders against how upstream's pipelines embed their prompts: the same tiny random models and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.files import cache
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.data.folder.texts import Texts
from fewstep.export.to_diffusers import PIPELINE
from fewstep.files import write_text
from fewstep.inference.conditions import Footage, Parts, Shot, conditions, texts_of
from fewstep.inference.request import ClipRequest, GenerateRequest, SamplerOptions
from fewstep.networks.encoders.text import Clip, PooledClip, open_text_encoder
from fewstep.prepare import text as prepare

PROMPTS = ["a red ball rolls", "", "the the the ball &amp;amp;  rolls \n down and down and down and down"]
SPECIAL = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, "a", "red", "ball", "rolls", "the", "&", ";", "amp", "down", "and"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for part in m['content'] %}{{ part['text'] }}{% endfor %} "
    "<|im_end|> {% endfor %}"
)
CPU = torch.device("cpu")


def tokenizer(max_length: int, ends: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace() if ends else pre_tokenizers.WhitespaceSplit()
    if ends:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=max_length, chat_template=TEMPLATE, **names)


def saved(folder: Path, pipeline: str, **parts: Any) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def t5(cls: str = "T5EncoderModel") -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
    config = getattr(transformers, "UMT5Config" if cls.startswith("UMT5") else "T5Config")(**sizes, pad_token_id=0)
    return getattr(transformers, cls)(config).eval()


def equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert float(found.std()) > 0.01


@torch.no_grad()
def test_t5_embeds_as_cosmos(tmp_path: Path) -> None:
    from diffusers import CosmosVideoToWorldPipeline

    model, words = t5(), tokenizer(512)
    encoder = open_text_encoder(saved(tmp_path, "CosmosVideoToWorldPipeline", text_encoder=model, tokenizer=words))
    assert (encoder.dim, encoder.max_tokens) == (16, 512)
    encoder = open_text_encoder(tmp_path, max_tokens=9)
    found, mask = encoder.encode(PROMPTS)
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=words, _execution_device=CPU)
    equal(found, CosmosVideoToWorldPipeline._get_t5_prompt_embeds(pipeline, list(PROMPTS), max_sequence_length=9))  # type: ignore[arg-type]
    assert mask.sum(1).tolist() == [5, 1, 9]
    assert float(found[0, 5:].abs().max()) == 0


@torch.no_grad()
def test_umt5_embeds_as_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline
    from diffusers.pipelines.wan import pipeline_wan

    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)
    model, words = t5("UMT5EncoderModel"), tokenizer(512)
    folder = saved(tmp_path, "WanPipeline", text_encoder=model, tokenizer=words)
    found, mask = open_text_encoder(folder, max_tokens=20).encode(PROMPTS)
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=words, _execution_device=CPU)
    equal(found, WanPipeline._get_t5_prompt_embeds(pipeline, list(PROMPTS), max_sequence_length=20))  # type: ignore[arg-type]
    assert mask.dtype == torch.bool


@torch.no_grad()
def test_t5_embeds_as_cogvideox_whose_padding_has_embeddings(tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    model, words = t5(), tokenizer(226)
    encoder = open_text_encoder(saved(tmp_path, "CogVideoXPipeline", text_encoder=model, tokenizer=words))
    assert encoder.max_tokens == 226
    found, _ = encoder.encode(PROMPTS)
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=words, _execution_device=CPU)
    equal(found, CogVideoXPipeline._get_t5_prompt_embeds(pipeline, list(PROMPTS)))  # type: ignore[arg-type]


def test_the_encoder_half_of_a_whole_t5_is_taken(tmp_path: Path) -> None:
    whole = t5("T5ForConditionalGeneration")
    whole.save_pretrained(tmp_path)
    tokenizer(512).save_pretrained(tmp_path)
    found, _ = open_text_encoder(tmp_path, max_tokens=8).encode(["a red ball"])
    ids = tokenizer(512)(["a red ball"], return_tensors="pt")
    wanted = whole.encoder(ids.input_ids).last_hidden_state
    torch.testing.assert_close(found[:, :4], wanted.detach(), rtol=0, atol=1e-6)


def clip_text(projects: bool, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=12,
        vocab_size=len(WORDS), max_position_embeddings=12, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


@torch.no_grad()
def test_a_pair_of_clips_embeds_as_sdxl(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = {"text_encoder": clip_text(False, 16), "text_encoder_2": clip_text(True, 20)}
    parts |= {"tokenizer": tokenizer(12), "tokenizer_2": tokenizer(12)}
    encoder = open_text_encoder(saved(tmp_path, "StableDiffusionXLPipeline", **parts))
    assert isinstance(encoder, Clip)
    assert (encoder.dim, encoder.max_tokens) == (36, 12)
    pipeline = SimpleNamespace(**parts, _execution_device=CPU, config=SimpleNamespace(force_zeros_for_empty_prompt=True))
    encode: Any = StableDiffusionXLPipeline.encode_prompt
    wanted, _, pooled, _ = encode(pipeline, PROMPTS, device=CPU, do_classifier_free_guidance=False)
    equal(encoder.encode(PROMPTS)[0], wanted)
    equal(encoder.pooled(PROMPTS), pooled)


@pytest.mark.parametrize("negative", [None, "", "a red down"])
@pytest.mark.parametrize("forces", [True, False])
@torch.no_grad()
def test_generate_guides_sdxl_away_from_what_its_pipeline_does(tmp_path: Path, negative: str | None, forces: bool) -> None:
    from diffusers import StableDiffusionXLPipeline

    parts = {"text_encoder": clip_text(False, 16), "text_encoder_2": clip_text(True, 20)}
    parts |= {"tokenizer": tokenizer(12), "tokenizer_2": tokenizer(12)}
    folder = saved(tmp_path, "StableDiffusionXLPipeline", **parts)
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": forces}
    write_text(folder / "model_index.json", json.dumps(index))
    pipeline = SimpleNamespace(**parts, _execution_device=CPU, config=SimpleNamespace(force_zeros_for_empty_prompt=forces))
    encode: Any = StableDiffusionXLPipeline.encode_prompt
    tokens, no_tokens, pooled, no_pooled = encode(pipeline, ["a red ball"], device=CPU, negative_prompt=negative)
    clip = ClipRequest("x", "a red ball", negative)
    texts = texts_of([clip], GenerateRequest(str(folder), tmp_path, (clip,), SamplerOptions(guidance=5.0)), folder, CPU)
    nothing: Any = None
    cond, other = conditions(
        clip, Parts(nothing, nothing, texts, CPU), Shot(1, 32, 32, 0.0), (4, 1, 4, 4), Footage(None, {}), nothing
    )
    assert other is not None
    for ours, theirs in ((cond.text, tokens), (cond.pooled, pooled), (other.text, no_tokens), (other.pooled, no_pooled)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert bool((no_tokens == 0).all()) == (forces and negative is None)  # that of upstream


@torch.no_grad()
def test_a_data_set_holds_what_sdxl_encodes(tmp_path: Path) -> None:
    """Tokens, pooled vectors and the zeros of an empty negative, from `prepare text` to the condition of a batch."""
    from diffusers import StableDiffusionXLPipeline

    parts = {"text_encoder": clip_text(False, 16), "text_encoder_2": clip_text(True, 20)}
    parts |= {"tokenizer": tokenizer(12), "tokenizer_2": tokenizer(12)}
    encoder = open_text_encoder(saved(tmp_path / "pipeline", "StableDiffusionXLPipeline", **parts))
    texts, data = ["a red ball rolls", "the ball"], tmp_path / "data"
    for n, caption in enumerate(texts):
        write_text(data / "metas" / f"{n}.txt", caption)
        cache.write(data / "latents" / f"{n}.safetensors", {"latents": torch.zeros(4, 1, 2, 2)})
    prepare.write(data, encoder)
    prepare.write_negative(data, "t5_xxl", encoder, "a red down")
    pipeline = SimpleNamespace(**parts, _execution_device=CPU, config=SimpleNamespace(force_zeros_for_empty_prompt=True))
    encode: Any = StableDiffusionXLPipeline.encode_prompt
    for name, text in (("zeros", None), ("negative.pickle", ["a red down"] * 2)):
        tokens, no_tokens, pooled, no_pooled = encode(pipeline, texts, device=CPU, negative_prompt=text)
        spec = Folder(str(data), x0="latents", max_tokens=12, negative=name)
        batch = spec.open().batch(torch.tensor([0, 1]))
        for cond, negative in (Texts.open(spec).conditions([0, 1]), (batch.cond, batch.negative)):
            assert cond.text is not None and cond.pooled is not None and negative is not None
            torch.testing.assert_close(cond.text, tokens, rtol=0, atol=2e-3)  # stored in float16
            torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=1e-6)
            torch.testing.assert_close(negative.text, no_tokens, rtol=0, atol=2e-3)
            torch.testing.assert_close(negative.pooled, no_pooled, rtol=0, atol=1e-6)
    write_pickle(data / "negative.pickle", [torch.zeros(3, 36).numpy()])
    with pytest.raises(ValueError, match="lacks a pooled vector"):
        Folder(str(data), x0="latents", max_tokens=12, negative="negative.pickle").open()


@torch.no_grad()
def test_one_clip_embeds_as_stable_diffusion(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model, words = clip_text(False, 16), tokenizer(12)
    encoder = open_text_encoder(saved(tmp_path, "StableDiffusionPipeline", text_encoder=model, tokenizer=words))
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=words, _execution_device=CPU, unet=None)
    wanted, _ = StableDiffusionPipeline.encode_prompt(pipeline, list(PROMPTS), CPU, 1, False)  # type: ignore[arg-type]
    equal(encoder.encode(PROMPTS)[0], wanted)


@torch.no_grad()
def test_t5_and_a_pooled_clip_embed_as_flux(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    parts = {"text_encoder": clip_text(False, 20), "text_encoder_2": t5(), "tokenizer": tokenizer(12)}
    parts |= {"tokenizer_2": tokenizer(512)}
    encoder = open_text_encoder(saved(tmp_path, "FluxPipeline", **parts), max_tokens=24)
    assert isinstance(encoder, PooledClip)
    assert encoder.dim == 16
    pipeline = SimpleNamespace(**parts, _execution_device=CPU, tokenizer_max_length=12)
    found, pooled = encoder.encode(PROMPTS)[0], encoder.pooled(PROMPTS)
    equal(found, FluxPipeline._get_t5_prompt_embeds(pipeline, list(PROMPTS), max_sequence_length=24))  # type: ignore[arg-type]
    equal(pooled, FluxPipeline._get_clip_prompt_embeds(pipeline, list(PROMPTS)))  # type: ignore[arg-type]


def qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(WORDS), "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


@torch.no_grad()
def test_qwen_embeds_as_predict_2_5(tmp_path: Path) -> None:
    from diffusers import Cosmos2_5_PredictBasePipeline

    model, words = qwen(), tokenizer(512, ends=False)
    encoder = open_text_encoder(saved(tmp_path, "Cosmos2_5_PredictBasePipeline", text_encoder=model, tokenizer=words))
    assert (encoder.dim, encoder.max_tokens) == (3 * 16, 512)  # all layers side by side: 28 x 3584 in the real one
    found, mask = encoder.encode(PROMPTS)
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=words, _execution_device=CPU)
    equal(found, Cosmos2_5_PredictBasePipeline._get_prompt_embeds(pipeline, list(PROMPTS)))  # type: ignore[arg-type]
    assert mask.shape == (3, 512)
    assert int(mask[1].sum()) < int(mask[0].sum()) < 512

    room: dict[str, Any] = {}  # what an exported student's own pipeline makes of the same prompts
    exec(compile(PIPELINE.read_text(), "pipeline.py", "exec"), room)
    student = room["StudentPipeline"]
    holder = SimpleNamespace(text_encoder=model, tokenizer=words, student={}, folder=tmp_path / "none")
    holder._reason1 = lambda prompts: student._reason1(holder, prompts)
    exported, no_mask = student._embed(holder, list(PROMPTS))
    equal(exported, found)
    assert no_mask is None


@torch.no_grad()
def test_qwen_embeds_as_qwen_image(tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline

    model, words = qwen(), tokenizer(512, ends=False)
    encoder = open_text_encoder(saved(tmp_path, "QwenImagePipeline", text_encoder=model, tokenizer=words))
    real = QwenImagePipeline(scheduler=None, vae=None, text_encoder=model, tokenizer=words, transformer=None)  # type: ignore[arg-type]
    prompts = [f"{prompt} {'ball ' * 20}" for prompt in PROMPTS]  # the template is short in this tokenizer: 34 are dropped
    wanted, wanted_mask = real._get_qwen_prompt_embeds(prompts, device=CPU)
    found, mask = encoder.encode(prompts)
    equal(found, wanted)
    torch.testing.assert_close(mask, wanted_mask.bool())


def test_batches_do_not_change_an_embedding_and_fingerprints_tell_encoders_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "CosmosVideoToWorldPipeline", text_encoder=t5(), tokenizer=tokenizer(512))
    encoder = open_text_encoder(folder, max_tokens=16)
    many, _ = encoder.encode(PROMPTS * 5)
    torch.testing.assert_close(many[12:13], encoder.encode(PROMPTS[:1])[0], rtol=0, atol=1e-6)
    other = t5()
    other.shared.weight.data[3] += 1
    saved(tmp_path / "b", "CosmosVideoToWorldPipeline", text_encoder=other, tokenizer=tokenizer(512))
    again = open_text_encoder(folder, max_tokens=16).fingerprint
    assert encoder.fingerprint == again
    told = {
        again,
        open_text_encoder(folder, max_tokens=8).fingerprint,
        open_text_encoder(tmp_path / "b", max_tokens=16).fingerprint,
    }
    assert len(told) == 3


def test_what_is_no_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text encoder at"):
        open_text_encoder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"its model_type is bert; there are .*t5"):
        open_text_encoder(tmp_path)
    with pytest.raises(ValueError, match="no prompt to encode"):
        open_text_encoder(saved(tmp_path / "p", "X", text_encoder=t5(), tokenizer=tokenizer(9))).encode([])
