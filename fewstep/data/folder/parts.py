"""Reads and checks the arrays of a clip: latents, noise, states of the teacher's ODE, text embeddings.

Every error names the file and what to do. Shapes are of one sample; a first axis of one is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.files import arrays, cache
from fewstep.errors import UserError

_ENOUGH = 256  # numbers that tell a standard deviation to 5 %


def latents(path: Path) -> Tensor:
    """C T H W, in the precision of the file."""
    return checked_latents(path, arrays.read_one(path, "latents"))


def checked_latents(path: Path, latents: Tensor) -> Tensor:
    """Latents C T H W, checked; `path` names them in messages."""
    return _checked(path, latents, 4, "C, T, H, W")


def fact(path: Path, name: str) -> float | None:
    """A fact from the header of a cache file of this project; None for other formats, and where it has no such fact."""
    return cache.read(path).facts.get(name) if path.suffix == ".safetensors" else None


def noise(path: Path) -> Tensor:
    """C T H W in float32, of variance 1."""
    noise = _checked(path, arrays.read_one(path, "noise"), 4, "C, T, H, W").float()
    spread = float(noise.std()) if noise.numel() >= _ENOUGH else 1.0
    if not 0.5 < spread < 2:
        raise UserError(
            f"{path}: its standard deviation is {spread:.3g}, but noise is stored with variance 1. A start state of a sampler "
            "is that noise times its largest sigma (80 in Cosmos 1): divide by it"
        )
    return noise


def refuse_foreign_noise(path: Path, noise: Tensor, *, latents: Tensor | None = None, frames: Tensor | None = None) -> None:
    """Raises ValueError if `noise` cannot be that of a clip, described by its latents C T H W or by its frames T H W 3."""
    shape = tuple(noise.shape)
    if latents is not None and shape != tuple(latents.shape):
        raise UserError(
            f"{path}: is noise of shape {shape}, but its clip's latents are {tuple(latents.shape)}. Make this pair again"
        )
    if frames is None:
        return
    num, height, width, _ = frames.shape
    _, t, h, w = shape
    # A tokenizer makes 1 + (T - 1) / k frames of H / n by W / n, for some k and n.
    if height % h or width % w or height // h != width // w or (num > 1) != (t > 1) or (num - 1) % max(t - 1, 1):
        raise UserError(
            f"{path}: is noise of shape (C, T, H, W) = {shape}, which no clip of {num} frames of {height} x {width} has: T - 1 "
            f"must divide {num - 1}, and H and W the height and width by one factor. Make this pair again"
        )


def array(path: Path) -> Tensor:
    """The array of a file of latents or text, whatever its name in the file."""
    entries = arrays.read(path)
    return entries["text"] if "text" in entries else arrays.read_one(path, "latents")


def states(path: Path, default_times: tuple[float, ...] = (), *, unknown_times: bool = False) -> tuple[Tensor, Tensor]:
    """States K C T H W in float32 and their times (K,), from the file or, if it has none, `default_times`.

    With `unknown_times`, a file without times gets evenly spaced ones, for readers of the states alone.
    """
    entries = arrays.read(path)
    value = entries.get("path", next(iter(entries.values())) if len(entries) == 1 else None)
    if value is None:
        raise UserError(f"{path}: holds {', '.join(sorted(entries)) or 'nothing'}, but no 'path'")
    value = _checked(path, value, 5, "K, C, T, H, W").float()
    if unknown_times and "path_times" not in entries:
        default_times = tuple(1 - n / len(value) for n in range(len(value)))
    times = entries.get("path_times")
    defaults = torch.tensor(default_times)
    if times is None and not default_times:
        raise UserError(
            f"{path}: does not say at which times its {len(value)} states are. Set data.path_times; FastGen's are "
            "[0.999, 0.937, 0.833, 0.624]"
        )
    if (
        times is not None
        and default_times
        and (times.shape != defaults.shape or not torch.allclose(times.float(), defaults, atol=1e-4))
    ):
        raise UserError(
            f"{path}: has states at {times.tolist()}, not at data.path_times {list(default_times)}: leave that setting out"
        )
    times = (defaults if times is None else times).float()
    if times.shape != (len(value),) or bool((times.diff() >= 0).any()):
        raise UserError(
            f"{path}: {len(value)} states need as many times, descending, not {times.tolist()}. Make this pair again"
        )
    return value, times


@dataclass(frozen=True)
class Embedding:
    """The embedding of one text."""

    text: Tensor  # max_tokens D, cut or padded with zeros, in the precision of the file
    mask: Tensor  # max_tokens, true where a token is
    pooled: Tensor | None = None  # P, of the whole text: SDXL and Flux

    def zeros(self) -> Embedding:
        """No text. Every token counts: a network that masks its padding would have nothing left to attend to."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Embedding(torch.zeros_like(self.text), torch.ones_like(self.mask), pooled)


def embedding(path: Path, max_tokens: int) -> Embedding:
    """The embedding in a file: its tokens, or "text" and "pooled"."""
    entries = arrays.read(path)
    pooled = entries.get("pooled")
    if pooled is None:
        return padded(path, arrays.read_one(path, "text"), max_tokens)
    if "text" not in entries:
        raise UserError(f"{path}: holds {', '.join(sorted(entries))}, but no 'text'. Embed it again: fewstep prepare text")
    return padded(path, entries["text"], max_tokens, pooled)


def stored_embedding(text: Tensor, pooled: Tensor | None = None) -> Any:  # plain data
    """What the pickle of an embedding holds: a list of one array, as Cosmos writes it, or "text" and "pooled"."""
    return [text.numpy()] if pooled is None else {"text": text.numpy(), "pooled": pooled.numpy()}


def negative_embedding(path: Path, like: Embedding, folder: str) -> Embedding:
    """The embedding in a file, of the same tokens and channels as `like`, that of a caption in `folder`."""
    other = embedding(path, len(like.text))
    if other.text.shape != like.text.shape:
        raise UserError(
            f"{path}: embeds in {other.text.shape[1]} numbers, but {folder}/ in {like.text.shape[1]}: embed it with the same "
            "encoder"
        )
    if (other.pooled is None) != (like.pooled is None):
        which = "lacks" if other.pooled is None else "has"
        raise UserError(f"{path}: {which} a pooled vector, unlike {folder}/: embed it with the same encoder")
    return other


def padded(path: Path, embedding: Tensor, max_tokens: int, pooled: Tensor | None = None) -> Embedding:
    """The same for tokens (N, D) that are in memory; `path` names them in messages."""
    tokens = _checked(path, embedding, 2, "tokens, D")
    if not len(tokens):
        raise UserError(f"{path}: has no tokens; even an empty text has its end token. Embed it again: fewstep prepare text")
    text = torch.zeros(max_tokens, tokens.shape[1], dtype=tokens.dtype)
    num = min(len(tokens), max_tokens)
    text[:num] = tokens[:num]
    return Embedding(text, torch.arange(max_tokens) < num, None if pooled is None else _checked(path, pooled, 1, "P"))


def _checked(path: Path, tensor: Tensor, axes: int, names: str) -> Tensor:
    if tensor.ndim == axes + 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != axes:
        raise UserError(f"{path}: has shape {tuple(tensor.shape)}, where ({names}) is wanted. Make it again")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: holds {tensor.dtype}, not floating-point numbers. Make it again")
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{path}: has {int((~torch.isfinite(tensor)).sum())} numbers that are not finite. Make it again")
    return tensor
