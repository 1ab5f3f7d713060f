"""What knowledge distillation learns from: the teacher's clips, the noise each was made of, and states of its ODE on the way.

    OUT/videos/STEM.mp4  metas/STEM.txt  t5_xxl/STEM.pickle  noise/STEM.pickle      the layout of Cosmos-Transfer1
    OUT/latents/STEM.safetensors       the teacher's x0 before the codec rounded it
    OUT/path/STEM.safetensors          states and their times, where times were asked for
    OUT/CONTROL/STEM.mp4  CONTROL_latents/STEM.safetensors         the control that the teacher received
    OUT/pairs.json                     all that decides a clip; other settings are refused

The noise of a pair depends on (seed, place of its prompt) alone: a killed command goes on where it was, ranks divide the work,
and one rank or eight make the same files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.batch import first_frames
from fewstep.config import choices, dump
from fewstep.data.files import arrays, cache, video
from fewstep.data.folder.dataset import Folder, FolderData, layout
from fewstep.data.folder.layout import Layout
from fewstep.diffusion import Path as NoisePath
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.sampling import student_times
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import read_json, whole_file, write_json, write_text
from fewstep.inference.record import differences
from fewstep.inference.request import PairsRequest
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Codec, fingerprint_of, to_uint8

RECORD = "pairs.json"
Track = Callable[[Iterable[list[int]], int, str], Iterable[list[int]]]  # shows how far the work is


@dataclass(frozen=True)
class PairSettings:
    """How each pair is made."""

    sampler: TeacherSampler
    seed: int = 0
    path_times: tuple[float, ...] = ()  # states to keep, in the time of the teacher's path
    given_frames: int = 0  # clean latent frames of the data set's own clip that the teacher receives
    quality: int | Literal["lossless"] = 18  # of the mp4

    def check(self, path: NoisePath) -> None:
        """Refuses path times that the sampler cannot keep on this path."""
        for problem in self.sampler.problems_of(self.path_times, path):
            raise UserError(f"--path-times: {problem}")


def write(
    out: Path,
    teacher: Network,
    codec: Codec,
    source: Folder,
    settings: PairSettings,
    *,
    name: str = "the teacher",
    record: Mapping[str, Any] | None = None,
    num: int | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    track: Track = lambda items, total, title: items,
) -> int:
    """Writes a pair for each of the first `num` samples of `source` (its captions, text and controls) and returns how many
    of this rank's were new. `name` is the teacher's in pairs.json; `record` is what else decides a clip."""
    settings.check(teacher.path)
    branches = branches_of(teacher, source, name)
    data = source.open()
    num = len(data) if num is None else num
    if not 1 <= num <= len(data):
        raise UserError(f"--num {num}: {source.dataset_dir} has {len(data)} samples")
    _claim(out, {"teacher": name, **(record or {}), **_decisive(teacher, codec, source, data, settings)})
    place, captions = Layout(out), data.captions()
    mine = range(rank, num, world_size)
    todo = [i for i in mine if not _is_there(place, data.stems[i], source, settings)]
    chunks = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    for rows in track(chunks, len(chunks), f"pairs {out}, batches of {batch_size}"):
        _write_some(place, teacher, codec, data, captions, rows, settings, branches, device, name)
    return len(todo)


def branches_of(teacher: Network, source: Folder, name: str) -> tuple[str, ...]:
    """The control branches of the teacher; refuses a control of the data set that it has no branch for."""
    branches = teacher.traits.controls
    control = None if source.control is None else source.control.folder
    if control is not None and control not in branches:
        raise UserError(f"--control {control}: {name} has {_listed(branches)}. Leave it out, or choose another teacher")
    return branches


def _listed(branches: Sequence[str]) -> str:
    return f"branches for {', '.join(branches)} only" if branches else "no control branch"


@torch.no_grad()
def _write_some(
    place: Layout,
    teacher: Network,
    codec: Codec,
    data: FolderData,
    captions: Sequence[str],
    rows: list[int],
    settings: PairSettings,
    branches: Sequence[str],
    device: torch.device | str,
    name: str,
) -> None:
    batch = data.batch(torch.tensor(rows)).to(device)
    assert batch.x0 is not None
    pixels, cond, negative = batch.x0, batch.cond, batch.negative
    shape = codec.shape(*pixels.shape[2:])
    noise = Rng(settings.seed, 0, torch.tensor(rows), device).normal(shape)
    control = {name: _encoded(codec, frames) for name, frames in cond.control.items()}
    unused = {name: torch.zeros_like(noise) for name in branches if control and name not in control}
    cond = replace(cond, control={**control, **unused})
    if settings.given_frames:
        mask = first_frames(torch.full((len(rows),), settings.given_frames, device=noise.device), shape[1]).to(noise.dtype)
        cond = replace(cond, frames=_encoded(codec, pixels), frame_mask=mask)
    negative = None if negative is None else replace(cond, text=negative.text)
    solved = settings.sampler.trajectory(teacher, noise, cond, negative, settings.path_times)
    frames = to_uint8(codec.decode(solved.x0), name)
    fps = [16.0] * len(rows) if cond.fps is None else cond.fps.tolist()
    for n, row in enumerate(rows):
        stem = data.stems[row]
        _copy_text(place, data, row, captions[row])
        for kind, latents in control.items():
            cache.write(place.file(layout.control_latents(kind), stem), {"latents": latents[n].half().cpu()})
        if settings.path_times:
            states = {"path": solved.states[n].cpu(), "path_times": solved.times}
            cache.write(place.file(layout.PATH, stem), states)
        arrays.write_pickle(place.file(layout.NOISE, stem), noise[n].cpu().numpy())
        cache.write(place.file(layout.LATENTS, stem), {"latents": solved.x0[n].cpu()}, facts={"fps": fps[n]})
        video.write(place.file(layout.VIDEOS, stem), frames[n], fps[n], quality=settings.quality)  # last: it says "done"


def _encoded(codec: Codec, pixels: Tensor) -> Tensor:
    """Latents of clips, encoded one by one: `prepare latents` and `generate` do so, and a batch may differ in its last bits."""
    return torch.cat([codec.encode(one) for one in pixels.split(1)])


# ---- the record ------------------------------------------------------------------------------------------------------


def _decisive(teacher: Network, codec: Codec, source: Folder, data: FolderData, settings: PairSettings) -> dict[str, Any]:
    """All that decides a clip, but for the files of single clips."""
    return {
        "teacher_weights": fingerprint_of(teacher.module, {}, sampled=4096),
        "codec": codec.fingerprint,  # its scale is in it
        "source": str(source.dataset_dir),
        "captions": hashlib.sha256("\n".join([*data.stems, *data.captions()]).encode()).hexdigest()[:16],
        "text": source.text,
        "text_tensors": _text_fingerprint(data),
        "negative": source.negative,
        "max_tokens": source.max_tokens,
        "mask_text": source.mask_text,
        "control": None if source.control is None else source.control.folder,
        "sampler": dump(settings.sampler),
        "path_times": list(settings.path_times),
        "given_frames": settings.given_frames,
        "seed": settings.seed,
        "quality": settings.quality,
    }


def _text_fingerprint(data: FolderData) -> str:
    """Over the embeddings of three samples: those of another encoder are seen, without reading all of them."""
    batch = data.batch(torch.tensor(sorted({0, len(data) // 2, len(data) - 1})))
    digest = hashlib.sha256()
    for cond in (batch.cond, batch.negative):
        if cond is not None and cond.text is not None:
            digest.update(f"{tuple(cond.text.shape)}".encode() + cond.text.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Marks the folder as made with these settings before the first pair; refuses one made with others."""
    record = json.loads(json.dumps(record))
    path = out / RECORD
    if path.is_file():
        before = read_json(path, f"Remove {out} and make its pairs again")
        other = [f"{key} {old!r}, not {new!r}" for key, old, new in differences(before, record)]
        if other:
            raise UserError(f"{out}: holds pairs made otherwise: {'; '.join(other)}. Choose another --out, or remove it")
        return
    if out.is_dir() and any(not entry.name.startswith(".") for entry in list(out.iterdir())):
        if path.is_file():  # another rank has just marked it
            _claim(out, record)
            return
        raise UserError(f"{out}: is not empty and has no {RECORD}. Choose a new folder for --out")
    write_json(path, record, shared=True)  # every rank does, at about the same moment


