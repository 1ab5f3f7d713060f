"""Videos from a student or a teacher: OUT/NAME.mp4 (a picture: .png), its prompt as NAME.txt, how it was made as NAME.json.

The noise of a clip depends on its seed alone: processes divide the clips, a killed command goes on where it was, one process
or eight make the same files. A clip that is there and was made in this way is left; one made in another way is refused.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.data import arrays, controls, video
from fewstep.data.atomic import replacing
from fewstep.diffusion import EDM, Rng, guided, samplers, times
from fewstep.diffusion.rollout import start
from fewstep.inference.asked import Asked, Request, read_command
from fewstep.inference.model import Envelope, Model, open_model
from fewstep.inference.pairs import to_uint8
from fewstep.networks.codecs import Autoencoder, open_codec

TEACHER_STEPS = 35
FIRST_SIGMA, LAST_SIGMA = 80.0, 0.002  # of Cosmos 1's grids


def main(arguments: Sequence[str]) -> int:
    """The command; the number of clips that were new."""
    asked = read_command(list(arguments))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return generate(asked, rank, size, say=lambda text: print(text, file=sys.stderr, flush=True))


@dataclass(frozen=True)
class Shot:
    """Frames, size and rate of every clip of one command."""

    num_frames: int
    height: int
    width: int
    fps: float


def generate(asked: Asked, rank: int = 0, world_size: int = 1, *, say: Callable[[str], None] = lambda text: None) -> int:
    """Makes this rank's share of the clips and returns how many were new."""
    taken = [request.name for request in asked.requests]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        raise ValueError(f"two clips are called '{twice[0]}': they would be one file")
    mine = list(asked.requests[rank::world_size])
    paper = {request.name: _paper(asked, request) for request in mine}
    todo = [request for request in mine if not _is_made(asked.out, request.name, paper[request.name])]
    for request in todo:
        _look_for_files(request)
    if not todo:
        return 0
    device = torch.device(asked.device or (f"cuda:{_local_rank()}" if torch.cuda.is_available() else "cpu"))
    model = open_model(asked.model)
    _check_student(asked, model, say)
    shot = _shot(asked, model)
    for warning in beyond(model.envelope, shot) if rank == 0 else ():
        say(f"warning: {warning}")
    codec = _codec(asked, model, device)
    latent_shape = codec.shape(shot.num_frames, shot.height, shot.width)
    words = _texts(todo, asked, model, device)
    if asked.precision == "bf16":
        model.network.module.to(torch.bfloat16)
    model.network.module.to(device)
    for number, request in enumerate(todo, 1):
        began = time.monotonic()
        cond, negative = _conditions(request, words, model, codec, shot, latent_shape, device)
        rng = Rng.of_samples([request.seed], device)
        noise = rng.normal(latent_shape)
        with torch.no_grad():
            latents = sample(asked, model, noise, cond, negative, rng)
            frames = to_uint8(codec.decode(latents))[0]
        if asked.save_noise:
            arrays.write_pickle(asked.out / "noise" / f"{request.name}.pickle", noise[0].cpu().numpy())
        made = _write(asked, request, frames, shot.fps, paper[request.name], time.monotonic() - began)
        say(f"{number} of {len(todo)}: {made} ({time.monotonic() - began:.1f} s)")
    return len(todo)


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
    return getattr(samplers, solver)(guided(network, negative, asked.guidance), x, grid, cond)


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
            raise ValueError(f"--use_distilled: {asked.model} is a teacher, nothing in it tells how a student is sampled")
        return
    problems: list[str] = []
    if asked.num_steps not in (None, len(own.times)):
        problems.append(f"--num-steps {asked.num_steps}: this student takes {len(own.times)}, at times it was trained for")
    if asked.guidance != 1.0:
        problems.append(f"guidance w = {asked.guidance:g}: this student was trained to do without, w = 1")
    if problems and not asked.force:
        raise ValueError("; ".join(problems) + ". Leave it out, or see what happens with --force")
    for problem in problems:
        say(f"warning: {problem}")
    for name in ("sampler", "shift", "sigma_max"):
        if getattr(asked, name) not in (None, "auto"):
            say(f"warning: --{name.replace('_', '-')} has no effect: a student takes the steps it was trained for")


def _shot(asked: Asked, model: Model) -> Shot:
    known = model.envelope
    if known.num_frames is None and known.latent_shape is not None:
        known = _in_pixels(known, asked, model)
    values = {name: getattr(asked, name) or getattr(known, name) for name in ("num_frames", "height", "width")}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if missing:
        raise ValueError(f"{asked.model} does not say what clips it makes: give {', '.join(missing)}")
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
        raise ValueError(f"{asked.model} has no codec beside it: give --codec, the folder of an autoencoder or of its pipeline")
    return str(model.folder)


