"""`fewstep evaluate`: clips of a model, of a codec, or of a folder, scored against real ones.

    fewstep evaluate demo/students/4step --prompts demo/heldout --real demo/real --out demo/scores/4step.json
    fewstep evaluate fewstep/toyworld/stack --steps 35 --guidance 2 ...     a teacher, by its sampler
    fewstep evaluate fewstep/toyworld/stack --calls 4 --guidance 2 ...      the best a teacher can do with this number of calls
    fewstep evaluate codec:fewstep/toyworld/stack ...                       what the codec alone does to real clips
    fewstep evaluate demo/pairs ...                               clips that are there already, in sets of --num

The scores are those of the toy world (its own feature network and probes) until others are chosen by the data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder, FolderData
from fewstep.data.folder.layout import Layout
from fewstep.diffusion import Rng
from fewstep.errors import UserError
from fewstep.evaluation.frechet import frechet_distance
from fewstep.files import write_json
from fewstep.inference.model import Model, open_model
from fewstep.inference.pairs import Making, SamplerName, solve, to_uint8
from fewstep.networks.encoders.codecs import Codec, open_codec
from fewstep.toyworld import features, scores
from fewstep.toyworld.scores import LEAST, Record, Value, over_sets

SEEDS = 1000  # noise of evaluation set k has seed SEEDS + k: never that of training or of pairs
RANKING = 256  # clips by which the samplers of a teacher are compared before the best one is scored


@dataclass(frozen=True)
class Job:
    what: str
    prompts: Path  # data set: captions, text, and real clips of the same scenes
    real: Path  # the clips everything is compared with; of other scenes
    out: Path  # JSON to write; first clips go beside it, OUT without its suffix
    num: int = 512  # clips in a set
    sets: int = 3
    calls: int | None = None
    how: Making = Making()
    keep: int = 8  # clips of the first set that are kept to look at
    text: str = "t5_xxl"
    max_tokens: int = 40
    batch_size: int = 64
    codec: str | None = None  # None: the one beside the model
    told: tuple[str, ...] = ()  # options of `how` that were asked for, to be refused where they would have no effect


def run(job: Job) -> dict[str, Any]:
    """Scores what the job names, writes its JSON, and returns what that says."""
    for name in ("num", "sets", "calls"):
        if (value := getattr(job, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if job.num < LEAST:
        raise UserError(f"--num {job.num}: a set needs at least {LEAST} clips, and better hundreds")
    torch.set_num_threads(1)
    told: dict[str, Any] = {"what": job.what}
    records: list[Record] = []
    if _is_clips(job.what):
        _refuse_making(job, "holds clips that are made already")
        sources = _sets_of(Path(job.what), job)
        known = _reference(job)
    elif job.what.startswith("codec:"):
        _refuse_making(job, "is a codec, which takes no steps")
        if job.what == "codec:":
            raise UserError("codec: which one? codec:FOLDER, of an autoencoder of diffusers or of its pipeline")
        codec, data, known = open_codec(job.what.removeprefix("codec:")), opened(job), _reference(job)
        sources = iter([(_through(codec, data, job), data.captions()[: job.num])])
    else:
        model, data = open_model(job.what), opened(job)
        if model.sampler is not None:
            _refuse_making(job, f"is a student, which takes the {len(model.sampler.times)} steps it was trained for")
        if job.calls is not None and (found := [name for name in job.told if name != "--guidance"]):
            raise UserError(f"--calls: finds steps, sampler and shift by itself; leave out {', '.join(found)}")
        codec, known = codec_of(model, job), _reference(job)
        how, candidates = job.how, list[dict[str, Any]]()
        if job.calls is not None:
            how, candidates = best_of(model, codec, data, job, known.features)
        told |= {"num_calls": calls_of(model, how), "candidates": candidates}
        told |= {"guidance": 1.0} if model.sampler is not None else {"guidance": how.guidance, "sampler": _named(how)}
        captions = data.captions()[: job.num]
        sources = ((generated(model, codec, data, job, how, job.num, k), captions) for k in range(job.sets))
    for k, (clips, captions) in enumerate(sources):
        if k == 0:
            _keep(clips, job)
        records.append(scores.score(clips, captions, known))
    told |= {
        "feature_net": records[0].name,
        "num_reference": records[0].num_reference,
        "notes": sorted({*_few_sets(job, len(records)), *(note for record in records for note in record.notes)}),
        "scores": {name: _written(over_sets([record[name] for record in records])) for name in records[0].scores},
    }
    write_json(job.out, told)
    return told


def _refuse_making(job: Job, why: str) -> None:
    """Options that only a teacher's sampling heeds would be told to one who thinks they were heeded."""
    told = ["--calls"] * (job.calls is not None) + list(job.told)
    if told:
        raise UserError(f"{', '.join(told)}: {job.what} {why}. Leave it out: it is for a teacher")


