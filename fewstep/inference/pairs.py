"""What knowledge distillation learns from: the teacher's clips, the noise each was made of, and states of its ODE on the way.

The files are in pair_files.py, their folder and its record in pair_folder.py, what the teacher makes pairs of in
pair_prompts.py.

The noise of a pair depends on (seed, number of its prompt) alone, and a prompt keeps its number when the data set grows: a
killed command goes on where it was, ranks divide the work, and one rank or eight make the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.batch import first_frames
from fewstep.config import ConfigError, choices, dump
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import Path as NoisePath
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.samplers import Trajectory
from fewstep.environment import Ranks, ranks
from fewstep.errors import UserError
from fewstep.files import remove
from fewstep.inference.conditions import Shot
from fewstep.inference.model import (
    changed,
    codec_of,
    folder_of,
    outline_of,
    place_network,
    refuse_context,
    text_encoder_address,
)
from fewstep.inference.pair_files import Pair, evenly
from fewstep.inference.pair_folder import PairFolder, PairSettings
from fewstep.inference.pair_prompts import (
    PUBLISHED,
    ZEROS,
    FilePrompts,
    FolderPrompts,
    Material,
    PairPrompts,
    frames_of,
    published_shot,
    read_captions,
    shot_of,
)
from fewstep.inference.request import PairsRequest, quality_of
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Codec, fingerprint_of, to_uint8
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.parallel import World, device_of, join_world, leave_world

WEIGHTS = "teacher_weights"  # of pairs.json: a fingerprint
Track = Callable[[Iterable[list[int]], int, str], Iterable[list[int]]]  # shows how far the work is
AGREEMENT = {"fp32": 0.01, "bf16": 0.1}  # how far x0 may be from itself, relative to its spread, when it is solved again


@dataclass(frozen=True)
class Solver:
    """The teacher with its codec, on their device."""

    teacher: Network
    codec: Codec
    settings: PairSettings
    device: torch.device | str = "cpu"
    name: str = "the teacher"

    def shape(self, prompts: PairPrompts) -> tuple[int, int, int, int]:
        """C t h w of the latents of a clip."""
        return self.codec.shape(prompts.shot.num_frames, prompts.shot.height, prompts.shot.width)

    @torch.no_grad()
    def solve(self, material: Material, numbers: Sequence[int], shape: tuple[int, int, int, int]) -> tuple[Solved, Tensor]:
        """The clips of this material, and their noise."""
        cond, negative = material.cond.to(self.device), material.negative
        noise = Rng(self.settings.seed, 0, list(numbers), self.device).normal(shape)
        control = {name: latents_of(self.codec, frames) for name, frames in cond.control.items()}
        cond = replace(cond, control=control)
        if self.settings.given_frames:
            assert material.pixels is not None
            num = torch.full((len(numbers),), self.settings.given_frames, device=noise.device)
            mask = first_frames(num, shape[1]).to(noise.dtype)
            cond = self.teacher.with_frames(cond, latents_of(self.codec, material.pixels.to(self.device)), mask)
        if negative is not None:
            negative = negative.to(self.device)
            negative = replace(cond, text=negative.text, text_mask=negative.text_mask, pooled=negative.pooled)
        trajectory = self.settings.sampler.trajectory(self.teacher, noise, cond, negative, self.settings.path_times)
        return Solved(trajectory, control), noise


@dataclass(frozen=True)
class Solved:
    trajectory: Trajectory
    control: Mapping[str, Tensor]  # latents of the controls


def write(
    out: Path,
    solver: Solver,
    prompts: PairPrompts,
    *,
    record: Mapping[str, Any] | None = None,
    num: int | None = None,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    world: World | None = None,
    track: Track = lambda items, total, title: items,
) -> int:
    """Writes a pair for each of the first `num` prompts and returns how many of this rank's were new.

    record: what else decides a clip, and the fingerprint of weights that are divided. world: the processes that hold a shard of
    the weights each, or make each clip together, one of which writes; they call the network side by side, equally often.
    """
    settings = solver.settings
    settings.check(solver.teacher.path)
    _refuse_other_control(solver, prompts)
    decisive = {"teacher": solver.name, **_decisive(solver, prompts), **(record or {})}
    if WEIGHTS not in decisive:
        decisive[WEIGHTS] = fingerprint_of(solver.teacher.module, {}, sampled=4096)
    folder = PairFolder.of(out, prompts, settings, decisive)
    num, shape = folder.checked_num(num), solver.shape(prompts)
    if settings.given_frames >= shape[1]:
        num_given = settings.given_frames
        raise ConfigError(f"--given-frames {num_given}: a clip has {shape[1]} latent frames, one of which must be generated")
    todo = set(folder.todo(num))
    # A batch with a pair that is missing is solved whole: in another batch a pair would differ in its last bits.
    batches_of = [_batches(todo, range(first, num, world_size), batch_size) for first in range(world_size)]
    batches, extra = batches_of[rank], 0
    if world is not None:
        world.barrier()  # all have looked at what is there, before one writes
        extra = max(map(len, batches_of)) - len(batches)
    for rows in track(batches, len(batches), f"pairs {out}, batches of {batch_size}"):
        material = prompts.material(rows)
        solved, noise = solver.solve(material, folder.numbers(rows), shape)
        if world is None or world.writes:
            pairs = zip(rows, _pairs(solver, prompts, rows, material, solved, noise), strict=True)
            folder.write({row: pair for row, pair in pairs if row in todo})
    for _ in range(extra):
        solver.solve(prompts.material([num - 1]), folder.numbers([num - 1]), shape)
    return sum(row in todo for rows in batches for row in rows)


def _batches(todo: Collection[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """The rows in batches, without those in which nothing is to do."""
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [batch for batch in batches if any(row in todo for row in batch)]


def verify(out: Path, solver: Solver, prompts: PairPrompts, num: int, tolerance: float = AGREEMENT["fp32"]) -> float:
    """Solves `num` of the pairs in `out` again, and returns the largest difference from what is stored, relative to its spread.

    Raises UserError for a pair that differs by more than `tolerance`.
    """
    folder, shape, largest = PairFolder.of(out, prompts, solver.settings, None), solver.shape(prompts), 0.0
    there = [row for row in range(len(prompts.stems)) if folder.files.has(folder.name(row))]
    for row in evenly(there, num):
        solved, _ = solver.solve(prompts.material([row]), folder.numbers([row]), shape)
        x0, states = folder.files.read(folder.name(row))
        errors = [_distance(solved.trajectory.x0[0], x0)]
        errors += [] if states is None else [_distance(solved.trajectory.states[0], states)]
        if max(errors) > tolerance:
            raise UserError(
                f"{out}: the pair {folder.name(row)} differs by {max(errors):.3g} of its spread from what the teacher makes of "
                f"its noise now ({tolerance:g} is allowed). It was made by another teacher, text or sampler: remove the folder"
            )
        largest = max(largest, *errors)
    return largest


def _refuse_other_control(solver: Solver, prompts: PairPrompts) -> None:
    """Raises UserError for a control of the data set that the teacher has no branch for."""
    branches = solver.teacher.traits.controls
    control = prompts.record()["control"]
    if control is not None and control not in branches:
        listed = f"branches for {', '.join(branches)} only" if branches else "no control branch"
        raise UserError(f"--control {control}: {solver.name} has {listed}. Leave it out, or choose another teacher")


def _pairs(
    solver: Solver, prompts: PairPrompts, rows: Sequence[int], material: Material, solved: Solved, noise: Tensor
) -> list[Pair]:
    trajectory, keeps = solved.trajectory, bool(solver.settings.path_times)
    frames = to_uint8(solver.codec.decode(trajectory.x0), solver.name)
    fps = [16.0] * len(rows) if material.cond.fps is None else material.cond.fps.tolist()
    return [
        Pair(
            prompts.captions[row],
            prompts.text(row),
            noise[n],
            trajectory.x0[n],
            trajectory.states[n] if keeps else None,
            trajectory.times if keeps else None,
            frames[n],
            fps[n],
            {kind: latents[n] for kind, latents in solved.control.items()},
            prompts.controls(row, frames_of(material.cond.control, n)),
        )
        for n, row in enumerate(rows)
    ]


def latents_of(codec: Codec, pixels: Tensor) -> Tensor:
    """Latents of clips, encoded one by one: `prepare latents` and `generate` do so, and a batch may differ in its last bits."""
    return torch.cat([codec.encode(one) for one in pixels.split(1)])


def _distance(one: Tensor, other: Tensor) -> float:
    one, other = one.double().cpu(), other.double().cpu()
    if one.shape != other.shape:
        raise UserError(f"a stored pair has shape {tuple(other.shape)}, the teacher makes {tuple(one.shape)}")
    return float((one - other).pow(2).mean().sqrt() / one.std().clamp(min=1e-6))


def _decisive(solver: Solver, prompts: PairPrompts) -> dict[str, Any]:
    """All that decides a clip, but for the texts of single ones."""
    settings, shot = solver.settings, prompts.shot
    return {
        "codec": solver.codec.fingerprint,  # its scale is in it
        **prompts.record(),
        "shape": [shot.num_frames, shot.height, shot.width],
        "sampler": dump(settings.sampler),
        "path_times": list(settings.path_times),
        "given_frames": settings.given_frames,
        "seed": settings.seed,
        "quality": settings.quality,
        "form": settings.form,
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def run(request: PairsRequest, track: Track) -> str:
    """What `fewstep pairs` does: opens everything, makes this rank's share, and reports it in one line."""
    own = ranks()
    if own.size == 1 or not (request.shard or request.context > 1):
        return _run(request, track, own, None)
    world = join_world("cpu" if request.device == "cpu" else "auto", context=request.context)
    try:
        return _run(replace(request, device=str(world.device)), track, own, world)
    finally:
        leave_world()


