"""The card of a model: `student.json`, which lies beside the weights of a run and of an export. Its kind is student or teacher.

It says how the network is built, how it is sampled, and in which envelope it was trained. Runs and exports write it here,
`open_model` reads it here; whatever is damaged in it is one UserError that names the file and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.config import ConfigError, dump, parse
from fewstep.diffusion import Sampler, StudentSampler, TeacherSampler
from fewstep.diffusion.by_chunk import ByChunk
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.rollout import Renoise
from fewstep.errors import UserError
from fewstep.files import write_json
from fewstep.networks.contract import AnyNetwork
from fewstep.networks.encoders.codecs import Form
from fewstep.networks.files.folders import refuse_sizes
from fewstep.networks.grid import Grid
from fewstep.untrusted.text import read_json

FILE = "student.json"
OF_THE_PIPELINE = ("schedule", "network_family", "latent_scale", "latent_channels")  # what an exported pipeline.py reads


@dataclass(frozen=True)
class Envelope:
    """What a student was trained on; beyond it nobody knows what it does. None: not known."""

    latent_shape: tuple[int, int, int, int] | None = None  # C t h w
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_in_teacher: float | None = None  # uncond + w (cond - uncond), baked in; 1: none

    def with_codec(self, form: Form) -> Envelope:
        """The same with the latents of its pixels, or the pixels of its latents, where one of them is missing."""
        if self.latent_shape is not None and self.num_frames is None:
            frames, height, width = form.pixels(self.latent_shape)
            return replace(self, num_frames=frames, height=height, width=width)
        if self.latent_shape is None and self.num_frames and self.height and self.width:
            return replace(self, latent_shape=form.latents(self.num_frames, self.height, self.width))
        return self


@dataclass(frozen=True, kw_only=True)
class _Shared:
    envelope: Envelope = Envelope()
    source: str = ""  # name of the run
    role: str = ""  # whose weights of that run
    step: int | None = None  # iterations of its training
    rounding: Grid | None = None  # the grid that the weights of its Linear layers are rounded to; none: they are not
    notes: tuple[str, ...] = ()  # what a reader of the export must know
    files: tuple[str, ...] = ()  # what the export wrote, relative to its folder


@dataclass(frozen=True, kw_only=True)
class _Student(_Shared):
    """The file of a student, but for `network`, which may be of a kind that only the user's own files register."""

    kind: Literal["student"] = "student"
    times: tuple[float, ...]
    path: AnyPath
    renoise: Renoise = "fresh"
    by_chunk: ByChunk | None = None
    shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Teacher(_Shared):
    """A many-step model: trained on data alone, or a teacher that was post-trained."""

    kind: Literal["teacher"] = "teacher"
    sampler: TeacherSampler


@dataclass(frozen=True)
class _Network:
    network: AnyNetwork


@dataclass(frozen=True, kw_only=True)
class StudentCard(_Shared):
    network: Mapping[str, Any]  # its kind and settings, as they are written in a configuration
    sampler: Sampler
    pipeline: Mapping[str, Any] = field(default_factory=dict[str, Any])  # OF_THE_PIPELINE, of a folder of diffusers

    @classmethod
    def read(cls, folder: Path, advice: str) -> StudentCard:
        """The card in `folder`. Raises UserError, which ends with `advice`, if it is missing, damaged or incomplete."""
        path = folder / FILE
        data = read_json(path, advice)
        pipeline = {name: data.pop(name) for name in OF_THE_PIPELINE if name in data}
        network = data.pop("network", None)
        data.pop("num_inference_steps", None)
        if not isinstance(network, dict) or not isinstance(network.get("kind"), str):
            raise UserError(f"{path} is damaged: network: needs a mapping with the kind of the network. {advice}")
        try:
            record = parse(_Teacher if data.get("kind") == "teacher" else _Student, data)
        except ConfigError as error:
            raise UserError(f"{path} is damaged: {'; '.join(str(error).splitlines())}. {advice}") from None
        if isinstance(record, _Teacher):
            sampler: Sampler = record.sampler
        else:
            sampler = StudentSampler(record.times, record.path, record.renoise, by_chunk=record.by_chunk, shift=record.shift)
        record = replace(record, envelope=replace(record.envelope, num_inference_steps=num_steps(sampler)))
        return cls(network=network, sampler=sampler, pipeline=pipeline, **_shared(record))

    def write(self, folder: Path) -> None:
        """Writes the card into `folder`, whole or not at all."""
        write_json(folder / FILE, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        sampler = self.sampler
        if isinstance(sampler, TeacherSampler):
            record = dump(_Teacher(sampler=sampler, **_shared(self)))
        else:
            own = {name: getattr(sampler, name) for name in ("times", "path", "renoise", "by_chunk", "shift")}
            record = dump(_Student(**own, **_shared(self)))
        del record["envelope"]["num_inference_steps"]  # that of the sampler
        return record | {"num_inference_steps": num_steps(sampler), "network": self.network, **self.pipeline}

    def spec(self) -> AnyNetwork:
        """What builds the network. Raises ConfigError if its kind is not registered."""
        refuse_sizes(self.network, FILE)
        return parse(_Network, {"network": self.network}).network


def _shared(card: _Shared) -> dict[str, Any]:
    return {each.name: getattr(card, each.name) for each in fields(_Shared)}


def num_steps(sampler: Sampler) -> int:
    """The steps of a sampler: a student's calls, or those of a teacher's grid."""
    return sampler.num_steps if isinstance(sampler, TeacherSampler) else len(sampler.times)
