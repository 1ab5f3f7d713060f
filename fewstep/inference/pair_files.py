"""The files of pairs, in one of two forms. Both are read by the data set `folder`.

    ours      OUT/videos/STEM.mp4  metas/STEM.txt  t5_xxl/STEM.pickle  noise/STEM.pickle  latents/STEM.safetensors
              path/STEM.safetensors  CONTROL/STEM.mp4  CONTROL_latents/STEM.safetensors
    fastgen   OUT/000000/latent.pth  path.pth  prompt.txt  video.mp4, as generate_ode_pairs.py writes them, and noise.pth and
              txt_emb.pth, the keys of FastGen's loader

A pair is whole when its mp4 is there, which is written last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from fewstep.data.files import arrays, cache, video
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.folder.parts import stored_embedding
from fewstep.data.folder.samples import read_caption
from fewstep.errors import UserError
from fewstep.files import copy_file, write_text, write_torch

Form = Literal["ours", "fastgen"]
Quality = int | Literal["lossless"]


@dataclass(frozen=True)
class Pair:
    """One pair, before it is written."""

    caption: str
    text: Path | Mapping[str, Tensor] | None  # the embedding of its caption: a file to copy, or its arrays
    noise: Tensor  # C T H W
    x0: Tensor
    states: Tensor | None  # K C T H W
    times: Tensor | None  # (K,)
    frames: np.ndarray  # uint8 T H W 3
    fps: float
    control_latents: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    controls: Mapping[Part, Path | np.ndarray] = field(default_factory=dict["Part", "Path | np.ndarray"])  # files, or frames


@dataclass(frozen=True)
class PairFiles:
    """Where the pairs of one folder are."""

    root: Path
    form: Form
    text: str | None  # folder of the embeddings
    has_states: bool
    control: str | None = None
    quality: Quality = 18

    @property
    def place(self) -> Layout:
        return Layout(self.root, "flat" if self.form == "ours" else "per_sample")

    def name(self, stem: str, number: int) -> str:
        """The name of the files of a pair."""
        return stem if self.form == "ours" else f"{number:06d}"

    def file(self, part: Part, name: str) -> Path:
        suffix = ".pth" if self.form == "fastgen" and ".pth" in part.suffixes else part.suffixes[0]
        return self.place.file(part, name).with_suffix(suffix)

    def has(self, name: str) -> bool:
        parts = [layout.VIDEOS, layout.CAPTIONS, layout.LATENTS] + ([layout.PATH] if self.has_states else [])
        parts += [layout.NOISE] if self.form == "ours" else []
        parts += [] if self.control is None else [layout.control_latents(self.control)]
        return all(self.file(part, name).is_file() for part in parts)

    def caption(self, name: str) -> str:
        return read_caption(self.file(layout.CAPTIONS, name))

    def embedding(self, name: str) -> Tensor | None:
        """(tokens, D): the embedding that was stored with a pair."""
        if self.text is None:
            return None
        part = layout.text(self.text)
        path = self.root / name / "txt_emb.pth" if self.form == "fastgen" else self.file(part, name)
        if not path.is_file():  # copied under the suffix that it had
            path = self.place.files(part).get(name, path)
        return arrays.read_one(path, "text") if path.is_file() else None

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """x0 of a pair, and its states."""
        states = arrays.read_one(self.file(layout.PATH, name), "path") if self.has_states else None
        return arrays.read_one(self.file(layout.LATENTS, name), "latents"), states

    def write(self, name: str, pair: Pair) -> None:
        if self.form == "fastgen":
            self._write_fastgen(name, pair)
            return
        place = self.place
        write_text(place.file(layout.CAPTIONS, name), pair.caption + "\n")
        if self.text is not None and pair.text is not None:
            _store(pair.text, place.file(layout.text(self.text), name))
        for part, content in pair.controls.items():
            if isinstance(content, Path):
                _copy(content, place.file(part, name))
            else:
                video.write(place.file(part, name), content, pair.fps, quality="lossless")
        for kind, latents in pair.control_latents.items():
            cache.write(place.file(layout.control_latents(kind), name), {"latents": latents.half().cpu()})
        if pair.states is not None and pair.times is not None:
            cache.write(place.file(layout.PATH, name), {"path": pair.states.cpu(), "path_times": pair.times})
        arrays.write_pickle(place.file(layout.NOISE, name), pair.noise.cpu().numpy())
        cache.write(place.file(layout.LATENTS, name), {"latents": pair.x0.cpu()}, facts={"fps": pair.fps})
        video.write(place.file(layout.VIDEOS, name), pair.frames, pair.fps, quality=self.quality)  # last: it says "done"

    def _write_fastgen(self, name: str, pair: Pair) -> None:
        write_text(self.file(layout.CAPTIONS, name), pair.caption + "\n")
        text = next(iter(_entries(pair.text).values()), None)
        tensors = {"txt_emb": text, "path": pair.states, "noise": pair.noise, "latent": pair.x0}
        for file, tensor in tensors.items():
            if tensor is not None:
                write_torch(self.root / name / f"{file}.pth", tensor.detach().cpu().clone())
        video.write(self.file(layout.VIDEOS, name), pair.frames, pair.fps, quality=self.quality)


def check_form(form: Form, control: str | None, text: Path | Mapping[str, Tensor] | None) -> None:
    """Refuses what a form cannot hold. text: the embedding of one of the captions."""
    if form == "fastgen" and control is not None:
        raise UserError(f"--format fastgen has no place for a control; leave out --control {control}, or --format")
    if form == "fastgen" and "pooled" in _entries(text):
        raise UserError("--format fastgen has no place for the pooled vectors of SDXL's and Flux's texts; leave out --format")


def evenly(names: Sequence[int], num: int) -> list[int]:
    """`num` of the names, spread evenly, the first and the last among them."""
    if num >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / max(num - 1, 1))] for i in range(num)]


def _entries(text: Path | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    return arrays.read(text) if isinstance(text, Path) else text or {}


def _store(text: Path | Mapping[str, Tensor], target: Path) -> None:
    if isinstance(text, Path):
        _copy(text, target)
    else:
        arrays.write_pickle(target, stored_embedding(**text))


def _copy(source: Path, target: Path) -> None:
    target = target.with_name(target.name.removesuffix(target.suffix) + source.suffix)
    if not target.is_file():
        copy_file(source, target)
