"""The commands of `fewstep prepare`: each opens what it needs, works, and returns one line for the user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

from fewstep.config import ConfigError
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder
from fewstep.parallel import device_of
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

    _check_into(folder, into, "t5_xxl")
    opened = open_text_encoder(encoder, max_tokens=max_tokens, device=device_of(device))
    if negative is not None:
        text_.check_negative(folder, into, opened, negative)
    summary = text_.write(folder, opened, folder=into, prompt=prompt, form=cast(text_.Form, form))
    if negative is not None:
        text_.write_negative(folder, into, opened, negative)
    return f"{folder / into}: {summary.text('captions')}"


def latents(
    folder: Path,
    codec: str,
    control: str | None,
    dtype: str,
    device: str | None,
    opening: dict[str, Any],
    into: str = "latents",
    measure: int = 8,
    **windows: Any,
) -> str:
    """`windows` are fields of Folder, `opening` what `open_codec` takes; measure: clips whose reconstruction is measured.

    Windows lie side by side unless start_frame_interval says otherwise.
    """
    from fewstep.networks.encoders.codecs import open_codec
    from fewstep.prepare.reconstruction import reconstruction_of

    _check_into(folder, into, "latents")
    place = device_of(device)
    signal = None if control is None else latents_.control_of(control)
    if windows.get("start_frame_interval") is None:
        windows["start_frame_interval"] = latents_.side_by_side(windows.get("num_frames"), windows["sequence_interval"])
    data = Folder(str(folder), text=None, control=signal, **windows)
    clips = latents_.clips_of(data)
    print(latents_.extent(clips), file=sys.stderr)
    opened = open_codec(codec, device=place, **opening)
    summary = latents_.write(data, opened, dtype=cast(latents_.Half, dtype), device=place, into=into)
    quality = reconstruction_of(clips, opened, measure, folder / into, place)
    if quality is not None:
        print(quality.text(), file=sys.stderr)
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

    best: Any = quality if quality is None or quality == "lossless" else int(quality)  # the option refuses others
    if files is not None:
        maker: controls_.Maker = controls_.OfFiles(cast(controls_.Type, type), files, metric, best)
    elif type == "edge" or type == "vis":
        maker = controls_.OfFrames(type, cast(Any, preset), best)
    elif type == "depth" and model is not None:
        maker = controls_.OfDepthModel(model, device_of(device), quality=best)
    else:
        ways = {"depth": "--model with a Depth-Anything model of transformers, or --from", "keypoint": "--from"}
        raise ConfigError(f"--type {type} needs {ways.get(type, '--from')} with a folder of files, one for each clip")
    return f"{folder / type}: {controls_.write(folder, maker).text('clips')}"


def shards(folder: Path, out: str, parts: str | None, shard_mib: int) -> str:
    from fewstep.prepare.shards import write

    summary = write(folder, out, parts=None if parts is None else parts.split(","), shard_bytes=shard_mib * 2**20)
    return f"{out}: {summary.text('samples')}"


def _check_into(folder: Path, into: str, example: str) -> None:
    reserved = {part.folder for part in (layout.VIDEOS, layout.IMAGES, layout.CAPTIONS, layout.NOISE, layout.PATH)}
    if not into or "/" in into or into.startswith(".") or into in reserved:
        raise ConfigError(f"--into names a folder of its own in {folder}, {example} for instance, not {into!r}")
