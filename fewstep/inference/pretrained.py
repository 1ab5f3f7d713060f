"""Models of transformers that a plug-in of `generate` uses: whether one is there, and opening it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.errors import UserError

_WEIGHTS = ("*.safetensors", "*.bin")


def expect(address: str, what: str, file: str = "config.json") -> dict[str, Any]:
    """The small JSON file of the model in a folder or at a hub id; UserError unless the model is there. Reads no weights."""
    from fewstep.networks.files import hub
    from fewstep.untrusted.text import read_json

    folder = Path(address)
    if not folder.is_dir():
        hub.expect_id(address, what)
        config = hub.read_json(address, file)
        if config is None:
            raise UserError(f"no {what} at '{address}': the repository has no {file}")
        return config
    if not (folder / file).is_file():
        raise UserError(f"no {what} at '{address}': it has no {file}")
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise UserError(f"no {what} at '{address}': its weights are missing ({' or '.join(_WEIGHTS)})")
    return read_json(folder / file, "Copy that folder again")


def load(cls: Any, address: str, device: Any) -> Any:  # Any: one of transformers' Auto classes, and its model; torch.device
    """The model, frozen and in eval mode, in the precision of its files. Refuses one whose files lack weights of its class."""
    from fewstep.networks.files.folders import load_transformer

    return load_transformer(cls, address, dtype="auto").to(device)


def tokenizer(address: str) -> Any:  # Any: transformers' tokenizers have no common type
    """The tokenizer beside the model."""
    from transformers import AutoTokenizer

    from fewstep.networks.files.folders import load_reader

    return load_reader(AutoTokenizer, address)


def continuation(model: Any, tokenizer: Any, ids: Any, max_new_tokens: int) -> str:
    """What a causal language model writes after `ids` (a tokenizer's output), without sampling."""
    import torch

    ids = {name: value.to(model.device) for name, value in ids.items() if name in ("input_ids", "attention_mask")}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def chat(tokenizer: Any, *messages: tuple[str, str]) -> Any:
    """The tokens of a conversation of (role, text), with the opening of the answer."""
    conversation = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True)
