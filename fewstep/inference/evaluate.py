"""`fewstep evaluate`: clips of a model, of a codec, or of a folder, scored against real ones.

    fewstep evaluate demo/students/4step --prompts demo/heldout --real demo/real --out demo/scores/4step.json
    fewstep evaluate fewstep/toyworld/stack --steps 35 --guidance 2 ...     a teacher, by its sampler
    fewstep evaluate fewstep/toyworld/stack --calls 4 --guidance 2 ...      the best a teacher can do with this number of calls
    fewstep evaluate codec:fewstep/toyworld/stack ...                       what the codec alone does to real clips
    fewstep evaluate demo/pairs ...                               clips that are there already, in sets of --num

The scores are those of a scorer (evaluation/score.py): `--scorer toyworld`, `--scorer control`, or one from a file of the
user's own (`--config FILE.py`). Without `--scorer` it is the one that suits clips of this size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.config import ConfigError, apply_overrides, choices, dump, parse
from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder, FolderData
from fewstep.data.folder.layout import CAPTIONS, VIDEOS, Layout
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.sampling import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.score import AnyScorer, Clip, Record, Scorer, Signals, Value, over_sets
from fewstep.files import write_json
from fewstep.inference.model import Model, changed, codec_of, open_model
from fewstep.inference.request import SamplerOptions
from fewstep.networks.encoders.codecs import Codec, open_codec, to_uint8
from fewstep.solvers import SolverName

SEEDS = 1000  # noise of evaluation set k has seed SEEDS + k: never that of training or of pairs
RANKING = 256  # clips by which the samplers of a teacher are compared before the best one is scored


@dataclass(frozen=True)
class Evaluation:
    """What to score, against what, and where to write the record."""

    what: str
    prompts: Path | None  # data set: captions, text, controls, and real clips of the same scenes
    real: Path | None  # the clips everything is compared with; of other scenes
    out: Path  # JSON to write; first clips go beside it, OUT without its suffix
    num: int = 512  # clips in a set
    sets: int = 3
    calls: int | None = None
    sampling: SamplerOptions = SamplerOptions()  # changes to a teacher's sampler; refused where they would have no effect
    keep: int = 8  # clips of the first set that are kept to look at
    text: str = "t5_xxl"
    max_tokens: int = 40
    batch_size: int = 64
    codec: str | None = None  # None: the one beside the model
    scorer: Scorer | None = None  # None: the one that suits clips of this size
    control: str | None = None  # the control of the data set that a model is conditioned on


def run(task: Evaluation) -> dict[str, Any]:
    """Scores what the task names, writes its JSON, and returns the same record."""
    for name in ("num", "sets", "calls"):
        if (value := getattr(task, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    torch.set_num_threads(1)
    scorer = _scorer_of(task)
    results: dict[str, Any] = {"what": task.what}
    records: list[Record] = []
    if _is_clips(task.what):
        _refuse_options(task, "holds clips that are made already")
        sources = _sets_of(Path(task.what), task, scorer)
        known = _reference(task, scorer)
    elif task.what.startswith("codec:"):
        _refuse_options(task, "is a codec, which takes no steps")
        if task.what == "codec:":
            raise UserError("codec: which one? codec:FOLDER, of an autoencoder of diffusers or of its pipeline")
        codec, data, known = (
            open_codec(task.what.removeprefix("codec:")),
            opened(task),
            _reference(task, scorer),
        )
        sources = iter([_set_of(_through(codec, data, task), data, task)])
    else:
        model, data = open_model(task.what, controls=_controls(task)), opened(task)
        sampler: Sampler = model.sampler
        if not isinstance(sampler, TeacherSampler):
            _refuse_options(task, f"is a student, which takes the {len(sampler.times)} steps it was trained for")
        if task.calls is not None and (names := [name for name in task.sampling.names() if name != "--guidance"]):
            raise UserError(f"--calls: finds steps, sampler and shift by itself; leave out {', '.join(names)}")
        codec, known = codec_of(model, task.what, task.codec), _reference(task, scorer)
        candidates: list[dict[str, Any]] = []
        if isinstance(sampler, TeacherSampler):
            sampler = changed(sampler, task.sampling)
            if task.calls is not None:
                sampler, candidates = best_of(model, sampler, codec, data, task, scorer, known)
        results |= {"num_calls": sampler.num_calls, "candidates": candidates, "guidance": sampler.guidance}
        results |= {"sampler": _named(sampler)} if isinstance(sampler, TeacherSampler) else {}
        sources = (_set_of(generated(model, sampler, codec, data, task, task.num, k), data, task) for k in range(task.sets))
    for k, clips in enumerate(sources):
        if k == 0:
            _keep(clips.clips, task)
        records.append(scorer.score(clips.clips, clips.prompts, known, clips.controls))
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    values = {name: over_sets([record[name] for record in records if name in record.scores]) for name in names}
    results |= {
        "scorer": {"kind": scorer.kind, **dump(scorer)},  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it
        "measured_by": records[0].name,
        "num_reference": records[0].num_reference,
        "notes": sorted({*_few_sets(task, len(records)), *(note for record in records for note in record.notes)}),
        "legend": [asdict(score) for score in scorer.legend if score.name in values],
        "scores": {name: _written(value) for name, value in values.items()},
    }
    write_json(task.out, results)
    return results


@dataclass(frozen=True)
class _Choice:
    scorer: AnyScorer


def scorer_of(name: str | None, settings: Sequence[str] = ()) -> Scorer | None:
    """The scorer of that name with settings KEY=VALUE; None if no name is given."""
    if name is None:
        if settings:
            raise ConfigError([(settings[0], "is a setting of a scorer: say which with --scorer NAME")])
        return None
    choice = parse(_Choice, {"scorer": name})
    return apply_overrides(choice, [f"scorer.{setting}" for setting in settings]).scorer


def _scorer_of(task: Evaluation) -> Scorer:
    """The scorer of the task; raises UserError if the task lacks something it needs."""
    scorer = task.scorer
    if scorer is None:
        folder = Path(task.what) if _is_clips(task.what) else _prompts(task)
        first = next(iter(Layout.open(folder).files(VIDEOS).values()), None)
        if first is None:
            raise UserError(f"{folder}: has no videos/*.mp4, by whose size a scorer could be chosen; name one with --scorer")
        header = video.probe(first)
        size = (header.num_frames, header.height, header.width)
        kinds: dict[str, Any] = choices("scorer")
        scorer = next((kind() for kind in kinds.values() if kind().suits(*size)), None)
        if scorer is None:
            raise UserError(f"no scorer is made for clips of {' x '.join(map(str, size))}: add --scorer {' or '.join(kinds)}")
    if task.num < scorer.min_clips:
        raise UserError(f"--num {task.num}: a set needs at least {scorer.min_clips} clips, and better hundreds")
    if "real" in scorer.needs and task.real is None:
        raise UserError("--real: this scorer compares with real clips; give their folder")
    return scorer


def _prompts(task: Evaluation) -> Path:
    if task.prompts is None:
        raise UserError(f"--prompts: {task.what} is not a folder of clips; give the data set whose captions it is to follow")
    return task.prompts


def _controls(task: Evaluation) -> list[str]:
    return [] if task.control is None else [task.control]


def _refuse_options(task: Evaluation, why: str) -> None:
    """Refuses options of a teacher's sampler where they would have no effect."""
    names = ["--calls"] * (task.calls is not None) + task.sampling.names()
    if names:
        raise UserError(f"{', '.join(names)}: {task.what} {why}. Leave it out: it is for a teacher")