def _run(request: PairsRequest, track: Track, own: Ranks, world: World | None) -> str:
    device = device_of(request.device)
    outline = outline_of(request.model, controls=[] if request.control is None else [request.control])
    refuse_context(outline.spec, world, request.model)
    sketch = outline.skeleton()
    if not isinstance(sketch.sampler, TeacherSampler):
        raise UserError(f"{request.model}: is a student; pairs are made by a teacher")
    settings = _settings(request, changed(sketch.sampler, request.sampling), sketch.network.path)
    shot = published_shot(request.model) if request.sizes.is_partial else None
    alone: PairPrompts | None = None
    if request.prompts is not None:
        alone = _of_file(request, shot_of(request.sizes, teacher=shot, source=str(request.prompts)), device, own)
    model = outline.open()
    codec = codec_of(model, request.model, request.codec, precision=request.precision, device=device)
    prompts = alone or _of_folder(request, codec, shot)
    if own.is_main:
        print_shape(prompts)
    solver = Solver(model.network, codec, settings, device, request.model)
    _refuse_other_control(solver, prompts)
    weights = fingerprint_of(solver.teacher.module, {}, sampled=4096)  # before they are divided
    place_network(model, torch.device(device), request.precision, world, shard=request.shard)
    new = write(
        request.out,
        solver,
        prompts,
        record={"precision": request.precision, WEIGHTS: weights},
        num=request.num,
        batch_size=request.batch_size,
        rank=own.rank if world is None else world.reader,
        world_size=own.size if world is None else world.num_readers,
        world=world,
        track=track,
    )
    line = f"{request.out}: {new} pairs made{'' if new else ': all were there'}" + (
        f" by rank {own.rank} of {own.size}" if own.size > 1 else ""
    )
    if request.verify and (own.is_main or world is not None):
        if world is not None:
            world.barrier()  # until all pairs are there
        far = verify(request.out, solver, prompts, request.verify, AGREEMENT[request.precision])
        line += f"; {request.verify} of them solved again differ by {far:.2g} of their spread at most"
    if isinstance(prompts, FilePrompts):
        remove(prompts.waiting)
    return line