def _codec(asked: Asked, model: Model, device: torch.device) -> Autoencoder:
    path = model.network.path
    scale = path.sigma_data if isinstance(path, EDM) else 1.0  # an EDM network's latents have the spread of its data
    dtype = torch.bfloat16 if asked.precision == "bf16" else torch.float32
    return open_codec(_codec_address(asked, model), scale=scale, tile=asked.tile, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Text:
    embedding: Tensor  # 1 N D
    mask: Tensor | None
    pooled: Tensor | None = None


def _texts(requests: Sequence[Request], asked: Asked, model: Model, device: torch.device) -> Mapping[str, _Text]:
    """Every text that will be needed, by itself; then the encoder is let go, which is larger than many a network."""
    from fewstep.networks.text import QwenImage, open_text_encoder

    if all(request.label is not None for request in requests):
        return {}
    wanted = {r.prompt for r in requests if r.embedding is None and r.label is None}
    if asked.guidance != 1.0:
        wanted |= {r.negative for r in requests if r.negative_embedding is None and r.embedding is None}
    if not wanted:
        return {}
    address = asked.text_encoder
    if address is None:
        if model.folder is None or (model.folder.is_dir() and not (model.folder / "text_encoder").is_dir()):
            raise ValueError(f"{asked.model} has no text encoder beside it: give --text-encoder, or --embedding FILE")
        address = str(model.folder)
    encoder: Any = open_text_encoder(address, max_tokens=asked.max_tokens, device=device)  # Any: some have pooled vectors, too
    prompts = sorted(wanted)
    pooled: Tensor | None = None
    if hasattr(encoder, "encode_pooled"):
        embeddings, masks, pooled = encoder.encode_pooled(prompts)
    else:
        embeddings, masks = encoder.encode(prompts)
    # Most families attend to the padding of their prompts; told of a mask, they would answer otherwise than upstream.
    masked = isinstance(encoder, QwenImage) or type(encoder).__name__ == "WordsEncoder"
    return {
        prompt: _Text(
            embeddings[i : i + 1].to(device),
            masks[i : i + 1].to(device) if masked else None,
            None if pooled is None else pooled[i : i + 1].to(device),
        )
        for i, prompt in enumerate(prompts)
    }


def _embedded(path: Path, device: torch.device) -> _Text:
    found = arrays.read_one(path, "text").float()
    found = found[0] if found.ndim == 3 else found
    if found.ndim != 2:
        raise ValueError(f"{path}: an embedding has shape (tokens, channels), not {tuple(found.shape)}")
    return _Text(found[None].to(device), None)


def _conditions(
    request: Request,
    words: Mapping[str, _Text],
    model: Model,
    codec: Autoencoder,
    shot: Shot,
    latent_shape: tuple[int, int, int, int],
    device: torch.device,
) -> tuple[Condition, Condition | None]:
    """What leads the clip, and what guidance pushes away from."""
    cond = Condition(fps=torch.tensor([shot.fps], device=device))
    if request.label is not None:
        cond = replace(cond, label=torch.tensor([request.label], device=device))
        return cond, replace(cond, label=torch.full_like(torch.tensor([0], device=device), -1))
    text = words[request.prompt] if request.embedding is None else _embedded(request.embedding, device)
    cond = replace(cond, text=text.embedding, text_mask=text.mask, pooled=text.pooled)
    if request.num_input_frames:
        cond = _given(cond, request, model, codec, shot, latent_shape, device)
    if request.control:
        cond = replace(cond, control=_controls(request, model, codec, shot, device))
    return cond, _negative(request, words, cond, device)


def _negative(request: Request, words: Mapping[str, _Text], cond: Condition, device: torch.device) -> Condition | None:
    assert cond.text is not None
    if request.negative_embedding is not None:
        text = _embedded(request.negative_embedding, device)
    elif request.negative in words:
        text = words[request.negative]
    elif request.embedding is not None:  # how Cosmos 1 drops text
        text = _Text(torch.zeros_like(cond.text), cond.text_mask)
    else:
        return None
    embedding, mask = text.embedding, text.mask
    short = cond.text.shape[1] - embedding.shape[1]
    if short < 0:
        embedding, mask = embedding[:, : cond.text.shape[1]], None if mask is None else mask[:, : cond.text.shape[1]]
    elif short:
        embedding = torch.nn.functional.pad(embedding, (0, 0, 0, short))
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, short))
    return replace(cond, text=embedding, text_mask=mask, pooled=text.pooled)


