"""What the verbs of `fewstep prepare` do: open, work, and tell it in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import torch

from fewstep.data.folder.dataset import Folder
from fewstep.errors import UserError
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

    _refuse_unknown("--form", form, get_args(text_.Form))
    if "/" in into or into.startswith("."):
        raise UserError(f"--into names a folder in {folder}, t5_xxl for instance, not {into!r}")
    opened = open_text_encoder(encoder, max_tokens=max_tokens, device=device or _best_device())
    told = text_.write(folder, opened, folder=into, prompt=prompt, form=cast(text_.Form, form))
    if negative is not None:
        text_.write_one(folder / "negative.pickle", opened, negative)
    kept = f", {told.kept} that were there before are left as they are" if told.kept else ""
    return f"{folder / into}: {told.num} captions, {told.made} of them new{kept}"


def latents(
    folder: Path, codec: str, control: str | None, dtype: str, device: str | None, opening: dict[str, Any], **windows: Any
) -> str:
    """`windows` are fields of Folder, `opening` what `open_codec` takes."""
    from fewstep.networks.encoders.codecs import open_codec

    _refuse_unknown("--dtype", dtype, get_args(latents_.Half))
    _refuse_unknown("--resize", windows["resize"], ("stretch", "crop"))
    place = device or _best_device()
    named = None if control is None else latents_.control_named(control)
    data = Folder(str(folder), text=None, control=named, **windows)
    told = latents_.write(data, open_codec(codec, device=place, **opening), dtype=cast(latents_.Half, dtype), device=place)
    dropped = f", {told.dropped} of clips that changed or are gone dropped" if told.dropped else ""
    return f"{folder}: {told.num} latents, {told.made} of them new{dropped}"


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

    _refuse_unknown("--type", type, get_args(controls_.Type))
    best = _quality(quality)
    if files is not None:
        maker: controls_.Maker = controls_.OfFiles(cast(controls_.Type, type), files, metric, best)
    elif type == "edge" or type == "vis":
        maker = controls_.OfFrames(type, cast(Any, preset), best)
    elif type == "depth" and model is not None:
        maker = controls_.OfDepthModel(model, device or _best_device(), quality=best)
    else:
        ways = {"depth": "--model with a Depth-Anything model of transformers, or --from", "keypoint": "--from"}
        raise UserError(f"--type {type} needs {ways.get(type, '--from')} with a folder of files, one for each clip")
    told = controls_.write(folder, maker)
    kept = f", {told.kept} that were there before are left as they are" if told.kept else ""
    return f"{folder / type}: {told.num} clips, {told.made} of them new{kept}"


def shards(folder: Path, out: str, parts: str | None, shard_mib: int) -> str:
    from fewstep.prepare.shards import write

    told = write(folder, out, parts=None if parts is None else parts.split(","), shard_bytes=shard_mib * 2**20)
    return f"{out}: {told.num} samples in {told.shards} shards, {told.made} of them new"


def _quality(text: str | None) -> Any:  # crf, "lossless" or None
    if text is None or text == "lossless":
        return text
    if not text.isdigit() or int(text) > 51:
        raise UserError(f"--quality is lossless, or a crf from 0 (best) to 51, not {text!r}")
    return int(text)


def _refuse_unknown(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option} is one of {', '.join(known)}, not {value!r}")


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
