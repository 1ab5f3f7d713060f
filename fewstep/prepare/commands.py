"""The commands of `fewstep prepare`: each opens what it needs, works, and returns one line for the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from fewstep.config import ConfigError
from fewstep.data.folder.dataset import Folder
from fewstep.prepare import latents as latents_
from fewstep.prepare import text as text_


def text(
    folder: Path,
    encoder: str,
    prompt: str | None,
    negative: str | None,
    into: str,
    form: str,
    max_tokens: int | None,
    device: str | None,
) -> str:
    from fewstep.networks.encoders.text import open_text_encoder

    if "/" in into or into.startswith("."):
        raise ConfigError(f"--into names a folder in {folder}, t5_xxl for instance, not {into!r}")
    opened = open_text_encoder(encoder, max_tokens=max_tokens, device=device or _best_device())
    summary = text_.write(folder, opened, folder=into, prompt=prompt, form=cast(text_.Form, form))
    if negative is not None:
        text_.write_one(folder / "negative.pickle", opened, negative)
    return f"{folder / into}: {summary.text('captions')}"


def latents(
    folder: Path, codec: str, control: str | None, dtype: str, device: str | None, opening: dict[str, Any], **windows: Any
) -> str:
    """`windows` are fields of Folder, `opening` what `open_codec` takes."""
    from fewstep.networks.encoders.codecs import open_codec

    place = device or _best_device()
    named = None if control is None else latents_.control_named(control)
    data = Folder(str(folder), text=None, control=named, **windows)
    summary = latents_.write(data, open_codec(codec, device=place, **opening), dtype=cast(latents_.Half, dtype), device=place)
    return f"{folder}: {summary.text('latents')}"


def controls(
    folder: Path,
    type: str,
    preset: str,
    model: str | None,
    files: Path | None,
    metric: bool,
    quality: str | None,
    device: str | None,
) -> str:
    from fewstep.prepare import controls as controls_

    best = _quality(quality)
    if files is not None:
        maker: controls_.Maker = controls_.OfFiles(cast(controls_.Type, type), files, metric, best)
    elif type == "edge" or type == "vis":
        maker = controls_.OfFrames(type, cast(Any, preset), best)
    elif type == "depth" and model is not None:
        maker = controls_.OfDepthModel(model, device or _best_device(), quality=best)
    else:
        ways = {"depth": "--model with a Depth-Anything model of transformers, or --from", "keypoint": "--from"}
        raise ConfigError(f"--type {type} needs {ways.get(type, '--from')} with a folder of files, one for each clip")
    return f"{folder / type}: {controls_.write(folder, maker).text('clips')}"


def shards(folder: Path, out: str, parts: str | None, shard_mib: int) -> str:
    from fewstep.prepare.shards import write

    summary = write(folder, out, parts=None if parts is None else parts.split(","), shard_bytes=shard_mib * 2**20)
    return f"{out}: {summary.text('samples')}"


def _quality(text: str | None) -> Any:  # crf, "lossless" or None
    if text is None or text == "lossless":
        return text
    if not text.isdigit() or int(text) > 51:
        raise ConfigError(f"--quality is lossless, or a crf from 0 (best) to 51, not {text!r}")
    return int(text)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
