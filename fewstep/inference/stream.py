"""Clips that appear while they are made: `fewstep generate STUDENT --stream`, for causal students.

    for frames in frames_of(model.network, model.sampler, codec, cond, noise, Rng(0, rows=[seed])):   # uint8 T H W 3
        show(frames)

A hidden file beside OUT/NAME.mp4 grows chunk by chunk, plays while it grows, and becomes NAME.mp4 when it is finished, or when
Ctrl-C ends it. The frames are those that the command makes without --stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import dump
from fewstep.data.files import video
from fewstep.diffusion import Rng, StudentSampler
from fewstep.diffusion.by_chunk import CausalDenoiser, Switch
from fewstep.errors import UserError
from fewstep.files import write_json, write_text
from fewstep.inference.conditions import Parts, Text, conditions, footage
from fewstep.inference.films import Studio
from fewstep.inference.fit import Plan
from fewstep.inference.request import ClipRequest, GenerateRequest, quality_of
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Autoencoder, to_uint8
from fewstep.networks.encoders.streaming import StreamingDecoder


@dataclass
class Clock:
    """Seconds of each chunk, and the frames that it has."""

    frames: list[int] = field(default_factory=list[int])
    denoising: list[float] = field(default_factory=list[float])
    decoding: list[float] = field(default_factory=list[float])

    def figures(self, num_filling: int) -> dict[str, float | int]:
        """Rates and latencies. num_filling: chunks at the beginning, while the window fills, that rates do not count."""
        steady = slice(num_filling, None) if len(self.frames) > num_filling else slice(None)
        frames = sum(self.frames[steady])
        both = [a + b for a, b in zip(self.denoising, self.decoding, strict=True)]
        return {
            "chunks": len(self.frames),
            "chunks_in_rates": len(self.frames[steady]),
            "denoise_fps": round(frames / sum(self.denoising[steady]), 3),
            "end_to_end_fps": round(frames / sum(both[steady]), 3),
            "first_frame_s": round(both[0], 4),
            "chunk_p50_s": round(float(np.quantile(both[steady], 0.5)), 4),
            "chunk_p95_s": round(float(np.quantile(both[steady], 0.95)), 4),
        }


def frames_of(
    network: Network,
    sampler: StudentSampler,
    codec: Autoencoder,
    cond: Condition,
    noise: Tensor,
    rng: Rng,
    negative: Condition | None = None,
    clock: Clock | None = None,
    switches: Sequence[Switch] = (),
) -> Iterator[np.ndarray]:
    """The frames of one clip, uint8 T H W 3, of each chunk as soon as it is finished.

    switches: latent frames, and the condition that holds from the first chunk at or after each of them on.
    """
    if sampler.by_chunk is None:
        raise UserError("this student generates all frames of a clip at once, and cannot stream; a causal one can")
    decode, clock = StreamingDecoder(codec), clock or Clock()
    latents = sampler.stream(cast(CausalDenoiser, network), noise, cond, rng, negative, switches)
    while True:
        began = _now(noise.device)
        x0 = next(latents, None)
        if x0 is None:
            return
        denoised = _now(noise.device)
        frames = to_uint8(decode(x0), "this student")[0]
        clock.frames.append(len(frames))
        clock.denoising.append(denoised - began)
        clock.decoding.append(_now(noise.device) - denoised)
        yield frames


def refuse_stream(request: GenerateRequest, plan: Plan, is_divided: bool) -> None:
    """Raises UserError for what cannot stream, before any weights are read."""
    if not isinstance(plan.sampler, StudentSampler) or plan.sampler.by_chunk is None:
        raise UserError(f"--stream: {request.model} generates all frames of a clip at once; a causal student streams")
    if request.guardrails or request.save_noise or request.save_controls or request.tile or is_divided:
        raise UserError(
            "--stream: leave out guardrails, --save-noise, --save-controls, --tile, --shard and --context: all need whole clips"
        )
    StreamingDecoder(plan.codec)
    for clip in request.clips:
        for frame, prompt in clip.switches:
            if frame >= plan.shot.num_frames:
                raise UserError(f"--switch-at {frame}:{prompt}: the clip has {plan.shot.num_frames} frames")


def stream_clips(
    request: GenerateRequest,
    clips: Sequence[ClipRequest],
    studio: Studio,
    records: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None],
) -> int:
    """Makes the clips of a command one after the other; returns their number. Ctrl-C leaves the frames made so far."""
    plan = studio.plan
    sampler = plan.sampler
    assert isinstance(sampler, StudentSampler)
    quality = quality_of(request.quality)
    for number, clip in enumerate(clips, 1):
        clock = Clock()
        write_text(request.out / f"{clip.name}.txt", clip.prompt + "\n")
        path = request.out / f"{clip.name}.mp4"
        with studio.codec.loaded() as codec, studio.pictures.loaded() as pictures, studio.network.loaded() as network:
            parts = Parts(plan.model.network, codec, studio.texts, studio.device, pictures)
            own = footage(clip, studio.device, plan.shot)
            with torch.no_grad():
                cond, negative = conditions(clip, parts, plan.shot, plan.latent_shape, own, plan.chunks[0])
            rng = Rng(0, 0, [clip.seed], studio.device)
            noise = rng.normal(plan.latent_shape)  # that of the whole clip: the frames are those without --stream
            switches = _switches(clip, plan, studio.texts, cond)
            frames = frames_of(network, sampler, codec, cond, noise, rng, negative, clock, switches)
            with video.growing(path, plan.shot.fps, quality) as append:
                num_frames, interruption = _appended(frames, append)
                filling = _filling(network, plan.latent_shape[1])
                figures = clock.figures(filling)
                about = {"made": records[clip.name], "prompt": clip.prompt, "sampler": dump(sampler), "fps": plan.shot.fps}
                total = sum(clock.denoising) + sum(clock.decoding)
                about |= {"seconds": round(total, 3), "frames": num_frames, "stream": figures}
                about |= {"interrupted": True} if interruption is not None else {}
                write_json(request.out / f"{clip.name}.json", about)
        say(f"{number} of {len(clips)}: {path}\n  {_sentence(figures, filling, request.precision, studio.device)}")
        if interruption is not None:
            say(f"interrupted: it has the first {num_frames} of {plan.shot.num_frames} frames; the same command makes it whole")
            raise interruption
    return len(clips)


def _appended(frames: Iterable[np.ndarray], append: Callable[[np.ndarray], None]) -> tuple[int, KeyboardInterrupt | None]:
    """Appends all frames, or those that are finished when Ctrl-C comes: their number, and the interruption."""
    num = 0
    try:
        for some in frames:
            for frame in some:
                append(frame[None])
                num += 1
    except KeyboardInterrupt as interruption:
        if not num:
            raise
        return num, interruption
    return num, None


def _switches(clip: ClipRequest, plan: Plan, texts: Mapping[str | Path | None, Text], cond: Condition) -> list[Switch]:
    """The conditions of the clip's other prompts, from latent frames on."""
    per_latent = (plan.window - 1) // max(1, plan.latent_shape[1] - 1)  # the first latent frame is one frame
    out: list[Switch] = []
    for frame, prompt in clip.switches:
        text = texts[prompt]
        other = replace(cond, text=text.embedding, text_mask=text.mask, pooled=text.pooled)
        out.append((1 + -(-(frame - 1) // per_latent), other))
    return out


def _filling(network: Any, num_latents: int) -> int:  # Any: a network that is known to be causal
    """Chunks until the window is full: those that reach to the beginning of the clip."""
    cache = network.new_cache(torch.empty(0))
    return sum(chunk.stop <= cache.causality.span for chunk in network.chunks(num_latents))


def _sentence(figures: Mapping[str, float | int], filling: int, precision: str, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    filled = figures["chunks_in_rates"] != figures["chunks"]
    when = f"after the window had filled ({filling} chunks)" if filled else "while the window filled: no steady state"
    return (
        f"{figures['denoise_fps']:.2f} frames/s denoising, {figures['end_to_end_fps']:.2f} with decoding, {when}; first frame "
        f"after {figures['first_frame_s']:.3f} s, a chunk p50 {figures['chunk_p50_s']:.3f} s, p95 "
        f"{figures['chunk_p95_s']:.3f} s; {precision}, {name}"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
