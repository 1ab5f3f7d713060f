"""Videos from a student or a teacher: OUT/NAME.mp4 (a picture: .png), its prompt as NAME.txt, how it was made as NAME.json.

The noise of a clip depends on its seed alone: processes divide the clips, batches of any size make the same clips, and a killed
command goes on where it was. A clip that is there and was made in this way is left; one made in another way is refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import join
from fewstep.config import dump
from fewstep.data.files import arrays, video
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.sampling import Sampler, student_times
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import read_json, write_bytes, write_json, write_text
from fewstep.inference.chunks import Chunk, chunks_of
from fewstep.inference.conditions import (
    Parts,
    Shot,
    Text,
    check_given,
    conditions,
    footage,
    texts_of,
    with_controls_of,
)
from fewstep.inference.model import (
    Envelope,
    Model,
    changed,
    codec_address,
    codec_of,
    folder_of,
    open_model,
    place_network,
)
from fewstep.inference.record import differences
from fewstep.inference.request import ClipRequest, GenerateRequest
from fewstep.networks.encoders.codecs import open_codec, to_uint8
from fewstep.networks.encoders.vision import ClipVision
from fewstep.parallel import World, join_world, leave_world

Print = Callable[[str], None]


def run(request: GenerateRequest) -> int:
    """This process's share of a `generate` command; returns the number of clips that were new."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    own = ranks()
    if not request.shard or own.size == 1:
        return generate(request, own.rank, own.size, say=say)
    world = join_world("cpu" if request.device == "cpu" else "auto")
    try:
        return generate(replace(request, device=str(world.device)), own.rank, own.size, world=world, say=say)
    finally:
        leave_world()


def generate(
    request: GenerateRequest,
    rank: int = 0,
    world_size: int = 1,
    *,
    world: World | None = None,
    say: Print = lambda text: None,
) -> int:
    """Makes this rank's share of the clips and returns how many were new.

    world: the processes that hold a shard of the weights each (--shard). They call the network side by side, so that all make
    as many clips: one that has none left makes the last clip again, and writes nothing.
    """
    names = [clip.name for clip in request.clips]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two clips are called '{twice[0]}': they would be one file")
    records = {clip.name: _record(request, clip) for clip in request.clips}
    mine = request.clips if world is not None else request.clips[rank::world_size]
    todo = [clip for clip in mine if not _is_done(request.out, clip.name, records[clip.name])]
    for clip in todo:
        _check_files(clip)
    if not todo:
        return 0
    num_new = len(todo)
    if world is not None:
        world.barrier()  # all have looked at what is there, before one writes
        num_new = len(todo[rank::world_size])
        todo = [todo[min(i, len(todo) - 1)] for i in range(rank, len(todo) + -len(todo) % world_size, world_size)]
    device = torch.device(request.device or (f"cuda:{ranks().local}" if torch.cuda.is_available() else "cpu"))
    texts = texts_of(todo, request, folder_of(request.model), device)  # first: a word it does not know stops the command here
    controls = sorted({name for clip in request.clips for name in clip.control})
    model = open_model(request.model, controls=controls, network=request.network)
    sampler = sampler_of(request, model, say)
    shot = _shot(request, model)
    chunks = _chunks(request, model, shot)
    window = chunks[0].num_frames
    for warning in beyond(model.envelope, replace(shot, num_frames=window)) if rank == 0 else ():
        say(f"warning: {warning}")
    codec = codec_of(model, request.model, request.codec, tile=request.tile, precision=request.precision, device=device)
    parts = Parts(model, codec, texts, device, _pictures(request, model, device))
    if len(chunks) > 1:
        check_given(chunks[1].overlap, window, parts, "--overlap")
        if rank == 0:
            say(
                f"{shot.num_frames} frames in {len(chunks)} chunks of {window}, {chunks[1].overlap} of them from the one before"
            )
    place_network(model, device, request.precision, world)
    number = 0
    for rows in _batches(todo, texts, request.batch_size, world):
        began = time.monotonic()
        clips = [todo[i] for i in rows]
        pixels, noise = _films(clips, parts, sampler, shot, chunks)
        frames, seconds = to_uint8(pixels, request.model), (time.monotonic() - began) / len(rows)
        for n, clip in enumerate(clips):
            if rows[n] >= num_new:
                continue
            number += 1
            if request.save_noise:
                arrays.write_pickle(request.out / "noise" / f"{clip.name}.pickle", noise[n].cpu().numpy())
            about = {"made": records[clip.name], "sampler": dump(sampler), "seconds": round(seconds, 3), "fps": shot.fps}
            file = _write(request, clip, frames[n], shot.fps, about)
            say(f"{number} of {num_new}: {file} ({seconds:.1f} s)")
    return num_new


