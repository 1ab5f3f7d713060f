"""The toy world's text encoder: a tokenizer over a closed list of words, and a small transformer that was taught to fill gaps.

    encoder = open_words("fewstep/toyworld/stack/words")
    embeddings, mask = encoder.encode(["a red sphere rolls to the right."])   # B N 64; B N, true where a token is

A folder holds config.json (with the words) and model.safetensors. It stands where T5-XXL stands in the real pipelines: same
contract, same files on disk. A word it does not know is refused by name, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.errors import UserError

MODEL_TYPE = "fewstep_words"
PAD, GAP = 0, 1  # the two tokens that are no words


@dataclass(frozen=True)
class WordsConfig:
    words: tuple[str, ...]
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_tokens: int = 40


class WordsModel(nn.Module):
    def __init__(self, config: WordsConfig):
        super().__init__()
        self.config = config
        self.word = nn.Embedding(len(config.words) + 2, config.dim)
        self.place = nn.Parameter(0.02 * torch.randn(config.max_tokens, config.dim))
        layer = nn.TransformerEncoderLayer(
            config.dim, config.num_heads, 2 * config.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False)  # unit spread, as a diffusion model likes it

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings B N D of the tokens B N; those of padding are 0, and no word sees them."""
        pad = tokens == PAD
        hidden = self.layers(self.word(tokens) + self.place[: tokens.shape[1]], src_key_padding_mask=pad)
        return self.norm(hidden).masked_fill(pad[..., None], 0)


@dataclass(frozen=True, eq=False)
class WordsEncoder:
    module: WordsModel

    @property
    def dim(self) -> int:
        return self.module.config.dim

    @property
    def max_tokens(self) -> int:
        return self.module.config.max_tokens

    def tokens(self, prompt: str) -> list[int]:
        config = self.module.config
        number = {word: i + 2 for i, word in enumerate(config.words)}
        found = re.findall(r"[a-z]+|[^a-z\s]", prompt.lower())
        unknown = sorted(set(found) - set(number))
        if unknown:
            raise UserError(
                f"prompt {prompt!r}: this encoder has no word for {', '.join(unknown)}; it knows {' '.join(number)}"
            )
        if len(found) > config.max_tokens:
            raise UserError(f"prompt {prompt!r}: is {len(found)} tokens long, this encoder reads {config.max_tokens}")
        return [number[word] for word in found]

    def padded(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers B N, filled up to the longest; an empty prompt is one gap, "anything"."""
        rows = [self.tokens(prompt) or [GAP] for prompt in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not prompts:
            raise UserError("no prompt to encode; an empty text is a prompt, too")
        tokens = self.padded(prompts)
        return self.module(tokens), tokens != PAD

    @property
    def fingerprint(self) -> str:
        """Of every weight, bit by bit, and of the words."""
        return self._fingerprint

    @cached_property  # no protocol has such a member
    def _fingerprint(self) -> str:
        from fewstep.networks.encoders.codecs import fingerprint_of

        return fingerprint_of(self.module, asdict(self.module.config))

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        told = {"model_type": MODEL_TYPE, **asdict(self.module.config)}
        (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
        save_file({name: value.contiguous() for name, value in self.module.state_dict().items()}, folder / "model.safetensors")


def open_words(folder: str | Path) -> WordsEncoder:
    from safetensors.torch import load_file

    folder = Path(folder)
    told = json.loads((folder / "config.json").read_text())
    if told.pop("model_type", None) != MODEL_TYPE:
        raise UserError(f"{folder}/config.json: is not of a text encoder of words (model_type {MODEL_TYPE})")
    model = WordsModel(WordsConfig(**told | {"words": tuple(told["words"])})).eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return WordsEncoder(model)
