"""A teacher before its weights are read: its network, how it is sampled, where its codec and text encoder are.

`open_model` opens the same addresses with their weights; a recipe that takes any teacher (recipes/general.py) and `fewstep
distill` read here what `generate` and `pairs` read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.diffusion import Path as NoisePath
from fewstep.diffusion import StudentSampler, TeacherSampler
from fewstep.errors import UserError
from fewstep.inference.card import Envelope
from fewstep.inference.model import is_export, is_run, networks_of, outline_of, published_sampler
from fewstep.networks.contract import Distillation, NetworkSpec
from fewstep.networks.encoders.codecs import Form
from fewstep.networks.encoders.text import TextForm, text_form
from fewstep.networks.files.folders import on_meta
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.networks.lora import Lora
from fewstep.networks.weights.addresses import checkpoint_of

SMALL = 100_000_000  # weights; a network of fewer is trained with the learning rates of the toy world


@dataclass(frozen=True)
class Teacher:
    address: str
    spec: NetworkSpec
    sampler: TeacherSampler
    init: str | None = None  # the address of its weights, where `spec` does not name them
    base: str | None = None  # the pipeline with its codec and text encoder
    envelope: Envelope = Envelope()  # what its run, export or files say that it was trained on

    def trained_on(self, form: Form) -> tuple[int, int, int] | None:
        """Frames, height and width of the largest clips that it was trained on; None: nobody says.

        By its card, by its pipeline's model_index.json, or as its family is published. form: of its codec.
        """
        card = self.envelope.with_codec(form)
        stated = {} if self.base is None else PipelineFolder(self.base).trained_on
        for sizes in (
            (card.num_frames, card.height, card.width),
            (stated.get("num_frames"), stated.get("height"), stated.get("width")),
        ):
            if all(isinstance(size, int) for size in sizes):
                frames, height, width = (int(size or 0) for size in sizes)
                return frames, height, width
        return self.published.clips

    @property
    def path(self) -> NoisePath:
        return path_of(self.spec)

    @property
    def published(self) -> Distillation:
        """How students of its family are published."""
        return self.spec.distillation

    @cached_property
    def num_weights(self) -> int:
        """By the sizes of its configuration: the same for a folder, the hub, a run and files of weights."""
        with on_meta():
            module = self.spec.build().module
        return sum(weight.numel() for weight in module.parameters())

    @property
    def is_small(self) -> bool:
        return self.num_weights < SMALL

    @property
    def text(self) -> TextForm:
        """How its pipeline's texts reach the network."""
        return TextForm() if self.base is None else text_form(self.base)

    def times(self, num_steps: int, shift: float | None = None) -> tuple[float, ...]:
        """The times of a student of `num_steps`: those at which `fewstep pairs --path-times` keeps states."""
        return self.sampler.student_times(num_steps, self.path, self.published.shift if shift is None else shift)


def path_of(spec: Any) -> NoisePath:  # Any: `path` is a field of some configurations, and a property of others
    """The path of the network that `spec` builds."""
    path = getattr(spec, "path", None)
    if path is None:
        raise UserError("this network's configuration does not say its path of noise: give it a field or a property `path`")
    return path


def teacher_at(address: str, controls: Sequence[str] = ()) -> Teacher:
    """The teacher at an address that `open_model` opens. Raises UserError for a student, and for a run of adapters."""
    outline = outline_of(address, controls=controls)
    if isinstance(outline.sampler, StudentSampler):
        num = len(outline.sampler.times)
        raise UserError(f"{address}: is a student of {num} steps, no teacher (the teacher of a run is RUN:teacher)")
    spec, folder = outline.spec, Path(address)
    sampler = outline.sampler or published_sampler(path_of(spec), outline.pipeline)
    sampler = replace(sampler, boundary=spec.expert_boundary)
    init = _weights_of_run(address) if is_run(address) else None
    base = spec.source if is_run(address) else None if outline.folder is None else str(outline.folder)
    if is_export(folder) and (folder / "student.safetensors").is_file():
        init, base = str(folder / "student.safetensors"), None
    elif outline.folder is None and not is_run(address):  # files of published weights
        init = address
    return Teacher(address, spec, sampler, init, base, outline.envelope)


def _weights_of_run(address: str) -> str | None:
    """The address of the weights that `spec` does not name."""
    place, _, role = address.partition(":")
    networks = networks_of(checkpoint_of(place).parent.parent)
    if role == "teacher":
        return networks.teacher_init
    if isinstance(networks.student, Lora):
        base = "" if networks.teacher is None or networks.teacher.source is None else f" --base {networks.teacher.source}"
        raise UserError(f"{address}: holds adapters. Merge them into a teacher: fewstep export {address} --out FOLDER{base}")
    return address