@torch.no_grad()
def _films(
    clips: Sequence[ClipRequest], parts: Parts, sampler: Sampler, shot: Shot, chunks: Sequence[Chunk]
) -> tuple[Tensor, Tensor]:
    """Pixels B 3 T H W of clips whose conditions have the same shapes, and the noise of their last chunk."""
    codec = parts.codec
    network = with_controls_of(clips[0], parts.model.network)  # those of a batch have the same weights
    channels, frames, height, width = codec.shape(chunks[0].num_frames, shot.height, shot.width)
    front = -frames % network.traits.frame_multiple  # made in front and dropped, as upstream does for CogVideoX 1.5
    latent_shape = (channels, front + frames, height, width)
    footages = [footage(clip, parts, shot, chunks[0].num_frames) for clip in clips]
    films: list[Tensor] = []
    noise = torch.empty(0)
    for chunk in chunks:
        pairs = [conditions(clip, parts, shot, latent_shape, one, chunk) for clip, one in zip(clips, footages, strict=True)]
        cond = reduce(join, [cond for cond, _ in pairs])
        negatives = [negative for _, negative in pairs if negative is not None]
        rng = Rng(0, chunk.number, [clip.seed for clip in clips], parts.device)  # of the first chunk that of a clip by itself
        noise = rng.normal(latent_shape)
        x0 = sampler(network, noise, cond, rng, reduce(join, negatives) if negatives else None)
        pixels = codec.decode(x0[:, :, front:])
        films.append(pixels[:, :, chunk.overlap :].cpu())
        if chunk is not chunks[-1]:
            last = pixels[:, :, -chunks[1].overlap :].clamp(-1, 1)
            footages = [replace(one, begins=last[n : n + 1]) for n, one in enumerate(footages)]
    return torch.cat(films, 2)[:, :, : shot.num_frames], noise


def _batches(clips: Sequence[ClipRequest], texts: Mapping[str | Path, Text], size: int, world: World | None) -> list[list[int]]:
    """Places in `clips`, up to `size` of clips whose conditions have the same shapes together."""
    groups: dict[object, list[int]] = {}
    for i, clip in enumerate(clips):
        text = texts.get(clip.embedding or clip.prompt)
        shapes = None if text is None else (text.embedding.shape, text.mask is None, text.pooled is None)
        weights = tuple((name, control.weight) for name, control in clip.control.items())
        groups.setdefault((shapes, weights, clip.label is None, clip.num_input_frames > 0), []).append(i)
    if world is not None and any(world.any(len(groups) > 1)):  # every process must call its shard as often as the others
        return [[i] for i in range(len(clips))]
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


def _chunks(request: GenerateRequest, model: Model, shot: Shot) -> list[Chunk]:
    """All at once, unless --chunk-frames says how many at a time; a student made for given frames takes its own number."""
    window = request.chunk_frames
    if window is None and not model.is_teacher and model.network.traits.first_frames in ("mask", "picture"):
        window = _envelope(request, model).num_frames
    chunks = chunks_of(shot.num_frames, window or shot.num_frames, 1 if request.overlap is None else request.overlap)
    if len(chunks) == 1:
        return chunks
    if model.network.traits.first_frames == "none":
        raise UserError(
            f"--chunk-frames {window}: a clip of {shot.num_frames} frames would be made chunk after chunk, each from the last "
            "frames of the one before; this network cannot be given frames"
        )
    if request.save_noise:
        raise UserError("--save-noise: a clip made in several chunks has no one noise; leave it out, or ask for a shorter clip")
    return chunks


def sampler_of(request: GenerateRequest, model: Model, say: Print) -> Sampler:
    """The model's own sampler with the changes of the command. A student's schedule is part of it: changed by --force only."""
    own, options = model.sampler, request.sampling
    if isinstance(own, TeacherSampler):
        if request.student_only:
            raise UserError(f"--use_distilled: {request.model} is a teacher, nothing in it says how a student is sampled")
        return changed(own, options)
    num, w = options.num_steps, 1.0 if options.guidance is None else options.guidance
    problems: list[str] = []
    if num not in (None, len(own.times)):
        problems.append(f"--num-steps {num}: this student takes {len(own.times)}, at times it was trained for")
    if w != 1.0:
        problems.append(f"guidance w = {w:g}: this student was trained to do without, w = 1")
    if problems and not request.force:
        raise UserError("; ".join(problems) + ". Leave it out, or see what happens with --force")
    for problem in problems:
        say(f"warning: {problem}")
    for name in options.names():
        if name not in ("--num-steps", "--guidance"):
            say(f"warning: {name} has no effect: a student takes the steps it was trained for")
    times = own.times if num in (None, len(own.times)) else student_times(num, own.path, 5.0)
    return replace(own, times=times, guidance=w)


