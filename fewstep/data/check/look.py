"""Reads all files of a sample by the readers that training uses, and keeps what they refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import choices
from fewstep.data.controls import Span
from fewstep.data.files import keypoints, masks, packs, video
from fewstep.data.folder.dataset import layout, parts
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.folder.samples import read_caption
from fewstep.untrusted.text import digest_of

Level = Literal["error", "warning"]

_CELLS = 8  # along each side of a fingerprint
_THUMB = 64  # px along the longer side of a thumbnail


@dataclass(frozen=True)
class Sample:
    """The properties of one sample; None where it has no such file, or one that cannot be read."""

    stem: str
    num_frames: int | None = None
    size: tuple[int, int] | None = None  # height, width
    fps: float | None = None
    motion: float | None = None  # mean change of a thumbnail's pixel from frame to frame, in levels of 255
    caption: str | None = None
    num_tokens: Mapping[str, int] = field(default_factory=dict[str, int])  # by folder of embeddings
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])  # of arrays, by folder
    parts: tuple[str, ...] = ()  # folders it has a file in

    @property
    def num_words(self) -> int | None:
        return None if self.caption is None else len(self.caption.split())


@dataclass(frozen=True)
class Problem:
    """One kind of mistake, with all samples that have it."""

    level: Level
    kind: str  # for machines: missing-noise, unreadable-videos, ...
    message: str
    stems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


@dataclass(frozen=True)
class Files:
    """The files of a data set, by part and stem."""

    place: Layout
    lead: Part  # which files make a sample
    files: Mapping[str, Mapping[str, Path]]  # by folder of the part
    packed: Mapping[str, packs.Packs]
    rows: Mapping[str, Mapping[str, Sequence[int]]]  # of packs, by folder and stem
    texts: tuple[str, ...]  # folders of embeddings
    broken: tuple[Problem, ...] = ()

    @property
    def stems(self) -> list[str]:
        return list(self.rows.get(self.lead.folder) or self.files.get(self.lead.folder, {}))


def _has_latents(folder: Path) -> bool:
    """Whether `prepare latents --into` wrote the folder."""
    try:
        return packs.has_packs(folder) and "part" in packs.open_packs(folder).made_from
    except ValueError:
        return False


def _control_parts() -> list[Part]:
    return [layout.control(cls.folder, cls.suffix) for cls in choices("control").values()]


def files_of(place: Layout) -> Files:
    controls, broken = _control_parts(), list[Problem]()
    all_parts = [layout.VIDEOS, layout.IMAGES, layout.CAPTIONS, layout.NOISE, layout.PATH, layout.LATENTS, *controls]
    all_parts += [layout.control_latents(part.folder) for part in controls]

    def files_of(part: Part) -> dict[str, Path]:
        try:
            return place.files(part)
        except ValueError as error:  # two files for one sample
            broken.append(Problem("error", f"ambiguous-{part.folder}", str(error)))
            return {}

    files = {part.folder: files_of(part) for part in all_parts}
    if files[layout.VIDEOS.folder] and files[layout.IMAGES.folder]:
        broken.append(
            Problem("error", "mixed", f"{place.root}: holds videos/ and images/; put them in a folder each (data=mix)")
        )
    others = ["txt_emb"]
    packed: dict[str, packs.Packs] = {}
    if place.form == "flat":
        folders = sorted(e.name for e in os.scandir(place.root) if e.is_dir() and not e.name.startswith("."))
        others = [name for name in folders if name not in files and not _has_latents(place.root / name)]
        for name in folders:
            try:
                if packs.has_packs(place.root / name):
                    packed[name] = packs.open_packs(place.root / name)
            except ValueError as error:
                broken.append(Problem("error", f"unreadable-{name}", str(error)))
    rows = {name: pack.by_stem() for name, pack in packed.items()}
    leads = (layout.VIDEOS, layout.IMAGES, layout.LATENTS, layout.PATH)
    lead = next((part for part in leads if files[part.folder] or part.folder in rows), layout.VIDEOS)
    stems = set(rows.get(lead.folder) or files[lead.folder])
    texts: list[str] = []
    for name in others:
        paths = files_of(layout.text(name))
        if name in rows or stems & set(paths):  # a folder that shares no name with the clips is none of ours
            texts.append(name)
            files[name] = paths
    return Files(place, lead, files, packed, rows, tuple(texts), tuple(broken))


# ---- one sample ------------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """The result of reading one sample."""

    sample: Sample
    wrong: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # kind, what is said
    content: str = ""  # hash of its clip's bytes
    print: NDArray[np.int16] | None = None  # its fingerprint
    change: float | None = None  # the largest of any pixel of the thumbnails, in levels of 255


@dataclass(frozen=True)
class _Own:
    """What one sample has, by folder: files, and rows of packs."""

    listing: Files
    stem: str
    files: Mapping[str, Path]
    rows: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, listing: Files, stem: str) -> _Own:
        files = {folder: paths[stem] for folder, paths in listing.files.items() if stem in paths}
        return cls(listing, stem, files, {folder: rows[stem] for folder, rows in listing.rows.items() if stem in rows})

    @property
    def folders(self) -> set[str]:
        return self.files.keys() | self.rows.keys()

    def path(self, name: str) -> Path:
        """Its file; of a row, the name that its file would have."""
        return self.files.get(name, self.listing.place.root / name / self.stem)

    def array(self, name: str) -> Tensor:
        """An array, from its pack or its file."""
        if name in self.rows:
            return self.listing.packed[name].read(self.rows[name][0])
        return parts.array(self.files[name])


def look_at(listing: Files, stem: str) -> Look:
    """Reads all files of a sample; never raises for their content."""
    look, own = Look(Sample(stem)), _Own.of(listing, stem)
    files = own.files
    facts: dict[str, Any] = {"parts": tuple(sorted(own.folders))}
    clip = files.get(layout.VIDEOS.folder) or files.get(layout.IMAGES.folder)
    header: video.Header | None = None
    if clip is not None:
        with _collected(look, f"unreadable-{listing.lead.folder}"):
            header = video.probe(clip)
            facts |= {"num_frames": header.num_frames, "size": header.size, "fps": header.fps or None}
            look.content = digest_of(clip)
            facts["motion"] = _watch_clip(look, clip, header)
    for part in _control_parts():
        if part.folder in files:
            with _collected(look, f"unreadable-{part.folder}"):
                _look_at_control(look, part, files[part.folder], header)
    if layout.CAPTIONS.folder in files:
        with _collected(look, "unreadable-metas"):
            facts["caption"] = read_caption(files[layout.CAPTIONS.folder])
    tokens, shapes = dict[str, int](), dict[str, tuple[int, ...]]()
    for name in [name for name in listing.texts if name in own.folders]:
        with _collected(look, f"unreadable-{name}"):
            array = own.array(name)
            num = max(len(array), 1) if array.ndim == 2 else 1
            tokens[name] = int(parts.padded(own.path(name), array, num).mask.sum())
            shapes[name] = (array.shape[-1],)
    shapes |= _look_at_pair(look, own, header)
    look.sample = Sample(stem, num_tokens=tokens, shapes=shapes, **facts)
    return look


def _look_at_control(look: Look, part: Part, path: Path, header: video.Header | None) -> None:
    """Whether a control goes frame by frame with its clip."""
    if part.suffixes[0] == ".mp4":
        own = video.probe(path)
        for _ in video.stream(path, (16, 16)):  # every frame is decoded
            pass
        odd = [] if header is None else [f"{what} {ours}, its clip {its}" for what, ours, its in own.differences(header)]
        if odd:
            look.wrong.append((f"unlike-{part.folder}", f"{path.name} ({'; '.join(odd)})"))
        return
    num = 1 if header is None else header.num_frames
    if part.folder == "seg":
        segments = masks.read(path)
        if segments and header is not None and segments[0].shape[0] != num:
            look.wrong.append((f"unlike-{part.folder}", f"{path.name} (frames {segments[0].shape[0]}, its clip {num})"))
    elif part.folder == "keypoint":
        keypoints.read(path, range(num))
    else:  # a control of the user's own reads its own files
        for cls in choices("control").values():
            if getattr(cls, "folder", None) == part.folder and header is not None:
                cls().read(path, Span(0, num), header.size)


def _look_at_pair(look: Look, own: _Own, header: video.Header | None) -> dict[str, tuple[int, ...]]:
    """Latents, noise and states: shapes that fit one another and the clip."""
    shapes, latents = dict[str, tuple[int, ...]](), None
    like: dict[str, Tensor] = {}
    if header is not None:
        like["frames"] = torch.empty((header.num_frames, *header.size, 3), device="meta")
    for name in (layout.LATENTS.folder, *(f"{p.folder}_latents" for p in _control_parts())):
        if name not in own.folders:
            continue
        with _collected(look, f"unreadable-{name}"):
            array = parts.checked_latents(own.path(name), own.array(name))
            shapes[name] = tuple(array.shape)
            if name == layout.LATENTS.folder:
                latents = array
            elif latents is not None and array.shape[1:] != latents.shape[1:]:
                look.wrong.append((f"unlike-{name}", f"{own.stem} ({tuple(array.shape)}, its clip {tuple(latents.shape)})"))
    if latents is not None:
        like = {"latents": latents}
    for part in (layout.NOISE, layout.PATH):
        name, is_noise = part.folder, part is layout.NOISE
        if name in own.files:
            with _collected(look, f"unreadable-{name}"):
                array = parts.noise(own.path(name)) if is_noise else parts.states(own.path(name), unknown_times=True)[0]
                shapes[name] = tuple(array.shape)
                parts.refuse_foreign_noise(own.path(name), array if is_noise else array[0], **like)
    return shapes


@contextmanager
def _collected(look: Look, kind: str) -> Iterator[None]:
    """Turns the error of a reader into an entry of the look; anything else is a fault of ours and goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        look.wrong.append((kind, str(error)))


def _watch_clip(look: Look, path: Path, header: video.Header) -> float:
    """Decodes every frame: how much it moves, and a fingerprint that survives encoding it again."""
    scale = _THUMB / max(header.size)
    size = max(round(header.height * scale), 1), max(round(header.width * scale), 1)
    sampled = {round(share * (header.num_frames - 1)) for share in (0, 0.25, 0.5, 0.75, 1)}
    first = before = None
    total, change, cells = 0.0, 0.0, list[NDArray[np.int16]]()
    for place, frame in enumerate(video.stream(path, size)):
        grey = frame.mean(-1).astype(np.float32)
        if first is None or before is None:
            first = grey
        else:
            total += float(np.abs(grey - before).mean())
            change = max(change, float(np.abs(grey - first).max()))
        before = grey
        if place in sampled:
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(grey)[None], _CELLS)
            cells.append(pooled.numpy().round().astype(np.int16).ravel())
    look.print = np.concatenate(cells)
    look.change = change if header.num_frames > 1 else None
    return total / max(header.num_frames - 1, 1)