# ---- files -----------------------------------------------------------------------------------------------------------


def _copy_text(place: Layout, data: FolderData, row: int, caption: str) -> None:
    stem, spec = data.stems[row], data.spec
    write_text(place.file(layout.CAPTIONS, stem), caption + "\n")
    if spec.text is not None:
        _copy(data.samples[row].files.get(spec.text), place.file(layout.text(spec.text), stem))
    if spec.control is not None:
        part = layout.control(spec.control.folder, spec.control.suffix)
        _copy(data.samples[row].files.get(part.folder), place.file(part, stem))


def _copy(source: Path | None, target: Path) -> None:
    if source is None or target.is_file():
        return
    with whole_file(target.with_suffix(source.suffix)) as beside:
        shutil.copyfile(source, beside)


def _is_there(place: Layout, stem: str, source: Folder, settings: PairSettings) -> bool:
    wanted = [layout.VIDEOS, layout.CAPTIONS, layout.NOISE, layout.LATENTS] + ([layout.PATH] if settings.path_times else [])
    wanted += [] if source.control is None else [layout.control_latents(source.control.folder)]
    return all(place.file(part, stem).is_file() for part in wanted)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(request: PairsRequest, track: Track) -> str:
    """What `fewstep pairs` does: opens everything, makes this rank's share, and reports it in one line."""
    from fewstep.inference.model import changed, codec_of, open_model, place_network

    own = ranks()
    device = request.device or (f"cuda:{own.local}" if torch.cuda.is_available() else "cpu")
    model = open_model(request.model, controls=[] if request.control is None else [request.control])
    if not isinstance(model.sampler, TeacherSampler):
        raise UserError(f"{request.model}: is a student; pairs are made by a teacher")
    path, at = model.network.path, request.path_times
    settings = PairSettings(
        changed(model.sampler, request.sampling),
        request.seed,
        student_times(at, path, request.student_shift) if isinstance(at, int) else at,
        request.given_frames,
        "lossless" if request.quality == "lossless" else int(request.quality),
    )
    settings.check(path)
    source = Folder(
        str(request.dataset),
        text=request.text,
        max_tokens=request.max_tokens,
        mask_text=request.mask_text,
        negative=request.negative,
        control=None if request.control is None else choices("control")[request.control](),  # registered by name
    )
    teacher = model.network
    if len(branches_of(teacher, source, request.model)) > 1 and request.control is not None:
        teacher = teacher.with_control_weights({request.control: 1.0})
    place_network(model, torch.device(device), request.precision)
    codec = codec_of(model, request.model, request.codec, precision=request.precision, device=device)
    new = write(
        request.out,
        teacher,
        codec,
        source,
        settings,
        name=request.model,
        record={"precision": request.precision},
        num=request.num,
        batch_size=request.batch_size,
        rank=own.rank,
        world_size=own.size,
        device=device,
        track=track,
    )
    return f"{request.out}: {new} pairs made" + (f" by rank {own.rank} of {own.size}" if own.size > 1 else "")
