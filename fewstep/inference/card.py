"""The card of a model: `student.json`, which lies beside the weights of a run and of an export.

It says how the network is built, how it is sampled, and in which envelope it was trained. Runs and exports write it here,
`open_model` reads it here; whatever is damaged in it is one UserError that names the file and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError, alike, dump, parse
from fewstep.diffusion.sampling import AnySampler, Sampler, TeacherSampler
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
class _Record:
    """The file, but for `network`, which may be of a kind that only the user's own files register, and OF_THE_PIPELINE."""

    sampler: AnySampler  # that of a teacher: of a many-step model that was trained on data alone, or post-trained
    envelope: Envelope = Envelope()
    source: str = ""  # name of the run
    role: str = ""  # whose weights of that run
    step: int | None = None  # iterations of its training
    rounding: Grid | None = None  # the grid that the weights of its Linear layers are rounded to; none: they are not
    notes: tuple[str, ...] = ()  # what a reader of the export must know
    files: tuple[str, ...] = ()  # what the export wrote, relative to its folder


@dataclass(frozen=True)
class _Network:
    network: AnyNetwork


@dataclass(frozen=True, kw_only=True)
class StudentCard(_Record):
    network: Mapping[str, Any]  # its kind and settings, as they are written in a configuration
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
            record = parse(_Record, data)
        except ConfigError as error:
            raise UserError(f"{path} is damaged: {'; '.join(str(error).splitlines())}. {advice}") from None
        envelope = replace(record.envelope, num_inference_steps=num_steps(record.sampler))
        return alike(cls, record, network=network, pipeline=pipeline, envelope=envelope)

    def write(self, folder: Path) -> None:
        """Writes the card into `folder`, whole or not at all."""
        write_json(folder / FILE, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        record = dump(alike(_Record, self))
        del record["envelope"]["num_inference_steps"]  # that of the sampler
        return record | {"num_inference_steps": num_steps(self.sampler), "network": self.network, **self.pipeline}

    def spec(self) -> AnyNetwork:
        """What builds the network. Raises ConfigError if its kind is not registered."""
        refuse_sizes(self.network, FILE)
        return parse(_Network, {"network": self.network}).network


def num_steps(sampler: Sampler) -> int:
    """The steps of a sampler: a student's calls, or those of a teacher's grid."""
    return sampler.num_steps if isinstance(sampler, TeacherSampler) else len(sampler.times)
