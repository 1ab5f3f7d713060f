"""Videos from a student or a teacher: OUT/NAME.mp4 (a picture: .png), its prompt as NAME.txt, how it was made as NAME.json.

The noise of a clip depends on its seed alone: processes divide the clips, batches of any size make the same clips, and a killed
command goes on where it was. A clip that is there and was made in this way is left; one made in another way is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.config import dump
from fewstep.data.files import arrays, video
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import plain_name, write_bytes, write_json, write_text
from fewstep.inference.coming_from_cosmos import Print
from fewstep.inference.conditions import Text, is_origin, texts_of
from fewstep.inference.films import Film, Studio, films
from fewstep.inference.fit import Plan, check_text, plan_of
from fewstep.inference.guardrails import Guardrail, Judge
from fewstep.inference.model import Outline, codec_of, folder_of, outline_of, place_network, refuse_context
from fewstep.inference.prompts import Blocked, blocks, check_plugins, prepare
from fewstep.inference.record import differences, stamps
from fewstep.inference.request import ClipRequest, GenerateRequest, files_of, quality_of
from fewstep.inference.stages import Component
from fewstep.inference.stream import refuse_stream, stream_clips
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Autoencoder
from fewstep.networks.encoders.vision import ClipVision
from fewstep.parallel import COMPUTE, World, device_of, join_world, leave_world
from fewstep.untrusted.text import read_json


def run(request: GenerateRequest) -> int:
    """This process's share of a `generate` command; returns the number of clips that were new."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    own = ranks()
    if own.size == 1 or not (request.shard or request.context > 1):
        return generate(request, own.rank, own.size, say=say)
    world = join_world("cpu" if request.device == "cpu" else "auto", context=request.context)
    try:
        return generate(replace(request, device=str(world.device)), world.reader, world.num_readers, world=world, say=say)
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

    world: the processes that hold a shard of the weights each (--shard), or make each clip together (--context), which count as
    one rank and of which one writes. They call the network side by side, so that all make as many clips: one that has none left
    makes the last clip again, and writes nothing.
    """
    names = [clip.name for clip in request.clips]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two clips are called '{twice[0]}': they would be one file")
    files = stamps(filter(None, (request.model, request.codec, request.text_encoder, request.image_encoder)))
    records = {clip.name: _record(request, clip, files) for clip in request.clips}
    mine = request.clips if world is not None else request.clips[rank::world_size]
    todo = [clip for clip in mine if not _is_done(request.out, clip.name, records[clip.name])]
    for clip in todo:
        clip.check_files()
    if not todo:
        say(f"{request.out}: nothing to do, its clips are there and were made in this way: {len(mine)}")
        return 0
    check_plugins(request)
    if world is not None:
        world.barrier()  # all have looked at what is there, before one writes
    device = torch.device(device_of(request.device))
    controls = sorted({name for clip in request.clips for name in clip.control})
    outline = outline_of(request.model, controls=controls, network=request.network)
    refuse_context(outline.spec, world, request.model)
    plan = plan_of(request, outline, say if rank == 0 else lambda text: None)
    if request.stream:
        refuse_stream(request, plan, world is not None)
    prepared = prepare(todo, request, device, say)
    blocked, num_asked = dict(prepared.blocked), len(todo)
    if not prepared.clips:
        raise Blocked(blocked, num_asked)
    todo, num_new = list(prepared.clips), len(prepared.clips)
    if world is not None:
        num_new = len(todo[rank::world_size])
        todo = [todo[min(i, len(todo) - 1)] for i in range(rank, len(todo) + -len(todo) % world_size, world_size)]
    judges = _judges(request, device)
    texts = texts_of(todo, request, folder_of(request.model), device)
    _check_texts(texts, plan, request)
    studio = _studio(request, outline, plan, texts, device, world)
    writes = world is None or world.writes
    if request.stream:
        return stream_clips(request, todo, studio, records, say)
    batches = _batches(todo, texts, request.batch_size, world)
    number = 0
    for group in [batches] if request.offload else [[rows] for rows in batches]:
        for rows, film in zip(group, films([[todo[i] for i in rows] for rows in group], studio), strict=True):
            for n, place in enumerate(rows):
                if place >= num_new or not writes:
                    continue
                clip, number = todo[place], number + 1
                reason = _reason(film.frames[n], judges)
                if reason is not None:
                    blocked[clip.name] = reason
                    say(f"{number} of {num_new}: clip '{clip.name}' is blocked: {reason}")
                    continue
                file = _write(request, clip, film, n, plan, records[clip.name])
                say(f"{number} of {num_new}: {file} ({film.seconds:.1f} s)")
    if blocked:
        raise Blocked(blocked, num_asked)
    return num_new if writes else 0


def _judges(request: GenerateRequest, device: torch.device) -> list[tuple[Guardrail, Component[Judge]]]:
    """The guardrails of frames. Each is opened once now: a damaged one is found before clips are made."""
    judges: list[tuple[Guardrail, Component[Judge]]] = []
    for guardrail in request.guardrails:
        if guardrail.judges == "frames":
            component = Component(partial(guardrail.open, device), "guardrail" in request.offload)
            with component.loaded():
                judges.append((guardrail, component))
    return judges


def _reason(frames: np.ndarray, judges: Sequence[tuple[Guardrail, Component[Judge]]]) -> str | None:
    """Why a guardrail blocks these frames; None if all let them pass."""
    for guardrail, component in judges:
        with component.loaded() as judge:
            reason = judge(frames)
        del judge
        if reason is not None:
            return blocks(guardrail, reason)
    return None


def _studio(
    request: GenerateRequest,
    outline: Outline,
    plan: Plan,
    texts: Mapping[str | Path | None, Text],
    device: torch.device,
    world: World | None,
) -> Studio:
    if world is not None and "network" in request.offload:
        raise UserError("--offload-diffusion-transformer: with --shard and --context each process keeps its network throughout")

    def network() -> Network:
        model = outline.open()
        place_network(model, device, request.precision, world, shard=request.shard)
        return model.network

    def codec() -> Autoencoder:
        return codec_of(plan.model, request.model, request.codec, tile=request.tile, precision=request.precision, device=device)

    return Studio(
        plan,
        request.model,
        Component(network, "network" in request.offload),
        Component(codec, "codec" in request.offload),
        Component(lambda: _pictures(request, plan, device), "codec" in request.offload),
        texts,
        device,
        torch.device("cpu") if request.offload else device,
        world is None or world.writes,
    )


def _check_texts(texts: Mapping[str | Path | None, Text], plan: Plan, request: GenerateRequest) -> None:
    for name, text in texts.items():
        source = f"--embedding {name}" if isinstance(name, Path) else request.text_encoder or request.model
        check_text(text.embedding.shape[-1], plan.model, source)


def _batches(
    clips: Sequence[ClipRequest], texts: Mapping[str | Path | None, Text], size: int, world: World | None
) -> list[list[int]]:
    """Places in `clips`, up to `size` of clips whose conditions have the same shapes together."""
    groups: dict[object, list[int]] = {}
    for i, clip in enumerate(clips):
        text = texts.get(clip.embedding or clip.prompt)
        shapes = None if text is None else (text.embedding.shape, text.mask is None, text.pooled is None)
        weights = tuple((name, control.weight) for name, control in clip.control.items())
        groups.setdefault((shapes, weights, clip.label is None, clip.num_input_frames > 0, is_origin(clip)), []).append(i)
    if world is not None and any(world.any(len(groups) > 1)):  # every process must call its shard as often as the others
        return [[i] for i in range(len(clips))]
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _pictures(request: GenerateRequest, plan: Plan, device: torch.device) -> ClipVision | None:
    """The encoder of pictures, where the network reads its features."""
    model = plan.model
    if not model.network.traits.reads_image or (request.image_encoder is None and model.folder is None):
        return None
    from fewstep.networks.encoders.vision import open_image_encoder

    address = request.image_encoder or str(model.folder)
    return open_image_encoder(address, dtype=COMPUTE[request.precision], device=device)


def _record(request: GenerateRequest, clip: ClipRequest, files: Mapping[str, str]) -> dict[str, Any]:
    """The settings that decide the clip, and stamps of the files that it is made from; `files` are those of the models."""
    left_out = {"out", "clips", "device", "force", "save_noise", "student_only", "shard", "context", "batch_size"}
    left_out |= {"offload", "stream"}
    left_out |= set() if request.published_guidance else {"published_guidance"}
    left_out |= {"guardrails", "upsampler", "save_controls"}
    settings: dict[str, Any] = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in left_out}
    settings["sampling"] = asdict(request.sampling)
    if request.guardrails:
        settings["guardrails"] = [_entry(guardrail) for guardrail in request.guardrails]
    if request.upsampler is not None:
        settings["upsampler"] = _entry(request.upsampler)
    own = asdict(clip)
    if not clip.switches:
        del own["switches"]
    inputs = [clip.source, clip.embedding, clip.negative_embedding, *(control.source for control in clip.control.values())]
    settings["files"] = {**files, **stamps(str(path) for path in inputs if path is not None)}
    return json.loads(json.dumps(settings | {"clip": own}, default=str))


def _entry(plugin: Any) -> dict[str, Any]:  # Any: a frozen dataclass, registered with @kind
    return {"kind": plugin.kind, **dump(plugin)}


def _is_done(out: Path, name: str, record: Mapping[str, Any]) -> bool:
    if not any(path.is_file() for path in files_of(out, name)):
        return False
    file = out / f"{name}.json"
    advice = "Remove it and its clip, or choose another --out or --name"
    about = read_json(file, advice) if file.is_file() else {}
    before = about.get("made")
    if not isinstance(before, dict | None):
        raise UserError(f"{file}: made: must be a mapping. {advice}")
    others = [
        f"another content of {key.removeprefix('files.')}" if key.startswith("files") else f"{key} {old!r} and not {new!r}"
        for key, old, new in differences({"files": {}} | (before or {}), record)
    ]
    if before is not None and not others:
        return not about.get("interrupted", False)
    how = "in an unknown way" if before is None else f"with {', '.join(others[:3])}"
    raise UserError(f"{out / name}: is there and was made {how}. Choose another --out or --name, or remove it")


def _write(request: GenerateRequest, clip: ClipRequest, film: Film, number: int, plan: Plan, record: Mapping[str, Any]) -> Path:
    """Writes clip `number` of a film; returns the file of its frames."""
    frames, fps = film.frames[number], plan.shot.fps
    quality = quality_of(request.quality)
    if request.save_noise:
        arrays.write_pickle(request.out / "noise" / f"{clip.name}.pickle", film.noise[number].numpy())
    for name, control in film.controls[number].items() if request.save_controls else ():
        video.write(request.out / plain_name(name, "control") / f"{clip.name}.mp4", control, fps, quality=quality)
    write_text(request.out / f"{clip.name}.txt", clip.prompt + "\n")
    about = {
        "made": record,
        "prompt": clip.prompt,
        "sampler": dump(plan.sampler),
        "seconds": round(film.seconds, 3),
        "fps": fps,
    }
    write_json(request.out / f"{clip.name}.json", {**about, "frames": len(frames)})
    path, picture = files_of(request.out, clip.name)
    if len(frames) == 1:
        import cv2

        _, coded = cv2.imencode(".png", frames[0][:, :, ::-1])
        write_bytes(picture, coded.tobytes())
        return picture
    video.write(path, frames, fps, quality=quality)  # last: it says "done"
    return path