def _few_sets(job: Job, num: int) -> list[str]:
    return [f"{num} of {job.sets} sets: {job.what} holds no more clips."] * (num < job.sets)


def _reference(job: Job) -> scores.Reference:
    return scores.reference(job.real, cache=job.out.parent / "cache")


def _written(value: Value) -> dict[str, Any]:
    """As JSON, which knows no nan: null is what could not be measured."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {
        "value": number(value.value),
        "spread": number(value.spread),
        "num": value.num,
        "per_set": [number(x) for x in value.per_set],
    }


def line(told: dict[str, Any]) -> str:
    """The scores one looks at first, and what makes them less than they seem."""
    shown = ((name, told["scores"][name]) for name in ("frechet", "recall", "coverage", "adherence"))
    known = ((name, v["value"], v["spread"]) for name, v in shown if v["value"] is not None)
    text = "  ".join(f"{name} {value:.3g}" + ("" if spread is None else f" +- {spread:.2g}") for name, value, spread in known)
    return "\n".join([text, *(f"  note: {note}" for note in told["notes"])])


def codec_of(model: Model, job: Job) -> Codec:
    """The one that was named, or the one that came with the model."""
    if job.codec is None and model.folder is None:
        raise UserError(
            f"{job.what}: has no codec beside it. Add --codec ADDRESS, of the data it was trained on, or export it first"
        )
    return open_codec(job.codec or str(model.folder))


# ---- clips -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generated(model: Model, codec: Codec, data: FolderData, job: Job, how: Making, num: int, number: int) -> np.ndarray:
    """`num` clips of evaluation set `number`: row i from the same noise whatever the model."""
    parts: list[np.ndarray] = []
    for rows in torch.arange(num).split(job.batch_size):
        parts.append(to_uint8(codec.decode(latents(model, codec, data, rows, SEEDS + number, how)), job.what))
    return np.concatenate(parts)


@torch.no_grad()
def latents(model: Model, codec: Codec, data: FolderData, rows: Tensor, seed: int, how: Making) -> Tensor:
    batch = data.batch(rows)
    assert batch.x0 is not None
    rng = Rng(seed, 0, rows)
    noise = rng.normal(codec.shape(*batch.x0.shape[2:]))
    if model.sampler is not None:
        return model.sampler(model.network, noise, batch.cond, rng)
    return solve(model.network, noise, batch.cond, batch.negative, how)[0]


def calls_of(model: Model, how: Making) -> int:
    """Network calls for one clip."""
    if model.sampler is not None:
        return len(model.sampler.times)
    calls = 2 * how.num_steps - 1 if how.sampler == "heun" else how.num_steps
    return calls * (1 if how.guidance == 1.0 else 2)


def best_of(model: Model, codec: Codec, data: FolderData, job: Job, real: Tensor) -> tuple[Making, list[dict[str, Any]]]:
    """The way to spend `job.calls` network calls that comes nearest to the real clips, and how near each way comes.

    Ways are samplers, grids, and half as many steps with guidance. The ranking has noise of its own, and fewer clips.
    """
    assert job.calls is not None
    num, table = min(RANKING, job.num), list[tuple[float, Making]]()
    ways = ways_of(job.calls, job.how.guidance)
    if len(ways) == 1:
        return ways[0], []  # nothing to choose
    for how in ways:
        clips = generated(model, codec, data, job, how, num, job.sets)
        table.append((frechet_distance(features.features(torch.from_numpy(clips)), real), how))
    table.sort(key=lambda row: row[0])
    return table[0][1], [{"sampler": _named(how), "frechet_plain": value, "n": num} for value, how in table]


def ways_of(calls: int, guidance: float) -> list[Making]:
    if calls == 1:
        return [Making(num_steps=1, sampler="euler")]
    # Two steps of either multistep sampler are one of Euler's and its x0: the choice among them is for more.
    multistep: tuple[SamplerName, ...] = ("euler", "dpmpp_2m", "unipc")
    ways = [Making(num_steps=calls, sampler=name, shift=shift) for name in multistep for shift in (1.0, 3.0)]
    if calls % 2 and calls > 1:
        ways.append(Making(num_steps=(calls + 1) // 2, sampler="heun"))
    if calls % 2 == 0 and guidance != 1.0:
        few: tuple[SamplerName, ...] = multistep if calls > 4 else ("unipc",)
        ways += [Making(calls // 2, name, shift, guidance) for name in few for shift in (1.0, 3.0)]
    return ways


def _named(how: Making) -> str:
    guided = f", guidance {how.guidance:g}" if how.guidance != 1.0 else ", no guidance"
    return f"{how.sampler}, {how.num_steps} steps, shift {how.shift:g}{guided}"


def opened(job: Job) -> FolderData:
    data = Folder(str(job.prompts), text=job.text, max_tokens=job.max_tokens, mask_text=True, negative="zeros").open()
    if len(data) < job.num:
        raise UserError(f"--num {job.num}: {job.prompts} has {len(data)} prompts")
    return data


@torch.no_grad()
def _through(codec: Codec, data: FolderData, job: Job) -> np.ndarray:
    batches = (data.batch(rows).x0 for rows in torch.arange(job.num).split(job.batch_size))
    return np.concatenate([to_uint8(codec.decode(codec.encode(pixels)), job.what) for pixels in batches if pixels is not None])


def _is_clips(what: str) -> bool:
    return (Path(what) / "videos").is_dir()


def _sets_of(folder: Path, job: Job) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The folder's clips and captions, `job.num` at a time, as many whole sets as there are, up to `job.sets`."""
    layout = Layout.open(folder)
    from fewstep.data.folder.layout import CAPTIONS, VIDEOS

    files, captions = list(layout.files(VIDEOS).values()), list(layout.files(CAPTIONS).values())
    if len(files) < job.num or len(captions) != len(files):
        raise UserError(f"{folder}: has {len(files)} clips and {len(captions)} captions; a set needs {job.num} of both")
    for k in range(min(job.sets, len(files) // job.num)):
        part = slice(k * job.num, (k + 1) * job.num)
        yield np.stack([video.read(file).frames for file in files[part]]), [c.read_text().strip() for c in captions[part]]


def _keep(clips: np.ndarray, job: Job) -> None:
    for n, clip in enumerate(clips[: job.keep]):
        video.write(job.out.with_suffix("") / f"{n:02d}.mp4", clip, 16.0, quality="lossless")


def speed(address: str, prompts: Path, how: Making, num: int = 16, repeats: int = 3, max_tokens: int = 40) -> Value:
    """Clips per second, noise to pixels, on one thread; the spread is over repeats."""
    import time

    torch.set_num_threads(1)
    model = open_model(address)
    job = replace(Job(address, prompts, prompts, Path("-")), num=num, batch_size=num, max_tokens=max_tokens)
    codec = codec_of(model, job)
    data, rates = opened(job), list[float]()
    generated(model, codec, data, job, replace(how, num_steps=min(2, how.num_steps)), num, 0)  # warm
    for _ in range(repeats):
        began = time.monotonic()
        generated(model, codec, data, job, how, num, 0)
        rates.append(num / (time.monotonic() - began))
    return Value(statistics.mean(rates), statistics.stdev(rates), repeats, tuple(rates))
