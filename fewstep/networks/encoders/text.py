"""Text encoders: prompts to embeddings, over the models of transformers.

    encoder = open_text_encoder("wan2.1-t2v-1.3b")         # a folder or hub id; of a whole pipeline, its text_encoder/
    embeddings, mask = encoder.encode(["a red ball rolls"])     # B N D, B N: true where a token of the prompt is

How a family treats its prompts is part of its weights' meaning, and is read from the pipeline's model_index.json:

    T5, UMT5     padded to 512; padding is masked inside and comes out as 0 (Cosmos 1, Predict2, Wan). CogVideoX (226) and
                 Flux (512) mask nothing: their padding has embeddings of its own, which the networks were trained to see.
    CLIP         77 tokens; the last layer (Stable Diffusion 1.5), or two encoders' last but one side by side (SDXL),
                 which also has a pooled vector
    Qwen2.5-VL   "Reason1" of Predict2.5: each of 28 layers standardised along its channels, all side by side: 100352 numbers
                 for each of 512 tokens. With the pipeline of Qwen-Image, its template and last layer.
"""

from __future__ import annotations

import html
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from fewstep import registry
from fewstep.errors import UserError
from fewstep.networks.encoders.codecs import fingerprint_of
from fewstep.networks.files import hub
from fewstep.networks.files.folders import load_reader, load_transformer
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.untrusted.text import fault_of

WORDS = ["config.json", "tokenizer*", "*.model", "special_tokens_map.json", "*.txt", "vocab.json"]  # files of a tokenizer
SAMPLED = 4096  # entries of each weight that the fingerprint of a text encoder looks at: T5-11b whole would take minutes
PROMPTS_AT_ONCE = 8
REASON1_SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_IMAGE_DROPPED = 34  # tokens of the template before the prompt


@dataclass(frozen=True)
class TextForm:
    """How embeddings reach a network that was trained on them."""

    max_tokens: int = 512  # texts are padded to this many tokens
    uses_mask: bool = False  # whether the network receives a mask of the padding
    dim: int | None = None  # channels of a token; None: not known before the encoder is opened


