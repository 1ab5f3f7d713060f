"""Text encoders of small worlds: a tokenizer over a closed list of words, and a small transformer trained to fill gaps.

    encoder = open_words("fewstep/toyworld/stack/text_encoder")
    embeddings, mask = encoder.encode(["a red sphere rolls to the right."])   # B N 64; B N, true where a token is

A folder holds config.json (with the words) and model.safetensors; `fewstep prepare words` trains one, the toy world has one.
It stands where T5-XXL stands in the real pipelines: same contract, same files on disk. The computation is in words_alone.py,
which exported students carry with them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from fewstep.errors import UserError
from fewstep.files import write_json, write_tensors
from fewstep.networks.encoders import words_alone
from fewstep.networks.encoders.codecs import fingerprint_of
from fewstep.networks.encoders.text import Source, TextEncoder, TextForm, text_encoder
from fewstep.networks.encoders.words_alone import GAP, MODEL_TYPE, PAD, Words, WordsConfig, WordsModel
from fewstep.untrusted.text import fault_of, read_json

__all__ = ["GAP", "PAD", "WordsConfig", "WordsEncoder", "WordsModel", "open_words"]


@text_encoder(MODEL_TYPE)
@dataclass(frozen=True, eq=False)
class WordsEncoder(Words, TextEncoder):
    error: ClassVar[type[ValueError]] = UserError
    uses_mask: ClassVar[bool] = True
    standalone: ClassVar[Path | None] = Path(words_alone.__file__)

    @classmethod
    def open(cls, source: Source, max_tokens: int | None, dtype: torch.dtype, device: torch.device | str) -> WordsEncoder:
        folder = source.folder("text_encoder")
        config = read_json(folder / "config.json", "Copy that folder again", WordsConfig)
        with fault_of(folder):
            weights = folder / "model.safetensors"
            if config.dim * len(config.words) + config.num_layers * config.dim**2 > weights.stat().st_size:
                raise UserError(f"{weights}: is too small for the sizes in config.json. Copy that folder again")
            return cls.read(folder)

    @classmethod
    def form(cls, source: Source) -> TextForm:
        config = read_json(source.folder("text_encoder") / "config.json", "Copy that folder again", WordsConfig)
        return TextForm(config.max_tokens, uses_mask=True, dim=config.dim)

    @property
    def dim(self) -> int:
        return self.module.config.dim

    @property
    def fingerprint(self) -> str:
        """Of every weight, bit by bit, and of the words."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.module, asdict(self.module.config))

    def save(self, folder: Path) -> None:

        config = {"model_type": MODEL_TYPE, **asdict(self.module.config)}
        write_json(folder / "config.json", config)
        write_tensors(folder / "model.safetensors", self.module.state_dict())


open_words = WordsEncoder.read
