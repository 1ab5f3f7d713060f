"""Videos from a student or a teacher: OUT/NAME.mp4 (a picture: .png), its prompt as NAME.txt, how it was made as NAME.json.

The noise of a clip depends on its seed alone: processes divide the clips, a killed command goes on where it was, one process
or eight make the same files. A clip that is there and was made in this way is left; one made in another way is refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.data.files import arrays, video
from fewstep.diffusion import EDM, Rng, guided, samplers, times
from fewstep.diffusion.rollout import start
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import read_json, write_bytes, write_json, write_text
from fewstep.inference.asked import Asked, Request, read_command
from fewstep.inference.chunks import Chunk, chunks_of
from fewstep.inference.conditions import (
    Parts,
    Shot,
    check_given,
    conditions,
    footage,
    has_place_for_frames,
    takes_frames,
    texts_of,
)
from fewstep.inference.model import Envelope, Model, open_model
from fewstep.inference.pairs import to_uint8
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Autoencoder, open_codec
from fewstep.networks.encoders.vision import ClipVision
from fewstep.networks.families.wan.experts import Experts, guided_apart
from fewstep.parallel import World, join_world, leave_world, place

TEACHER_STEPS = 35
_ADDED = (
    "chunk_frames",
    "overlap",
    "image_encoder",
    "network",
)  # where they are not told, a clip's paper is what it was without them
FIRST_SIGMA, LAST_SIGMA = 80.0, 0.002  # of Cosmos 1's grids


def main(arguments: Sequence[str]) -> int:
    """The command; the number of clips that were new."""
    asked = read_command(list(arguments))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    own = ranks()
    if not asked.shard or own.size == 1:
        return generate(asked, own.rank, own.size, say=say)
    world = join_world("cpu" if asked.device == "cpu" else "auto")
    try:
        return generate(replace(asked, device=str(world.device)), own.rank, own.size, world=world, say=say)
    finally:
        leave_world()


def generate(
    asked: Asked,
    rank: int = 0,
    world_size: int = 1,
    *,
    world: World | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Makes this rank's share of the clips and returns how many were new.

    world: the processes that hold a shard of the weights each (--shard). They ask the network side by side, so that all make
    as many clips: one that has none left makes the last clip again, and writes nothing.
    """
    taken = [request.name for request in asked.requests]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        raise UserError(f"two clips are called '{twice[0]}': they would be one file")
    paper = {request.name: _paper(asked, request) for request in asked.requests}
    mine = asked.requests if world is not None else asked.requests[rank::world_size]
    todo = [request for request in mine if not _is_made(asked.out, request.name, paper[request.name])]
    for request in todo:
        _look_for_files(request)
    if not todo:
        return 0
    num_new = len(todo)
    if world is not None:
        world.barrier()  # all have looked at what is there, before one writes
        num_new = len(todo[rank::world_size])
        todo = [todo[min(i, len(todo) - 1)] for i in range(rank, len(todo) + -len(todo) % world_size, world_size)]
    device = torch.device(asked.device or (f"cuda:{ranks().local}" if torch.cuda.is_available() else "cpu"))
    led_by = sorted({name for request in asked.requests for name in request.control})
    model = open_model(asked.model, controls=led_by, known=asked.network)
    _check_student(asked, model, say)
    shot = _shot(asked, model)
    chunks = _chunks(asked, model, shot)
    window = chunks[0].num_frames
    for warning in beyond(model.envelope, replace(shot, num_frames=window)) if rank == 0 else ():
        say(f"warning: {warning}")
    parts = Parts(
        model, _codec(asked, model, device), texts_of(todo, asked, model, device), device, _pictures(asked, model, device)
    )
    if len(chunks) > 1:
        check_given(chunks[1].overlap, window, parts, "--overlap")
        if rank == 0:
            say(
                f"{shot.num_frames} frames in {len(chunks)} chunks of {window}, {chunks[1].overlap} of them from the one before"
            )
    _place(asked, model, device, world)
    for number, request in enumerate(todo, 1):
        began = time.monotonic()
        pixels, noise = _clip(asked, request, parts, shot, chunks)
        if number > num_new:
            break
        if asked.save_noise:
            arrays.write_pickle(asked.out / "noise" / f"{request.name}.pickle", noise[0].cpu().numpy())
        made = _write(asked, request, to_uint8(pixels, asked.model)[0], shot.fps, paper[request.name], time.monotonic() - began)
        say(f"{number} of {num_new}: {made} ({time.monotonic() - began:.1f} s)")
    return num_new


