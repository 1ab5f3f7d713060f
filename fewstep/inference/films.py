"""Clips in three stages: conditions (the codec encodes), latents (the network), pixels (the codec decodes).

A group of batches goes through each stage together, so that a component can be loaded for a stage and released after it. Of a
clip in several chunks each chunk goes through all three, because it begins with pixels of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition, join
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.inference.chunks import Chunk
from fewstep.inference.conditions import Footage, Parts, Text, conditions, footage, origin, with_controls_of
from fewstep.inference.fit import Plan
from fewstep.inference.request import ClipRequest
from fewstep.inference.stages import Component
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Autoencoder, to_uint8
from fewstep.networks.encoders.vision import ClipVision


@dataclass(frozen=True)
class Studio:
    """What clips are made with."""

    plan: Plan
    name: str  # of the model, for messages
    network: Component[Network]
    codec: Component[Autoencoder]
    pictures: Component[ClipVision | None]
    texts: Mapping[str | Path | None, Text]
    device: torch.device
    waits_on: torch.device  # where the tensors of a clip wait for their next stage
    decodes: bool = True  # or another process, which has made the same latents, decodes them


@dataclass(frozen=True)
class Film:
    """The clips of one batch."""

    frames: np.ndarray  # uint8 B T H W 3
    noise: Tensor  # B C t h w, of their last chunk
    controls: Sequence[Mapping[str, np.ndarray]]  # of each clip by name, uint8 T H W 3
    seconds: float  # for each clip, without the time in which components were loaded


@dataclass
class _Batch:
    """Clips that go through the network together, on their way through the stages."""

    clips: Sequence[ClipRequest]
    footage: list[Footage] = field(default_factory=list[Footage])
    cond: Condition | None = None
    negative: Condition | None = None
    origin: Tensor | None = None
    noise: Tensor | None = None
    latents: Tensor | None = None
    frames: list[np.ndarray] = field(default_factory=list[np.ndarray])  # of the chunks so far
    seconds: float = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the seconds of the block."""
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began


def films(groups: Sequence[Sequence[ClipRequest]], studio: Studio) -> Iterator[Film]:
    """The film of each batch of clips, in order. The conditions of a batch's clips have the same shapes.

    A process that does not decode yields films without frames.
    """
    batches = [_Batch(clips) for clips in groups]
    for chunk in studio.plan.chunks:
        _condition(batches, studio, chunk)
        _sample(batches, studio, chunk)
        for batch in _decode(batches, studio, chunk):
            if chunk is studio.plan.chunks[-1]:
                yield _film(batch, studio)


def _film(batch: _Batch, studio: Studio) -> Film:
    assert batch.noise is not None
    shot = studio.plan.shot
    nothing = np.zeros((len(batch.clips), 0, shot.height, shot.width, 3), np.uint8)
    frames = np.concatenate(batch.frames, 1)[:, : shot.num_frames] if studio.decodes else nothing
    batch.frames.clear()
    return Film(frames, batch.noise, [one.controls for one in batch.footage], batch.seconds / len(batch.clips))


@torch.no_grad()
def _condition(batches: Sequence[_Batch], studio: Studio, chunk: Chunk) -> None:
    """Gives each batch its condition of this chunk."""
    plan = studio.plan
    with studio.codec.loaded() as codec, studio.pictures.loaded() as pictures:
        parts = Parts(plan.model.network, codec, studio.texts, studio.device, pictures)
        for batch in batches:
            with batch.clock():
                if not batch.footage:
                    batch.footage = [footage(clip, studio.device, plan.shot, plan.noises_input) for clip in batch.clips]
                pairs = [
                    conditions(clip, parts, plan.shot, plan.latent_shape, one, chunk)
                    for clip, one in zip(batch.clips, batch.footage, strict=True)
                ]
                batch.cond = reduce(join, [cond for cond, _ in pairs]).to(studio.waits_on)
                negatives = [negative for _, negative in pairs if negative is not None]
                batch.negative = reduce(join, negatives).to(studio.waits_on) if negatives else None
                origins = [origin(parts, one, chunk) for one in batch.footage]
                starts = [one for one in origins if one is not None]  # of all clips of a batch, or of none
                batch.origin = torch.cat(starts).to(studio.waits_on) if starts else None


@torch.no_grad()
def _sample(batches: Sequence[_Batch], studio: Studio, chunk: Chunk) -> None:
    """Gives each batch its latents of this chunk."""
    device, plan = studio.device, studio.plan
    with studio.network.loaded() as network:
        for batch in batches:
            assert batch.cond is not None
            with batch.clock():
                rng = Rng(0, chunk.number, [clip.seed for clip in batch.clips], device)  # of chunk 0 that of the clip itself
                noise = rng.normal(plan.latent_shape)
                negative = None if batch.negative is None else batch.negative.to(device)
                controlled = with_controls_of(batch.clips[0], network)  # those of a batch have the same weights
                cond = batch.cond.to(device)
                if batch.origin is not None and isinstance(plan.sampler, TeacherSampler):
                    start = batch.origin.to(device)
                    x0 = plan.sampler.trajectory(controlled, noise, cond, negative, origin=start).x0
                else:
                    x0 = plan.sampler(controlled, noise, cond, rng, negative)
                batch.latents = x0[:, :, plan.num_dropped :].to(studio.waits_on)
                batch.noise = noise.cpu()


@torch.no_grad()
def _decode(batches: Sequence[_Batch], studio: Studio, chunk: Chunk) -> Iterator[_Batch]:
    """Decodes the latents of each batch to frames, and yields it; the next chunk begins with the last ones."""
    plan = studio.plan
    with studio.codec.loaded() as codec:
        for batch in batches:
            assert batch.latents is not None
            if not studio.decodes and chunk is plan.chunks[-1]:
                yield batch
                continue
            with batch.clock():
                pixels = codec.decode(batch.latents.to(studio.device))
                batch.frames.append(to_uint8(pixels[:, :, chunk.overlap :], studio.name))
                batch.latents = None
                if chunk is not plan.chunks[-1]:
                    last = pixels[:, :, -plan.chunks[1].overlap :].clamp(-1, 1)
                    batch.footage = [replace(one, begins=last[n : n + 1]) for n, one in enumerate(batch.footage)]
                del pixels
            yield batch