def beyond(envelope: Envelope, shot: Shot) -> list[str]:
    """What of the clip the student was never trained on."""
    units = {"num_frames": "frames", "height": "pixels high", "width": "pixels wide", "fps": "frames per second"}
    out: list[str] = []
    for name, unit in units.items():
        trained, value = getattr(envelope, name), getattr(shot, name)
        if trained is not None and abs(trained - value) > 0.01 * trained:
            out.append(
                f"{value:g} {unit}: this student was trained on {trained:g}; beyond its envelope nobody knows what it does"
            )
    return out


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _envelope(request: GenerateRequest, model: Model) -> Envelope:
    """What a student was trained on, in pixels, also where it was trained on latents."""
    envelope = model.envelope
    if envelope.num_frames is not None or envelope.latent_shape is None:
        return envelope
    return envelope.with_codec(open_codec(codec_address(model, request.model, request.codec)).form)


def _shot(request: GenerateRequest, model: Model) -> Shot:
    envelope = _envelope(request, model)
    values = {name: getattr(request, name) or getattr(envelope, name) for name in ("num_frames", "height", "width")}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{request.model} does not say what clips it makes: give {', '.join(missing)}")
    return Shot(**values, fps=float(request.fps or envelope.fps or 24))


def _pictures(request: GenerateRequest, model: Model, device: torch.device) -> ClipVision | None:
    """The encoder of pictures, where the network reads its features."""
    if not model.network.traits.reads_image or (request.image_encoder is None and model.folder is None):
        return None
    from fewstep.networks.encoders.vision import open_image_encoder

    dtype = torch.bfloat16 if request.precision == "bf16" else torch.float32
    return open_image_encoder(request.image_encoder or str(model.folder), dtype=dtype, device=device)


def _record(request: GenerateRequest, clip: ClipRequest) -> dict[str, Any]:
    """The settings that decide the clip."""
    left_out = {"out", "clips", "device", "force", "save_noise", "student_only", "shard", "batch_size"}
    settings = {name: value for name, value in asdict(request).items() if name not in left_out}
    return json.loads(json.dumps(settings | {"clip": asdict(clip)}, default=str))


def _files(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.mp4", out / f"{name}.png"


def _is_done(out: Path, name: str, record: Mapping[str, Any]) -> bool:
    if not any(path.is_file() for path in _files(out, name)):
        return False
    file = out / f"{name}.json"
    advice = "Remove it and its clip, or choose another --out or --name"
    before = read_json(file, advice).get("made") if file.is_file() else None
    if before == record:
        return True
    others = [f"{key} {old!r} and not {new!r}" for key, old, new in differences(before or {}, record)]
    how = "in an unknown way" if before is None else f"with {', '.join(others[:3])}"
    raise UserError(f"{out / name}: is there and was made {how}. Choose another --out or --name, or remove it")


def _check_files(clip: ClipRequest) -> None:
    """Refuses files that are not there, before anything large is read."""
    files = {"--embedding": clip.embedding, "--negative-embedding": clip.negative_embedding, "--input": clip.source}
    files |= {f"--control {name}": control.source for name, control in clip.control.items()}
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: no such file (for clip '{clip.name}')")


def _write(request: GenerateRequest, clip: ClipRequest, frames: np.ndarray, fps: float, about: Mapping[str, Any]) -> Path:
    request.out.mkdir(parents=True, exist_ok=True)
    about = {**about, "frames": len(frames)}
    write_text(request.out / f"{clip.name}.txt", clip.prompt + "\n")
    write_json(request.out / f"{clip.name}.json", about)
    film, picture = _files(request.out, clip.name)
    if len(frames) == 1:
        import cv2

        _, coded = cv2.imencode(".png", frames[0][:, :, ::-1])
        write_bytes(picture, coded.tobytes())
        return picture
    quality = "lossless" if request.quality == "lossless" else int(request.quality)
    video.write(film, frames, fps, quality=quality)  # last: it says "done"
    return film