@torch.no_grad()
def _clip(asked: Asked, request: Request, parts: Parts, shot: Shot, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
    """Pixels 1 3 T H W of the clip, and the noise of its last chunk."""
    codec, network = parts.codec, parts.model.network
    channels, frames, height, width = codec.shape(chunks[0].num_frames, shot.height, shot.width)
    front = _frames_in_front(network, frames)
    latent_shape = (channels, front + frames, height, width)
    seen = footage(request, parts, shot, chunks[0].num_frames)
    made: list[Tensor] = []
    noise = torch.empty(0)
    for chunk in chunks:
        cond, negative = conditions(request, parts, shot, latent_shape, seen, chunk)
        rng = Rng(0, chunk.number, [request.seed], parts.device)  # of the first chunk that of a clip by itself
        noise = rng.normal(latent_shape)
        latents = sample(asked, parts.model, noise, cond, negative, rng)[:, :, front:]
        pixels = codec.decode(latents)
        made.append(pixels[:, :, chunk.overlap :].cpu())
        if chunk is not chunks[-1]:
            seen = replace(seen, begins=pixels[:, :, -chunks[1].overlap :].clamp(-1, 1))
    return torch.cat(made, 2)[:, :, : shot.num_frames], noise


def _frames_in_front(network: Network, frames: int) -> int:
    """Latent frames that CogVideoX 1.5, which works on pairs of them, makes in front and drops after, as upstream does."""
    config: Any = getattr(network.module, "config", {})
    return -frames % (getattr(config, "patch_size_t", None) or 1)


def _chunks(asked: Asked, model: Model, shot: Shot) -> list[Chunk]:
    """All at once, unless --chunk-frames says how many at a time; a student made for given frames takes its own number."""
    window = asked.chunk_frames
    if window is None and model.sampler is not None and has_place_for_frames(model):
        window = _known(asked, model).num_frames
    chunks = chunks_of(shot.num_frames, window or shot.num_frames, 1 if asked.overlap is None else asked.overlap)
    if len(chunks) == 1:
        return chunks
    if not takes_frames(model):
        raise UserError(
            f"--chunk-frames {window}: a clip of {shot.num_frames} frames would be made chunk after chunk, each from the last "
            "frames of the one before; this network cannot be given frames"
        )
    if asked.save_noise:
        raise UserError("--save-noise: a clip made in several chunks has no one noise; leave it out, or ask for a shorter clip")
    return chunks


def _place(asked: Asked, model: Model, device: torch.device, world: World | None) -> None:
    """The network on its device, or its shard; in the precision of compute."""
    network, compute = model.network, torch.bfloat16 if asked.precision == "bf16" else torch.float32
    alone = World(0, 1, device, None)
    place(network.module, network.blocks, world or alone, mode="fsdp", compute=compute, trained=False)


def sample(asked: Asked, model: Model, noise: Tensor, cond: Condition, negative: Condition | None, rng: Rng) -> Tensor:
    """Latents: of a student by the schedule it was trained with, of a teacher by a solver with guidance."""
    network = model.network
    own = model.sampler
    if own is not None and asked.num_steps in (None, len(own.times)):
        network = guided(network, negative, asked.guidance) if asked.guidance != 1.0 else network
        return own(network, noise, cond, rng)
    if own is not None:  # forced
        grid = times.on_flow(asked.num_steps or len(own.times), own.path, 5.0)
        return replace(own, times=tuple(grid.tolist()))(guided(network, negative, asked.guidance), noise, cond, rng)
    path, num = network.path, asked.num_steps or TEACHER_STEPS
    if isinstance(path, EDM):
        # "35 steps" of Cosmos 1 are 35 and a clean denoise.
        grid = times.karras(num + 1, asked.sigma_max or FIRST_SIGMA, LAST_SIGMA)
        solver = asked.sampler if asked.sampler != "auto" else "res_2ab"
    else:
        grid = times.on_flow(num, path, 5.0 if asked.shift is None else asked.shift)
        solver = asked.sampler if asked.sampler != "auto" else "unipc"
    x = start(path, noise, float(grid[0]))
    led = guided(network, negative, asked.guidance)
    if asked.guidance_low is not None:
        if not isinstance(network, Experts) or negative is None:
            raise UserError(f"--guidance-low: {asked.model} is no pair of experts, one for high and one for low noise")
        led = guided_apart(network, negative, asked.guidance, asked.guidance_low)
    return getattr(samplers, solver)(led, x, grid, cond)


def beyond(envelope: Envelope, shot: Shot) -> list[str]:
    """What of the clip the student was never trained on."""
    told = {"num_frames": "frames", "height": "pixels high", "width": "pixels wide", "fps": "frames per second"}
    out: list[str] = []
    for name, what in told.items():
        known, wanted = getattr(envelope, name), getattr(shot, name)
        if known is not None and abs(known - wanted) > 0.01 * known:
            out.append(
                f"{wanted:g} {what}: this student was trained on {known:g}; beyond its envelope nobody knows what it does"
            )
    return out


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _check_student(asked: Asked, model: Model, say: Callable[[str], None]) -> None:
    own = model.sampler
    if own is None:
        if asked.wants_student:
            raise UserError(f"--use_distilled: {asked.model} is a teacher, nothing in it tells how a student is sampled")
        return
    problems: list[str] = []
    if asked.num_steps not in (None, len(own.times)):
        problems.append(f"--num-steps {asked.num_steps}: this student takes {len(own.times)}, at times it was trained for")
    if asked.guidance != 1.0:
        problems.append(f"guidance w = {asked.guidance:g}: this student was trained to do without, w = 1")
    if problems and not asked.force:
        raise UserError("; ".join(problems) + ". Leave it out, or see what happens with --force")
    for problem in problems:
        say(f"warning: {problem}")
    for name in ("sampler", "shift", "sigma_max"):
        if getattr(asked, name) not in (None, "auto"):
            say(f"warning: --{name.replace('_', '-')} has no effect: a student takes the steps it was trained for")


def _known(asked: Asked, model: Model) -> Envelope:
    """What a student was trained on, in pixels."""
    known = model.envelope
    return _in_pixels(known, asked, model) if known.num_frames is None and known.latent_shape is not None else known


def _shot(asked: Asked, model: Model) -> Shot:
    known = _known(asked, model)
    values = {name: getattr(asked, name) or getattr(known, name) for name in ("num_frames", "height", "width")}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{asked.model} does not say what clips it makes: give {', '.join(missing)}")
    return Shot(**values, fps=float(asked.fps or known.fps or 24))


def _in_pixels(envelope: Envelope, asked: Asked, model: Model) -> Envelope:
    """The envelope of a run that was trained on latents."""
    assert envelope.latent_shape is not None
    form = open_codec(_codec_address(asked, model)).form
    _, frames, height, width = envelope.latent_shape
    pixels = {"height": height * form.space, "width": width * form.space}
    return replace(envelope, num_frames=1 + (frames - 1) * form.time if form.sees_time else frames, **pixels)


def _codec_address(asked: Asked, model: Model) -> str:
    if asked.codec is not None:
        return asked.codec
    if model.folder is None or not ((model.folder / "vae").is_dir() or not model.folder.exists()):
        raise UserError(f"{asked.model} has no codec beside it: give --codec, the folder of an autoencoder or of its pipeline")
    return str(model.folder)


def _codec(asked: Asked, model: Model, device: torch.device) -> Autoencoder:
    path = model.network.path
    scale = path.sigma_data if isinstance(path, EDM) else 1.0  # an EDM network's latents have the spread of its data
    dtype = torch.bfloat16 if asked.precision == "bf16" else torch.float32
    return open_codec(_codec_address(asked, model), scale=scale, tile=asked.tile, dtype=dtype, device=device)


def _pictures(asked: Asked, model: Model, device: torch.device) -> ClipVision | None:
    """The encoder of pictures, where the network reads what it says."""
    config: Any = getattr(getattr(model.network, "high", model.network).module, "config", {})
    if getattr(config, "image_dim", None) is None or (asked.image_encoder is None and model.folder is None):
        return None
    from fewstep.networks.encoders.vision import open_image_encoder

    dtype = torch.bfloat16 if asked.precision == "bf16" else torch.float32
    return open_image_encoder(asked.image_encoder or str(model.folder), dtype=dtype, device=device)


def _paper(asked: Asked, request: Request) -> dict[str, Any]:
    """How the clip is made: what would make it another one."""
    left_out = {"out", "requests", "device", "force", "save_noise", "wants_student", "shard"}
    told = {name: value for name, value in asdict(asked).items() if name not in left_out}
    told = {name: value for name, value in told.items() if value is not None or name not in _ADDED}
    return json.loads(json.dumps(told | {"clip": asdict(request)}, default=str))


def _files(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.mp4", out / f"{name}.png"


def _is_made(out: Path, name: str, paper: Mapping[str, Any]) -> bool:
    if not any(path.is_file() for path in _files(out, name)):
        return False
    told = out / f"{name}.json"
    advice = "Remove it and its clip, or choose another --out or --name"
    before = read_json(told, advice).get("made") if told.is_file() else None
    if before == paper:
        return True
    other = "in an unknown way" if before is None else _difference(before, paper)
    raise UserError(f"{out / name}: is there and was made {other}. Choose another --out or --name, or remove it")


def _difference(before: Mapping[str, Any], paper: Mapping[str, Any]) -> str:
    flat = [{**told, **{f"clip.{name}": value for name, value in told.get("clip", {}).items()}} for told in (before, paper)]
    keys = [key for key in flat[1] if key != "clip" and flat[0].get(key) != flat[1][key]]
    return "with " + ", ".join(f"{key} {flat[0].get(key)!r} and not {flat[1][key]!r}" for key in keys[:3])


def _look_for_files(request: Request) -> None:
    """Before anything large is read."""
    files = {"--embedding": request.embedding, "--negative-embedding": request.negative_embedding, "--input": request.source}
    files |= {f"--control {name}": control.source for name, control in request.control.items()}
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: no such file (for clip '{request.name}')")


def _write(asked: Asked, request: Request, frames: np.ndarray, fps: float, paper: Mapping[str, Any], seconds: float) -> Path:
    asked.out.mkdir(parents=True, exist_ok=True)
    about = {"made": paper, "seconds": round(seconds, 3), "frames": len(frames), "fps": fps}
    write_text(asked.out / f"{request.name}.txt", request.prompt + "\n")
    write_json(asked.out / f"{request.name}.json", about)
    clip, picture = _files(asked.out, request.name)
    if len(frames) == 1:
        import cv2

        _, coded = cv2.imencode(".png", frames[0][:, :, ::-1])
        write_bytes(picture, coded.tobytes())
        return picture
    quality = "lossless" if asked.quality == "lossless" else int(asked.quality)
    video.write(clip, frames, fps, quality=quality)  # last: it says "done"
    return clip