def _few_sets(task: Evaluation, num: int) -> list[str]:
    return [f"{num} of {task.sets} sets: {task.what} holds no more clips."] * (num < task.sets)


def _reference(task: Evaluation, scorer: Scorer) -> Any:
    return scorer.reference(task.real, task.out.parent / "cache")


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


def line(results: dict[str, Any]) -> str:
    """The scores one looks at first, and what makes them less than they seem."""
    shown = ((score["name"], results["scores"][score["name"]]) for score in results["legend"] if score["is_headline"])
    known = ((name, v["value"], v["spread"]) for name, v in shown if v["value"] is not None)
    text = "  ".join(f"{name} {value:.3g}" + ("" if spread is None else f" +- {spread:.2g}") for name, value, spread in known)
    return "\n".join([text, *(f"  note: {note}" for note in results["notes"])])


# ---- clips -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generated(
    model: Model, sampler: Sampler, codec: Codec, data: FolderData, task: Evaluation, num: int, number: int
) -> np.ndarray:
    """`num` clips of evaluation set `number`: row i from the same noise whatever the model."""
    parts: list[np.ndarray] = []
    for rows in torch.arange(num).split(task.batch_size):
        batch, rng = data.batch(rows), Rng(SEEDS + number, 0, rows)
        assert batch.x0 is not None
        noise = rng.normal(codec.shape(*batch.x0.shape[2:]))
        control = {name: codec.encode(frames) for name, frames in batch.cond.control.items()}
        cond = replace(batch.cond, control=control)
        negative = None if batch.negative is None else replace(batch.negative, control=control)
        parts.append(to_uint8(codec.decode(sampler(model.network, noise, cond, rng, negative)), task.what))
    return np.concatenate(parts)


