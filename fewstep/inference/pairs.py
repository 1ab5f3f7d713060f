"""What knowledge distillation learns from: the teacher's clips, the noise each was made of, and states of its ODE on the way.

    OUT/videos/STEM.mp4  metas/STEM.txt  t5_xxl/STEM.pickle  noise/STEM.pickle      as the seeds have them
    OUT/latents/STEM.safetensors       the teacher's answer before the codec rounded it
    OUT/path/STEM.safetensors          states and their times, where times were asked for
    OUT/CONTROL/STEM.mp4  CONTROL_latents/STEM.safetensors         what the teacher was led by
    OUT/pairs.json                     how all of it was made; another way to make it is refused

The noise of a pair depends on (seed, place of its prompt) alone: a killed command goes on where it was, ranks divide the work,
and one rank or eight make the same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.data.files import arrays, cache, video
from fewstep.data.folder.dataset import Folder, FolderData, layout
from fewstep.data.folder.layout import Layout
from fewstep.diffusion import Rng, guided, samplers, times
from fewstep.diffusion.path import floats
from fewstep.diffusion.rollout import start
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import read_json, whole_file, write_json, write_text
from fewstep.methods.given import first_frames
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Codec

ABOUT = "pairs.json"
SamplerName = Literal["euler", "heun", "dpmpp_2m", "unipc", "res_2ab"]
Track = Callable[[Iterable[list[int]], int, str], Iterable[list[int]]]  # shows how far the work is


@dataclass(frozen=True)
class Making:
    """How the teacher is asked."""

    num_steps: int = 35  # calls of the solver's grid; with guidance each asks the network twice
    sampler: SamplerName = "unipc"
    shift: float = 1.0  # of the grid in flow time; Predict2.5 5
    guidance: float = 1.0  # w = 1 is off; Cosmos writes g = w - 1
    seed: int = 0
    path_times: tuple[float, ...] = ()  # states to keep, in the time of the teacher's path
    given_frames: int = 0  # clean latent frames of the source's own clip that the teacher is shown
    quality: int | Literal["lossless"] = 18  # of the mp4

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"--steps {self.num_steps}: at least 1")
        if self.num_steps < 2 * len(self.path_times):
            raise UserError(f"--steps {self.num_steps}: too few to keep {len(self.path_times)} states and solve between them")
        if list(self.path_times) != sorted(set(self.path_times), reverse=True):
            raise UserError(f"--path-times must descend, from noise to the clip, not {list(self.path_times)}")


def write(
    out: Path,
    teacher: Network,
    codec: Codec,
    source: Folder,
    making: Making,
    *,
    told: str = "",
    num: int | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    track: Track = lambda items, total, title: items,
) -> int:
    """Writes a pair for each of the first `num` samples of `source` (its captions, text and controls) and returns how many
    of this rank's were new. `told` names the teacher in pairs.json."""
    data = source.open()
    num = len(data) if num is None else num
    if not 1 <= num <= len(data):
        raise UserError(f"--num {num}: {source.dataset_dir} has {len(data)} samples")
    _claim(out, {"teacher": told, "codec": codec.fingerprint, "source": str(source.dataset_dir), **asdict(making)})
    place, captions = Layout(out), data.captions()
    mine = range(rank, num, world_size)
    todo = [i for i in mine if not _is_there(place, data.stems[i], source, making)]
    chunks = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    for rows in track(chunks, len(chunks), f"pairs {out}, batches of {batch_size}"):
        _write_some(place, teacher, codec, data, captions, rows, making, device, told or "the teacher")
    return len(todo)


@torch.no_grad()
def _write_some(
    place: Layout,
    teacher: Network,
    codec: Codec,
    data: FolderData,
    captions: Sequence[str],
    rows: list[int],
    making: Making,
    device: torch.device | str,
    told: str,
) -> None:
    batch = data.batch(torch.tensor(rows)).to(device)
    assert batch.x0 is not None
    pixels, cond, negative = batch.x0, batch.cond, batch.negative
    shape = codec.shape(*pixels.shape[2:])
    noise = Rng(making.seed, 0, torch.tensor(rows), device).normal(shape)
    control = {name: codec.encode(frames) for name, frames in cond.control.items()}
    cond = replace(cond, control=control)
    if making.given_frames:
        mask = first_frames(torch.full((len(rows),), making.given_frames, device=noise.device), shape[1]).to(noise.dtype)
        cond = replace(cond, frames=codec.encode(pixels), frame_mask=mask)
    x0, states = solve(teacher, noise, cond, None if negative is None else replace(cond, text=negative.text), making)
    frames = to_uint8(codec.decode(x0), told)
    fps = [16.0] * len(rows) if cond.fps is None else cond.fps.tolist()
    for n, row in enumerate(rows):
        stem = data.stems[row]
        _copy_text(place, data, row, captions[row])
        for name, latents in control.items():
            cache.write(place.file(layout.control_latents(name), stem), {"latents": latents[n].half().cpu()})
        if making.path_times:
            at = torch.tensor(making.path_times, dtype=torch.float64)
            cache.write(place.file(layout.PATH, stem), {"path": states[n].cpu(), "path_times": at})
        arrays.write_pickle(place.file(layout.NOISE, stem), noise[n].cpu().numpy())
        cache.write(place.file(layout.LATENTS, stem), {"latents": x0[n].cpu()}, facts={"fps": fps[n]})
        video.write(place.file(layout.VIDEOS, stem), frames[n], fps[n], quality=making.quality)  # last: it says "done"