def print_shape(prompts: PairPrompts) -> None:
    """Prints the shape of the clips, and where it comes from."""
    import sys

    shot = prompts.shot
    print(f"clips of {shot.num_frames} x {shot.height} x {shot.width} at {shot.fps:g} fps: {prompts.origin}", file=sys.stderr)


def _settings(request: PairsRequest, sampler: TeacherSampler, path: NoisePath) -> PairSettings:
    at = request.path_times
    settings = PairSettings(
        sampler,
        request.seed,
        sampler.student_times(at, path, request.student_shift) if isinstance(at, int) else at,
        request.given_frames,
        quality_of(request.quality),
        "fastgen" if request.form == "fastgen" else "ours",
    )
    settings.check(path)
    return settings


def _of_folder(request: PairsRequest, codec: Codec, teacher: Shot | None) -> FolderPrompts:
    from fewstep.networks.encoders.text import TextForm, text_form

    assert request.dataset is not None
    base = folder_of(request.model)
    form = TextForm() if base is None else text_form(base)
    source = Folder(
        str(request.dataset),
        text=request.text,
        max_tokens=request.max_tokens or form.max_tokens,
        mask_text=request.mask_text or form.uses_mask,
        negative=request.negative or ZEROS,
        control=None if request.control is None else choices("control")[request.control](),  # registered by name
    )
    needs_clips = request.control is not None or request.given_frames > 0
    return FolderPrompts.of(source, request.sizes, codec=codec, needs_clips=needs_clips, teacher=teacher)


def _of_file(request: PairsRequest, shot: Shot, device: str, own: Ranks) -> FilePrompts:
    """The prompts of a file, embedded: the encoder, larger than many a network, is let go before the teacher is loaded."""
    from fewstep.networks.encoders.text import open_text_encoder

    assert request.prompts is not None
    stems, captions = read_captions(request.prompts)
    folder = folder_of(request.model)
    address = text_encoder_address(request.text_encoder, folder, request.model, "--text-encoder FOLDER")
    negative = request.negative or request.negative_prompt
    if negative is None:
        negative = ZEROS if PipelineFolder(str(folder or address)).has_zeros_for_no_prompt else ""
    encoder = open_text_encoder(address, max_tokens=request.max_tokens, device=device)
    prompts = FilePrompts(
        request.prompts,
        stems,
        captions,
        shot,
        request.sizes.text() or PUBLISHED,
        negative,
        request.out / f".text.{own.rank}",
        encoder.fingerprint,
        request.max_tokens or 0,
        request.mask_text or encoder.uses_mask,
    )
    longest = prompts.embed(encoder, range(len(captions) if request.num is None else min(request.num, len(captions))))
    if request.max_tokens is not None:
        return prompts
    fixed = encoder.encode([""])[0].shape[1]  # of an encoder that pads every text to one length
    return replace(prompts, max_tokens=fixed if longest <= fixed else max(longest, Folder.max_tokens))
