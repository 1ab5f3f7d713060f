"""What the verbs `fewstep prepare text` and `latents` do: open, work, and tell it in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import torch

from fewstep.data.folder import Folder
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
    from fewstep.networks.text import open_text_encoder

    _refuse_unknown("--form", form, get_args(text_.Form))
    if "/" in into or into.startswith("."):
        raise ValueError(f"--into names a folder in {folder}, t5_xxl for instance, not {into!r}")
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
    from fewstep.networks.codecs import open_codec

    _refuse_unknown("--dtype", dtype, get_args(latents_.Half))
    _refuse_unknown("--resize", windows["resize"], ("stretch", "crop"))
    place = device or _best_device()
    named = None if control is None else latents_.control_named(control)
    data = Folder(str(folder), text=None, control=named, **windows)
    told = latents_.write(data, open_codec(codec, device=place, **opening), dtype=cast(latents_.Half, dtype), device=place)
    dropped = f", {told.dropped} of clips that changed or are gone dropped" if told.dropped else ""
    return f"{folder}: {told.num} latents, {told.made} of them new{dropped}"


def _refuse_unknown(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is one of {', '.join(known)}, not {value!r}")


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