def solve(
    teacher: Network, noise: Tensor, cond: Condition, negative: Condition | None, making: Making
) -> tuple[Tensor, Tensor]:
    """The teacher's x0 from unit-variance noise, and its states B K C T H W at `making.path_times` (K may be 0)."""
    asked = guided(teacher, negative, making.guidance)
    grid = times.on_flow(making.num_steps, teacher.path, making.shift)
    solver = getattr(samplers, making.sampler)
    x = start(teacher.path, noise, float(grid[0]))
    if not making.path_times:
        return solver(asked, x, grid, cond), x.new_zeros(len(x), 0, *x.shape[1:])
    made = samplers.trajectory(solver, asked, x, grid, cond, torch.tensor(making.path_times, dtype=torch.float64))
    return made.x0, made.states


def to_uint8(pixels: Tensor, whose: str) -> np.ndarray:
    """B T H W 3 of pixels B 3 T H W in -1..1, made by `whose`. ValueError for what is not finite: it would look black."""
    if not bool(pixels.isfinite().all()):
        raise UserError(
            f"{whose}: answers numbers that are not finite. Its weights or its codec's are damaged, or the precision is too "
            "small for them. Nothing of these clips was written"
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def asked(
    steps: int,
    sampler: str,
    shift: float,
    guidance: float,
    path_times: str | None,
    student_shift: float,
    given_frames: int,
    seed: int,
    quality: str,
) -> Making:
    """What a command line says, read and checked."""
    if sampler not in get_args(SamplerName):
        raise UserError(f"--sampler is one of {', '.join(get_args(SamplerName))}, not {sampler!r}")
    if quality != "lossless" and not quality.isdigit():
        raise UserError(f"--quality is 'lossless' or a CRF from 0 to 51, not {quality!r}")
    at: tuple[float, ...] = ()
    if path_times is not None:
        try:
            at = tuple(float(part) for part in path_times.split(","))
        except ValueError:
            raise UserError(f"--path-times takes numbers with commas between, not {path_times!r}") from None
        if len(at) == 1 and at[0] > 1 and at[0].is_integer():  # not times, but their number
            at = tuple(floats(times.shifted(int(at[0]), student_shift)))
    how: Any = sampler
    crf: Any = quality if quality == "lossless" else int(quality)
    return Making(steps, how, shift, guidance, seed, at, given_frames, crf)


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


def _is_there(place: Layout, stem: str, source: Folder, making: Making) -> bool:
    wanted = [layout.VIDEOS, layout.CAPTIONS, layout.NOISE, layout.LATENTS] + ([layout.PATH] if making.path_times else [])
    wanted += [] if source.control is None else [layout.control_latents(source.control.folder)]
    return all(place.file(part, stem).is_file() for part in wanted)


def _claim(out: Path, about: dict[str, object]) -> None:
    """Marks the folder as made this way before the first pair; refuses one that was made in another."""
    about = json.loads(json.dumps(about))
    path = out / ABOUT
    if path.is_file():
        before = read_json(path, f"Remove {out} and make its pairs again")
        other = [f"{key} {before.get(key)!r}, not {about[key]!r}" for key in about if before.get(key) != about[key]]
        if other:
            raise UserError(f"{out}: holds pairs made otherwise: {'; '.join(other)}. Choose another --out, or remove it")
        return
    if out.is_dir() and any(not entry.name.startswith(".") for entry in list(out.iterdir())):
        if path.is_file():  # another rank has just marked it
            _claim(out, about)
            return
        raise UserError(f"{out}: is not empty and has no {ABOUT}. Choose a new folder for --out")
    write_json(path, about, shared=True)


def command(
    model: str,
    dataset: Path,
    out: Path,
    making: Making,
    *,
    codec: str | None,
    control: str | None,
    text: str,
    negative: str | None,
    max_tokens: int,
    mask_text: bool,
    num: int | None,
    batch_size: int,
    device: str | None,
    track: Track,
) -> str:
    """What `fewstep pairs` does: opens everything, makes this rank's share, and tells it in one line."""
    from fewstep.inference.model import open_model
    from fewstep.networks.encoders.codecs import open_codec

    own = ranks()
    if device is None:
        device = f"cuda:{own.local}" if torch.cuda.is_available() else "cpu"
    teacher = open_model(model, controls=[] if control is None else [control]).network
    teacher.module.to(device)
    source = Folder(
        str(dataset),
        text=text,
        max_tokens=max_tokens,
        mask_text=mask_text,
        negative=negative,
        control=None if control is None else choices("control")[control](),  # type: ignore[arg-type]  # registered by name
    )
    made = write(
        out,
        teacher,
        open_codec(codec or model, device=device),
        source,
        making,
        told=model,
        num=num,
        batch_size=batch_size,
        rank=own.rank,
        world_size=own.size,
        device=device,
        track=track,
    )
    return f"{out}: {made} pairs made" + (f" by rank {own.rank} of {own.size}" if own.size > 1 else "")
