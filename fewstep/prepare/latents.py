"""Encodes the clips of a data set with a codec once; training reads the latents instead of pixels.

A row is the encoded sample of `Folder(x0="pixels", ...)`: the same windows, sizes and checks, with the same errors.
Rows are made one at a time, so that no batch size changes a bit of them, and kept in 16 bits (fewstep/data/files/packs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import ConfigError, choices
from fewstep.data.files.packs import Label, open_writer
from fewstep.data.folder.dataset import Folder, FolderData, layout
from fewstep.data.folder.encoding import hash_of, origin_of
from fewstep.data.folder.samples import Sample
from fewstep.errors import UserError, some
from fewstep.files import free_bytes
from fewstep.networks.encoders.codecs import Codec
from fewstep.prepare.summary import Summary
from fewstep.progress import track

Half = Literal["float16", "bfloat16"]
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def write(
    data: Folder,
    codec: Codec,
    *,
    dtype: Half = "float16",
    device: torch.device | str = "cpu",
    ahead: int = 2,
    into: str = "latents",
) -> Summary:
    """Encodes every sample of `data` (pixels) that is not cached, and its control if the data set names one.

    into: the folder of the rows; those of a control go into CONTROL_INTO.
    `ahead` clips are decoded while one is encoded. Refuses, before encoding anything, clips that do not fit the codec, a cache
    made with another codec or other settings, and a disk without room. Clips that cannot be decoded are named at the end.
    """
    if data.x0 != "pixels" or data.pairs or data.text is not None:
        raise UserError("latents are made of pixels alone: x0=pixels, no text, no pairs")
    opened = clips_of(data)
    hashes = dict[Path, str]()
    summary = Summary(0, 0)
    parts: list[tuple[str, Callable[[Batch], Tensor | None]]] = [("videos", lambda batch: batch.x0)]
    if data.control is not None:
        name = data.control.folder
        parts.append((name, lambda batch: batch.cond.control[name]))
    for part, pixels_of in parts:
        summary += _write_part(opened, part, pixels_of, codec, dtype, device, ahead, hashes, into)
    return summary


def clips_of(data: Folder) -> FolderData:
    """The clips of a data set with its windows; refuses the layout of a folder for each sample."""
    opened = replace(data, ram_gib=0.0).open()
    if opened.layout.form != "flat":
        raise UserError(f"{data.dataset_dir}: has a folder for each sample; latents are cached for folders with videos/ alone")
    return opened


def folder_of(part: str, into: str = "latents") -> str:
    """The folder of a part's latents in the data set."""
    return into if part == "videos" else layout.control_latents(part, into).folder


def side_by_side(num_frames: int | None, sequence_interval: int) -> int:
    """Frames between the starts of two windows that lie side by side: the frames of the file that a window lies over."""
    return 1 if num_frames is None else (num_frames - 1) * sequence_interval + 1


def extent(data: FolderData) -> str:
    """How much there is to encode, in one line."""
    spec, num = data.spec, len(set(data.stems))
    if spec.num_frames is None:
        return f"{num} clips, whole"
    every = f", one every {spec.start_frame_interval} frames" if len(data) > num else ""
    return f"{len(data)} windows of {num} clips, {spec.num_frames} frames each{every}"


def control_of(name: str) -> Any:  # whatever is registered under that name
    """The control of that name with its defaults."""
    kinds = choices("control")
    if name not in kinds:
        raise ConfigError(f"there is no control {name!r}; one of {', '.join(sorted(kinds))}")
    return kinds[name]()


# ---- parts of the above --------------------------------------------------------------------------------------------


def _write_part(
    data: FolderData,
    part: str,
    pixels_of: Callable[[Batch], Tensor | None],
    codec: Codec,
    dtype: Half,
    device: torch.device | str,
    ahead: int,
    hashes: dict[Path, str],
    into: str,
) -> Summary:
    samples = data.samples
    shape = codec.shape(*_pixels_of_first(data))
    labels = [
        _label(sample, part, hashes, data.spec.resize == "pad") for sample in track(samples, len(samples), f"hashing {part}")
    ]
    failed: list[str] = []
    with open_writer(data.layout.root / folder_of(part, into), origin_of(data.spec, part, codec.fingerprint, dtype)) as writer:
        dropped = writer.keep_only(labels)
        todo = [number for number, label in enumerate(labels) if not writer.has(label)]
        _refuse_full_disk(data.layout.root, len(todo), shape)

        def pixels(number: int) -> Tensor | ValueError:
            if writer.has(labels[number]):
                return torch.empty(0)
            try:
                clip = pixels_of(data.batch(torch.tensor([number])))
            except ValueError as error:
                return error
            assert clip is not None, part
            return clip

        def encode(frames: Tensor) -> Tensor:
            with torch.inference_mode():
                latents = codec.encode(frames.to(device))[0]
            assert tuple(latents.shape) == shape, (latents.shape, shape)
            return latents.to("cpu", getattr(torch, dtype))

        everything = track(ahead_of(pixels, range(len(labels)), ahead), len(labels), f"encoding {part}")
        for label, frames in zip(labels, everything, strict=True):
            if isinstance(frames, ValueError):
                failed.append(str(frames))
            else:
                writer.put(label, lambda frames=frames: encode(frames))
    if failed:
        raise UserError(
            f"{data.layout.root}: {len(failed)} of {len(labels)} could not be encoded, the others are done: {some(failed, 3)}"
        )
    return Summary(len(labels), writer.new, dropped=dropped)


def _label(sample: Sample, part: str, hashes: dict[Path, str], is_padded: bool) -> Label:
    path = sample.files[part]
    if path not in hashes:
        hashes[path] = hash_of(path)
    assert sample.header is not None, sample
    facts = {
        "fps": sample.header.fps / sample.span.stride,
        "num_frames": sample.span.count,
        "stride": sample.span.stride,
        "bytes": path.stat().st_size,
    }
    if is_padded:  # what the margin follows from
        facts |= {"height": float(sample.header.height), "width": float(sample.header.width)}
    return Label(sample.stem, hashes[path], sample.span.start, facts)


def _pixels_of_first(data: FolderData) -> tuple[int, int, int]:
    first = data.batch(torch.tensor([0])).x0
    assert first is not None
    return first.shape[2], first.shape[3], first.shape[4]


def _refuse_full_disk(root: Path, num: int, shape: Sequence[int]) -> None:
    """Refuses a disk without room for twice the rows: they wait one by one before they are packed."""
    needed = num * 2 * 2 * torch.Size(shape).numel()
    free = free_bytes(root)
    if needed > free:
        raise UserError(
            f"{root}: {num} latents of {tuple(shape)} need {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} are free. Free some "
            "space and run the same command again"
        )


def ahead_of(do: Callable[[_Item], _Answer], items: Iterable[_Item], num: int) -> Iterator[_Answer]:
    """The results in order; `num` of them are computed ahead while one is used."""
    if num < 1:
        yield from map(do, items)
        return
    with ThreadPoolExecutor(num) as pool:
        waiting = []
        try:
            for item in items:
                waiting.append(pool.submit(do, item))
                if len(waiting) > num:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