class TextEncoder(ABC):
    """A text encoder. A class of one's own inherits the defaults, and registers itself with @text_encoder(MODEL_TYPE)."""

    uses_mask: ClassVar[bool] = False  # whether networks receive the mask: most were trained to attend to the padding as well
    # Source without imports of fewstep that defines `open_text_encoder(folder)`. It becomes part of the pipeline.py of exported
    # students, whose folders can then be opened although no library has the encoder's class.
    standalone: ClassVar[Path | None] = None

    @classmethod
    def open(cls, source: Source, max_tokens: int | None, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
        """The encoder at `source`, frozen, in eval mode."""
        raise UserError(f"{cls.__name__}: is part of another text encoder and cannot be opened by itself")

    @classmethod
    def form(cls, source: Source) -> TextForm:
        """The form of the embeddings of the encoder at `source`, whose weights are not read."""
        return TextForm(uses_mask=cls.uses_mask)

    @property
    @abstractmethod
    def dim(self) -> int:
        """Channels of one token's embedding."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies weights, tokenizer and settings. Embeddings made under another fingerprint do not fit."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings B N D, and B N true where a token of the prompt is."""

    def pooled(self, prompts: Sequence[str]) -> Tensor | None:
        """One embedding B P of each whole prompt; None for the families whose networks read none."""
        return None


Encoder = TypeVar("Encoder", bound=type[TextEncoder])


def text_encoder(*model_types: str) -> Callable[[Encoder], Encoder]:
    """A class decorator that registers a text encoder for these values of `model_type` in its config.json."""

    def decorate(cls: Encoder) -> Encoder:
        for name in model_types:
            registry.register("text_encoder", name, cls)
        return cls

    return decorate


@dataclass(frozen=True, eq=False)
class _Encoder(TextEncoder):
    module: nn.Module
    tokenizer: Any  # Any: transformers' tokenizers have no common type
    max_tokens: int

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not prompts:
            raise UserError(f"{type(self).__name__}: no prompt to encode; an empty text is a prompt, too")
        parts = [list(prompts[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
        with torch.no_grad():
            embeddings, masks = zip(*[self._encode(part) for part in parts], strict=True)
        most = max(value.shape[1] for value in embeddings)  # they differ where a family does not pad to a fixed length
        pad = nn.functional.pad
        whole = torch.cat([pad(value.float(), (0, 0, 0, most - value.shape[1])) for value in embeddings])
        return whole, torch.cat([pad(mask.bool(), (0, most - mask.shape[1])) for mask in masks])

    @property
    def fingerprint(self) -> str:
        """Of 4096 entries of each weight at even distances, the tokenizer, and the settings."""
        return self._fingerprint

    @cached_property  # no protocol has such a member
    def _fingerprint(self) -> str:
        settings = {"class": type(self).__name__, "tokenizer": _tokenizer_text(self.tokenizer), **self._settings()}
        return fingerprint_of(self.module, settings, sampled=SAMPLED)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @abstractmethod
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings B L D and masks B L of a few prompts."""

    def _settings(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def _padded(self, tokenizer: Any, prompts: list[str], max_tokens: int) -> Any:  # Any: as above
        return tokenizer(prompts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt").to(
            self.device
        )


@text_encoder("t5", "umt5")
@dataclass(frozen=True, eq=False)
class T5(_Encoder):
    masks_padding: bool = True
    cleans: bool = False  # Wan undoes html entities and runs of white space

    @classmethod
    def form(cls, source: Source) -> TextForm:
        dim = source.config("text_encoder").get("d_model")
        return TextForm(226 if source.pipeline.startswith("CogVideoX") else 512, dim=dim)

    @classmethod
    def open(cls, source: Source, max_tokens: int | None, dtype: torch.dtype, device: torch.device | str) -> T5:
        is_plain = source.pipeline.startswith("CogVideoX")
        cleans = source.pipeline.startswith("Wan") or source.config("text_encoder")["model_type"] == "umt5"
        module = source.model("text_encoder", dtype, device)
        num = max_tokens or cls.form(source).max_tokens
        return cls(module, source.tokenizer("tokenizer"), num, masks_padding=not is_plain, cleans=cleans)

    @property
    def dim(self) -> int:
        return cast(Any, self.module).config.d_model

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        if self.cleans:
            prompts = [cleaned(prompt) for prompt in prompts]
        tokens = self._padded(self.tokenizer, prompts, self.max_tokens)
        mask = tokens.attention_mask.bool()
        if not self.masks_padding:
            return self.module(tokens.input_ids)[0], mask
        hidden = self.module(tokens.input_ids, attention_mask=mask).last_hidden_state
        return torch.where(mask[..., None], hidden, 0), mask

    def _settings(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "masks_padding": self.masks_padding, "cleans": self.cleans}


@text_encoder("clip_text_model")
@dataclass(frozen=True, eq=False)
class Clip(_Encoder):
    """One or two CLIP text models; `module` holds them, `tokenizer` is a list as long."""

    @classmethod
    def form(cls, source: Source) -> TextForm:
        second = source.has("text_encoder_2") and source.config("text_encoder_2").get("model_type") in ("t5", "umt5")
        return TextForm(512 if second else 77)

    @classmethod
    def open(cls, source: Source, max_tokens: int | None, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
        module, tokenizer = source.model("text_encoder", dtype, device), source.tokenizer("tokenizer")
        most = max_tokens or tokenizer.model_max_length
        if not source.has("text_encoder_2"):
            return cls(_frozen(nn.ModuleList([module])), [tokenizer], most)
        second, other = source.model("text_encoder_2", dtype, device), source.tokenizer("tokenizer_2")
        if source.config("text_encoder_2").get("model_type") == "t5":
            t5 = T5(second, other, max_tokens or 512, masks_padding=False)
            return PooledClip(_frozen(nn.ModuleList([second, module])), other, t5.max_tokens, t5, module, tokenizer)
        return cls(_frozen(nn.ModuleList([module, second])), [tokenizer, other], most)

    @property
    def dim(self) -> int:
        return sum(cast(Any, part).config.hidden_size for part in self._parts)

    @property
    def _parts(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.module))

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """B P: the last encoder's projected embedding of the whole prompt."""
        tokens = self._padded(self.tokenizer[-1], list(prompts), self.max_tokens)
        output = self._parts[-1](tokens.input_ids)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output  # transformers' two outputs
        return pooled.float()

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        masks: list[Tensor] = []
        for part, tokenizer in zip(self._parts, self.tokenizer, strict=True):
            tokens = self._padded(tokenizer, prompts, self.max_tokens)
            output = part(tokens.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2] if len(self._parts) > 1 else output.last_hidden_state)
            masks.append(tokens.attention_mask)
        return torch.cat(hidden, -1), masks[0]


@dataclass(frozen=True, eq=False)
class PooledClip(_Encoder):
    """Flux: CLIP gives the pooled vector only, T5 the tokens."""

    t5: T5
    clip: nn.Module
    clip_tokenizer: Any

    @property
    def dim(self) -> int:
        return self.t5.dim

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """B P: CLIP's embedding of the whole prompt."""
        tokens = self._padded(self.clip_tokenizer, list(prompts), self.clip_tokenizer.model_max_length)
        return self.clip(tokens.input_ids).pooler_output.float()

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.t5._encode(prompts)

    def _settings(self) -> dict[str, Any]:
        return {**self.t5._settings(), "clip_tokenizer": _tokenizer_text(self.clip_tokenizer)}


@text_encoder("qwen2_5_vl")
@dataclass(frozen=True, eq=False)
class Reason1(_Encoder):
    """Predict2.5's use of Qwen2.5-VL. Padding is attended to, inside and by the network: the mask only tells where it is."""

    @classmethod
    def form(cls, source: Source) -> TextForm:
        config = source.config("text_encoder")
        text = config.get("text_config") or config
        if source.pipeline.startswith("QwenImage"):
            return TextForm(1024, uses_mask=True, dim=text["hidden_size"])
        return TextForm(512, dim=text["hidden_size"] * text["num_hidden_layers"])

    @classmethod
    def open(cls, source: Source, max_tokens: int | None, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
        module, tokenizer = source.model("text_encoder", dtype, device), source.tokenizer("tokenizer")
        num = max_tokens or cls.form(source).max_tokens
        return (QwenImage if source.pipeline.startswith("QwenImage") else cls)(module, tokenizer, num)

    @property
    def dim(self) -> int:
        config = _text_config(self.module)
        return config.hidden_size * config.num_hidden_layers

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self._chat(prompt) for prompt in prompts]
        ids, mask = (torch.tensor([row[i] for row in rows], device=self.device) for i in (0, 1))
        # No attention mask, as upstream; and the logits of one token instead of 512, which are not used.
        layers = self.module(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[1:]
        parts = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8) for x in layers]
        return torch.cat(parts, -1), mask

    def _chat(self, prompt: str) -> tuple[list[int], list[int]]:
        chat = [("system", REASON1_SYSTEM), ("user", prompt)]
        tokens = self.tokenizer.apply_chat_template(
            [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in chat],
            tokenize=True,
            add_generation_prompt=False,
            add_vision_id=False,
            max_length=self.max_tokens,
            truncation=True,
            padding="max_length",
            return_dict=True,
        )
        return list(tokens["input_ids"]), list(tokens["attention_mask"])


@dataclass(frozen=True, eq=False)
class QwenImage(_Encoder):
    """Qwen-Image: the last layer, without the template's own tokens; as long as the longest prompt."""

    uses_mask: ClassVar[bool] = True

    @property
    def dim(self) -> int:
        return _text_config(self.module).hidden_size

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        texts = [QWEN_IMAGE_TEMPLATE.format(prompt) for prompt in prompts]
        most = self.max_tokens + QWEN_IMAGE_DROPPED
        tokens = self.tokenizer(texts, max_length=most, padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.module(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states[-1]
        rows = [row[mask.bool()][QWEN_IMAGE_DROPPED:] for row, mask in zip(hidden, tokens.attention_mask, strict=True)]
        masks = [torch.ones(len(row), device=row.device) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True), pad(masks, batch_first=True)


def cleaned(prompt: str) -> str:
    """As Wan cleans its prompts, where ftfy is absent: html entities undone (twice), white space single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


def stored_embedding(encoder: TextEncoder, text: str) -> Tensor:
    """float16 (tokens, D) of one text, without the zeros behind its last token: what data sets store."""
    output, mask = encoder.encode([text])
    rows = (mask[0] | (output[0] != 0).any(-1)).nonzero()
    num = int(rows.max()) + 1 if len(rows) else 1
    tokens = output[0, :num].to("cpu", torch.float16).contiguous()
    if not bool(torch.isfinite(tokens).all()):
        raise UserError(
            f"the embedding of {text[:60]!r} has numbers that float16 does not hold, up to {float(output.abs().max()):g}"
        )
    return tokens


def stored_pooled(encoder: TextEncoder, text: str) -> Tensor | None:
    """float32 (P,): the pooled vector of one text, beside its tokens; None for encoders without one."""
    pooled = encoder.pooled([text])
    return None if pooled is None else pooled[0].cpu()


# ---- opening -------------------------------------------------------------------------------------------------------


def open_text_encoder(
    address: str | Path,
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The text encoder in a folder or hub id; of a pipeline its text_encoder/ (and _2). Frozen, in eval mode."""
    source = Source.of(str(address))
    return _class_of(source).open(source, max_tokens, dtype, device)


def text_form(address: str | Path) -> TextForm:
    """The form of the embeddings of the text encoder in a folder or hub id; that of T5 for a pipeline without one."""
    source = Source.of(str(address))
    if source.is_pipeline and not source.has("text_encoder"):
        return TextForm()
    with fault_of(f"{address}: config.json of its text encoder"):
        return _class_of(source).form(source)


def _class_of(source: Source) -> type[TextEncoder]:
    model_type = source.config("text_encoder").get("model_type")
    encoder = registry.find("text_encoder", str(model_type))
    if encoder is None:
        names = ", ".join(registry.entries("text_encoder"))
        raise UserError(f"{source.address}: no text encoder reads it: its model_type is {model_type}; there are {names}")
    return encoder


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _text_config(module: nn.Module) -> Any:  # Any: transformers' configurations have no common type
    config = cast(Any, module).config
    return getattr(config, "text_config", config)


def _tokenizer_text(tokenizer: Any) -> str:
    """All that decides how it cuts words, as text."""
    many = tokenizer if isinstance(tokenizer, list) else [tokenizer]
    settings = [json.loads(one.backend_tokenizer.to_str()) if one.is_fast else one.get_vocab() for one in many]
    for one in settings:
        for name in ("padding", "truncation"):  # a fast tokenizer keeps those of its last call
            one.pop(name, None)
    return json.dumps(settings, sort_keys=True)


MODELS = {
    "T5EncoderModel": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",  # the encoder half of google-t5/t5-11b
    "T5Model": "T5EncoderModel",
    "UMT5EncoderModel": "UMT5EncoderModel",
    "UMT5ForConditionalGeneration": "UMT5EncoderModel",
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLForConditionalGeneration",
}


@dataclass(frozen=True)
class Source:
    """A folder or hub id with either a pipeline in it or one encoder beside its tokenizer."""

    files: PipelineFolder
    is_pipeline: bool

    @classmethod
    def of(cls, address: str) -> Source:
        files = PipelineFolder(address)
        if not files.path.is_dir():
            hub.expect_id(address, "text encoder")
        return cls(files, bool(files.index) or (files.path / "text_encoder").is_dir())

    @property
    def address(self) -> str:
        return self.files.address

    @property
    def pipeline(self) -> str:
        """Class of the pipeline, or "" where there is none, or one with code of its own."""
        return self.files.pipeline

    def folder(self, part: str) -> Path:
        return self.files.path / part if self.is_pipeline else self.files.path

    def has(self, part: str) -> bool:
        return self.is_pipeline and bool(self.files.read(f"{part}/config.json"))

    def config(self, part: str) -> Mapping[str, Any]:
        name = f"{part}/config.json" if self.is_pipeline else "config.json"
        config = self.files.read(name)
        if not config:
            raise UserError(f"no text encoder at {self.address}: it has no {name}")
        return config

    def model(self, part: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        import transformers

        names = self.config(part).get("architectures")
        name = next((MODELS[str(name)] for name in names if str(name) in MODELS), None) if isinstance(names, list) else None
        if name is None:
            raise UserError(f"{self.address}: its {part} is a {names}; there are {', '.join(MODELS)}")
        cls, subfolder = getattr(transformers, name), part if self.is_pipeline else None
        return load_transformer(cls, self.address, subfolder, dtype=dtype).to(device)

    def tokenizer(self, part: str) -> Any:  # Any: as above
        from transformers import AutoTokenizer

        # From a folder, of the hub's cache too: for a name transformers looks for files that a tokenizer need not have.
        folder = hub.folder_of(self.address, [f"{part}/*"] if self.is_pipeline else WORDS, "tokenizer")
        return load_reader(AutoTokenizer, str(folder / part if self.is_pipeline else folder))