def best_of(
    model: Model,
    sampler: TeacherSampler,
    codec: Codec,
    data: FolderData,
    task: Evaluation,
    scorer: Scorer,
    reference: Any,
) -> tuple[TeacherSampler, list[dict[str, Any]]]:
    """The way to spend `task.calls` network calls that the scorer ranks first, and its distance of each way.

    Ways are solvers, grids, and half as many steps with guidance. The ranking has noise of its own, and fewer clips.
    """
    assert task.calls is not None
    num, table = min(RANKING, task.num), list[tuple[float, TeacherSampler]]()
    ways = ways_of(task.calls, sampler)
    if len(ways) == 1:
        return ways[0], []  # nothing to choose
    for way in ways:
        clips = _set_of(generated(model, way, codec, data, task, num, task.sets), data, task)
        table.append((scorer.distance(clips.clips, clips.prompts, reference, clips.controls), way))
    table.sort(key=lambda row: row[0])
    return table[0][1], [{"sampler": _named(way), "distance": value, "n": num} for value, way in table]


def ways_of(calls: int, sampler: TeacherSampler) -> list[TeacherSampler]:
    """Ways to spend `calls` network calls, some with the guidance of `sampler` where it leaves steps enough."""
    plain = replace(sampler, grid="flow", shift=1.0, guidance=1.0)
    if calls == 1:
        return [replace(plain, solver="euler", num_steps=1)]
    # Two steps of either multistep sampler are one of Euler's and its x0: the choice among them is for more.
    multistep: tuple[SolverName, ...] = ("euler", "dpmpp_2m", "unipc")
    ways = [replace(plain, num_steps=calls, solver=name, shift=shift) for name in multistep for shift in (1.0, 3.0)]
    if sampler.grid == "karras":
        ways.append(replace(sampler, num_steps=calls - 1, guidance=1.0))
    if calls % 2:
        ways.append(replace(plain, num_steps=(calls + 1) // 2, solver="heun"))
    elif sampler.guidance != 1.0:
        few: tuple[SolverName, ...] = multistep if calls > 4 else ("unipc",)
        led = replace(plain, num_steps=calls // 2, guidance=sampler.guidance)
        ways += [replace(led, solver=name, shift=shift) for name in few for shift in (1.0, 3.0)]
    return ways


def _named(sampler: TeacherSampler) -> str:
    grid = f"shift {sampler.shift:g}" if sampler.grid == "flow" else f"grid {sampler.grid}"
    guided = f", guidance {sampler.guidance:g}" if sampler.guidance != 1.0 else ", no guidance"
    return f"{sampler.solver}, {sampler.num_steps} steps, {grid}{guided}"


def opened(task: Evaluation) -> FolderData:
    control: Any = None if task.control is None else _control_kinds((task.control,))[task.control]()
    data = Folder(
        str(_prompts(task)),
        text=task.text,
        max_tokens=task.max_tokens,
        mask_text=True,
        negative="zeros",
        control=control,
    ).open()
    if len(data) < task.num:
        raise UserError(f"--num {task.num}: {task.prompts} has {len(data)} prompts")
    return data


@torch.no_grad()
def _through(codec: Codec, data: FolderData, task: Evaluation) -> np.ndarray:
    batches = (data.batch(rows).x0 for rows in torch.arange(task.num).split(task.batch_size))
    return np.concatenate([to_uint8(codec.decode(codec.encode(pixels)), task.what) for pixels in batches if pixels is not None])


def _is_clips(what: str) -> bool:
    return (Path(what) / "videos").is_dir()


@dataclass(frozen=True)
class _ClipSet:
    """The clips of one evaluation set, and what they were made for."""

    clips: Sequence[Clip]
    prompts: Sequence[str]
    controls: Mapping[str, Signals]


def _set_of(clips: np.ndarray, data: FolderData, task: Evaluation) -> _ClipSet:
    """Clips that were made for the first samples of the data set."""
    stems = data.stems[: len(clips)]
    return _ClipSet(list(clips), data.captions()[: len(clips)], _signals(stems, data.layout, None, _controls(task)))


def _sets_of(folder: Path, task: Evaluation, scorer: Scorer) -> Iterator[_ClipSet]:
    """The folder's clips, `task.num` at a time, as many whole sets as there are, up to `task.sets`.

    Captions are the folder's own. The controls that the clips were conditioned on are those of --prompts, by file name; without
    --prompts they are the folder's own.
    """
    own = Layout.open(folder)
    theirs = own if task.prompts is None else Layout.open(task.prompts)
    files, captions = own.files(VIDEOS), own.files(CAPTIONS)
    stems = list(files)
    if len(files) < task.num or ("prompts" in scorer.needs and set(captions) != set(files)):
        raise UserError(f"{folder}: has {len(files)} clips and {len(captions)} captions; a set needs {task.num} of both")
    for k in range(min(task.sets, len(files) // task.num)):
        part = stems[k * task.num : (k + 1) * task.num]
        prompts = [captions[stem].read_text().strip() if stem in captions else "" for stem in part]
        controls = _signals(part, theirs, own if theirs != own else None, _controls(task))
        yield _ClipSet([video.read(files[stem]).frames for stem in part], prompts, controls)


def _signals(stems: Sequence[str], conditioned: Layout, measured: Layout | None, names: Sequence[str]) -> dict[str, Signals]:
    """The control files of these clips, of the named controls or of all that the data set has."""
    found: dict[str, Signals] = {}
    for name, cls in _control_kinds(names).items():
        part = layout.control(cls.folder, cls.suffix)
        theirs = conditioned.files(part)
        own = {} if measured is None else measured.files(part)
        if theirs.keys() & set(stems):
            found[name] = Signals(cls(), [theirs.get(stem) for stem in stems], [own.get(stem) for stem in stems])
    return found


def _control_kinds(names: Sequence[str]) -> dict[str, Any]:
    kinds: dict[str, Any] = choices("control")
    for name in names:
        if name not in kinds:
            raise UserError(f"--control {name}: there are {', '.join(kinds)}")
    return {name: kinds[name] for name in names or kinds}


def _keep(clips: Sequence[Clip], task: Evaluation) -> None:
    for n, clip in enumerate(clips[: task.keep]):
        video.write(task.out.with_suffix("") / f"{n:02d}.mp4", clip, 16.0, quality="lossless")


def speed(
    address: str,
    prompts: Path,
    sampling: SamplerOptions | None = None,
    num: int = 16,
    repeats: int = 3,
    max_tokens: int = 40,
) -> Value:
    """Clips per second, noise to pixels, on one thread; the spread is over repeats."""
    import time

    torch.set_num_threads(1)
    model = open_model(address)
    task = replace(Evaluation(address, prompts, prompts, Path("-")), num=num, batch_size=num, max_tokens=max_tokens)
    codec, sampler = codec_of(model, address), model.sampler
    data, rates = opened(task), list[float]()
    if isinstance(sampler, TeacherSampler):
        sampler = changed(sampler, sampling or SamplerOptions())
    warm = replace(sampler, num_steps=min(2, sampler.num_steps)) if isinstance(sampler, TeacherSampler) else sampler
    generated(model, warm, codec, data, task, num, 0)
    for _ in range(repeats):
        began = time.monotonic()
        generated(model, sampler, codec, data, task, num, 0)
        rates.append(num / (time.monotonic() - began))
    return Value(statistics.mean(rates), statistics.stdev(rates), repeats, tuple(rates))