def _given(
    cond: Condition,
    request: Request,
    model: Model,
    codec: Autoencoder,
    shot: Shot,
    latent_shape: tuple[int, int, int, int],
    device: torch.device,
) -> Condition:
    assert request.source is not None
    num, time_ratio = request.num_input_frames, codec.form.time if codec.form.sees_time else 1
    if (num - 1) % time_ratio:
        fits = num - (num - 1) % time_ratio
        raise ValueError(f"--num-input-frames {num}: this codec takes 1 + k * {time_ratio}, {fits} for instance")
    if num >= shot.num_frames:
        raise ValueError(f"--num-input-frames {num}: nothing is left to be made of {shot.num_frames} frames")
    shown = _pixels(request.source, shot, num, device)
    network: Any = getattr(model.network, "high", model.network)  # Any: of two experts either reads the picture
    config: Any = getattr(network.module, "config", {})
    if type(network).__name__ == "Wan" and config.in_channels > config.out_channels:
        from fewstep.networks.wan import start_from

        if config.image_dim is not None:
            raise ValueError(
                "Wan 2.1 I2V also reads its picture's CLIP features, which generate does not make: use TI2V or 2.2"
            )
        grey = shown.new_zeros(1, 3, shot.num_frames - num, shot.height, shot.width)
        return replace(cond, beside=start_from(codec.encode(torch.cat([shown, grey], 2))))
    rest = shown[:, :, -1:].expand(-1, -1, shot.num_frames - num, -1, -1)  # not seen: the codec is causal, the mask hides it
    frames = codec.encode(torch.cat([shown, rest], 2))
    mask = torch.zeros(1, latent_shape[1], device=device)
    mask[:, : 1 + (num - 1) // time_ratio] = 1
    return replace(cond, frames=frames, frame_mask=mask)


def _controls(request: Request, model: Model, codec: Autoencoder, shot: Shot, device: torch.device) -> dict[str, Tensor]:
    network: Any = model.network  # Any: only networks with control branches have names of them
    known = getattr(network, "controls", ())
    wrong = sorted(set(request.control) - set(known))
    if wrong:
        raise ValueError(f"control '{wrong[0]}': this network is led by {', '.join(known) or 'no control'}")
    weights = {name: control.weight for name, control in request.control.items()}
    total = max(1.0, sum(weights.values()))
    network.module.weights = {name: weights.get(name, 0.0) / total for name in known}
    found: dict[str, Tensor] = {}
    for name, control in request.control.items():
        found[name] = codec.encode(_control_pixels(name, control.source, request, shot, device))
    for name in known:
        found.setdefault(name, torch.zeros_like(next(iter(found.values()))))
    return found


def _control_pixels(name: str, source: Path | None, request: Request, shot: Shot, device: torch.device) -> Tensor:
    if source is not None:
        return _pixels(source, shot, shot.num_frames, device)
    if request.source is None:
        raise ValueError(f"control '{name}' has no file, and there is no --input to make it from: --control {name}=FILE.mp4")
    kinds = choices("control")
    if name not in ("edge", "vis"):
        raise ValueError(f"control '{name}' cannot be made from a video here, only edge and vis can: fewstep prepare controls")
    frames = _frames(request.source, shot, shot.num_frames)
    return _tensor(controls.made_of(kinds[name](), frames, request.seed), device)


def _pixels(path: Path, shot: Shot, num: int, device: torch.device) -> Tensor:
    return _tensor(_frames(path, shot, num), device)


def _frames(path: Path, shot: Shot, num: int) -> np.ndarray:
    """uint8 T H W 3: the first `num` frames, resized; a picture is a clip of one frame that stands still."""
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp"):
        import cv2

        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"{path}: is no picture that can be read")
        sized = cv2.resize(picture, (shot.width, shot.height), interpolation=cv2.INTER_AREA)
        return np.repeat(np.ascontiguousarray(sized[None, :, :, ::-1]), num, 0)
    return video.read(path, 0, num, size=(shot.height, shot.width)).frames


def _tensor(frames: np.ndarray, device: torch.device) -> Tensor:
    """1 3 T H W in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device).float() / 127.5 - 1


def _paper(asked: Asked, request: Request) -> dict[str, Any]:
    """How the clip is made: what would make it another one."""
    left_out = {"out", "requests", "device", "force", "save_noise", "wants_student"}
    told = {name: value for name, value in asdict(asked).items() if name not in left_out}
    return json.loads(json.dumps(told | {"clip": asdict(request)}, default=str))


def _place(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.mp4", out / f"{name}.png"


def _is_made(out: Path, name: str, paper: Mapping[str, Any]) -> bool:
    if not any(path.is_file() for path in _place(out, name)):
        return False
    told = out / f"{name}.json"
    before = json.loads(told.read_text()).get("made") if told.is_file() else None
    if before == paper:
        return True
    other = "in an unknown way" if before is None else _difference(before, paper)
    raise ValueError(f"{out / name}: is there and was made {other}. Choose another --out or --name, or remove it")


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
            raise ValueError(f"{name} {path}: no such file (for clip '{request.name}')")


def _write(asked: Asked, request: Request, frames: np.ndarray, fps: float, paper: Mapping[str, Any], seconds: float) -> Path:
    asked.out.mkdir(parents=True, exist_ok=True)
    about = {"made": paper, "seconds": round(seconds, 3), "frames": len(frames), "fps": fps}
    for suffix, text in ((".txt", request.prompt + "\n"), (".json", json.dumps(about, indent=1) + "\n")):
        with replacing(asked.out / f"{request.name}{suffix}") as beside:
            beside.write_text(text, encoding="utf-8")
    clip, picture = _place(asked.out, request.name)
    if len(frames) == 1:
        import cv2

        _, coded = cv2.imencode(".png", frames[0][:, :, ::-1])
        with replacing(picture) as beside:
            beside.write_bytes(coded.tobytes())
        return picture
    quality = "lossless" if asked.quality == "lossless" else int(asked.quality)
    video.write(clip, frames, fps, quality=quality)  # last: it says "done"
    return clip


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
