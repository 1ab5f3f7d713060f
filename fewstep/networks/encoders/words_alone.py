"""The text encoder of words by itself. Exported students carry this file, so it uses torch and safetensors only.

encoder = open_text_encoder("fewstep/toyworld/stack/text_encoder")
embeddings, mask = encoder.encode(["a red sphere rolls to the right."])   # B N 64; B N, true where a token is
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn

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

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings B N D of the tokens B N; those of padding are 0, and no word sees them."""
        pad = tokens == PAD
        hidden = self.layers(self.word(tokens) + self.place[: tokens.shape[1]], src_key_padding_mask=pad)
        return self.norm(hidden).masked_fill(pad[..., None], 0)


def split(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


@dataclass(frozen=True, eq=False)
class Words:
    """Prompts over a closed list of words to embeddings. A word that is not in the list is refused by name, never guessed."""

    module: WordsModel
    error: ClassVar[type[ValueError]] = ValueError  # what it raises

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The encoder in a folder with config.json and model.safetensors."""
        from safetensors.torch import load_file

        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        if config.pop("model_type", None) != MODEL_TYPE:
            raise cls.error(f"{folder}/config.json: is not of a text encoder of words (model_type {MODEL_TYPE})")
        model = WordsModel(WordsConfig(**config | {"words": tuple(config["words"])})).eval().requires_grad_(False)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return cls(model)

    def tokens(self, prompt: str) -> list[int]:
        config = self.module.config
        number = {word: i + 2 for i, word in enumerate(config.words)}
        words = split(prompt)
        unknown = sorted(set(words) - set(number))
        if unknown:
            raise self.error(
                f"prompt {prompt!r}: this encoder has no word for {', '.join(unknown)}; it knows {' '.join(number)}"
            )
        if len(words) > config.max_tokens:
            raise self.error(f"prompt {prompt!r}: is {len(words)} tokens long, this encoder reads {config.max_tokens}")
        return [number[word] for word in words]

    def padded(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token numbers B N, filled up to the longest; an empty prompt is one gap, "anything"."""
        rows = [self.tokens(prompt) or [GAP] for prompt in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if not prompts:
            raise self.error("no prompt to encode; an empty text is a prompt, too")
        tokens = self.padded(prompts)
        return self.module(tokens), tokens != PAD


open_text_encoder = Words.read
