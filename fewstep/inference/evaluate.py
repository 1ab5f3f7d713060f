"""`fewstep evaluate`: clips of a model, of a codec, or of a folder, scored against real ones.

    fewstep evaluate MODEL --prompts heldout --real real --out scores.json       clips for the captions of a data set
    fewstep evaluate FOLDER --real real --out scores.json                        clips that are there already, in sets of --num
    fewstep evaluate PIPELINE --steps 35 --guidance 2 ...                        a teacher, by its sampler
    fewstep evaluate PIPELINE --calls 4 --guidance 2 ...                         the best a teacher does with so many calls
    fewstep evaluate codec:FOLDER ...                                            what the codec alone does to real clips

The scores are those of a scorer (evaluation/score.py): `clips` for clips of any kind, `toyworld`, `control`, or one from a file
of the user's own (`--config FILE.py`). Without `--scorer` it is `clips`; for clips and captions of the toy world, `toyworld`.

The file has a protocol: all that decides a number besides the model. Two files whose protocols differ are not compared.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import first_frames
from fewstep.config import ConfigError, apply_overrides, choices, dump, parse
from fewstep.data.controls import Span
from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder, FolderData
from fewstep.data.folder.layout import CAPTIONS, IMAGES, VIDEOS, Layout
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.sampling import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.clips import AnyClips, Files, clip_files, content_hash, video_files
from fewstep.evaluation.features.contract import resized
from fewstep.evaluation.fidelity import ControlFidelity
from fewstep.evaluation.score import AnyScorer, Clip, ClipSet, Record, Scorer, Signals, Value, over_sets
from fewstep.files import write_json, write_tensors, write_text
from fewstep.inference import latency
from fewstep.inference.card import Envelope
from fewstep.inference.model import Model, changed, codec_of, open_model, place_network
from fewstep.inference.request import SamplerOptions
from fewstep.networks.encoders.codecs import Codec, open_codec, to_uint8
from fewstep.parallel import device_of
from fewstep.solvers import SolverName

SEEDS = 1000  # noise of evaluation set k has seed SEEDS + k: never that of training or of pairs
RANKING = 256  # clips by which the samplers of a teacher are compared before the best one is scored
_KEPT = 2 << 30  # bytes of a set's generated clips that stay in memory; beyond, they are generated again if asked for again


@dataclass(frozen=True)
class Evaluation:
    """What to score, against what, and where to write the record."""

    what: str
    prompts: Path | None  # data set: captions, text, controls, and real clips of the same scenes
    real: Path | str | None  # the clips everything is compared with, of other scenes: a folder, or a pattern like real/*.mp4
    out: Path  # JSON to write; first clips go beside it, OUT without its suffix
    num: int | None = None  # clips in a set; None: 512, or as many as there are
    sets: int = 3
    calls: int | None = None
    sampling: SamplerOptions = SamplerOptions()  # changes to a teacher's sampler; refused where they would have no effect
    keep: int = 8  # clips of the first set that are kept to look at
    text: str | None = "t5_xxl"
    negative: str | None = "zeros"
    max_tokens: int = 512
    mask_text: bool = False
    num_frames: int | None = None  # of every clip; None: as the model was trained, or as the files are
    size: tuple[int, int] | None = None  # height, width of the clips that a model makes; None: likewise
    given_frames: int = 0  # clean latent frames of the data set's own clip that the model receives
    batch_size: int = 64
    codec: str | None = None  # None: the one beside the model
    scorer: Scorer | None = None  # None: `clips`, or the one that suits these clips
    controls: tuple[str, ...] = ()  # of the data set: scored, and the one that a model has a branch for is given to it
    truth: Path | None = None  # clips of the same names that each one should equal
    precision: str = "fp32"
    device: str | None = None
    latency: int = 0  # timed repetitions of one clip, stage by stage; 0: none

    @property
    def per_set(self) -> int:
        assert self.num is not None, "counted by `run`"
        return self.num


def run(task: Evaluation) -> dict[str, Any]:
    """Scores what the task names, writes its JSON, and returns the same record."""
    for name in ("num", "sets", "calls"):
        if (value := getattr(task, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    torch.set_num_threads(1)
    _claim(task)
    task = replace(task, num=_num(task))
    scorers = _scorers_of(task)
    ranks_by = scorers[0]
    results: dict[str, Any] = {"what": task.what}
    if _is_clips(task.what):
        _refuse_options(task, "holds clips that are made already")
        sources = _sets_of(task, any("prompts" in scorer.needs for scorer in scorers))
        references = [_reference(task, scorer) for scorer in scorers]
    elif task.what.startswith("codec:"):
        _refuse_options(task, "is a codec, which takes no steps")
        if task.what == "codec:":
            raise UserError("codec: which one? codec:FOLDER, of an autoencoder of diffusers or of its pipeline")
        codec, data = open_codec(task.what.removeprefix("codec:"), device=_device(task)), opened(task)
        references = [_reference(task, scorer) for scorer in scorers]
        sources = iter([_set_of(Made(_through(codec, data, task), task.per_set, task.batch_size), data, task, data.layout)])
    else:
        model = open_model(task.what, controls=task.controls[:1])
        task = _within(task, model.envelope)
        branches = model.network.traits.controls
        data = opened(task, next((name for name in task.controls if name in branches), None))
        sampler: Sampler = model.sampler
        if not isinstance(sampler, TeacherSampler):
            _refuse_options(task, f"is a student, which takes the {len(sampler.times)} steps it was trained for")
        if task.calls is not None and (names := [name for name in task.sampling.names() if name != "--guidance"]):
            raise UserError(f"--calls: finds steps, sampler and shift by itself; leave out {', '.join(names)}")
        codec = codec_of(model, task.what, task.codec, precision=task.precision, device=_device(task))
        _refuse_all_given(task, codec, data)
        place_network(model, torch.device(_device(task)), task.precision)
        references = [_reference(task, scorer) for scorer in scorers]
        candidates: list[dict[str, Any]] = []
        if isinstance(sampler, TeacherSampler):
            sampler = changed(sampler, task.sampling)
            if task.calls is not None:
                sampler, candidates = best_of(model, sampler, codec, data, task, ranks_by, references[0])
        results |= {"num_calls": sampler.num_calls, "candidates": candidates, "guidance": sampler.guidance}
        if task.latency:
            results["latency"] = measured_latency(model, sampler, codec, data, task)
        results |= {"sampler": _named(sampler)} if isinstance(sampler, TeacherSampler) else {}
        sources = (_made(model, sampler, codec, data, task, task.per_set, k) for k in range(task.sets))
    parts = [_scored(samples, scorers, references, task, k) for k, samples in enumerate(sources)]
    records = [part.record for part in parts]
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    values = {name: over_sets([record[name] for record in records if name in record.scores]) for name in names}
    results |= {
        "scorers": [_settings(scorer) for scorer in scorers],
        "measured_by": records[0].name,
        "num_reference": records[0].num_reference,
        "protocol": _protocol(task, scorers, parts),
        "notes": sorted({*_few_sets(task, len(records)), *(note for record in records for note in record.notes)}),
        "legend": [asdict(score) for scorer in scorers for score in scorer.legend if score.name in values],
        "scores": {name: _written(value) for name, value in values.items()},
        "anchors": _anchors(records),
        "sets": [part.listing() for part in parts],
    }
    _write_features(task, records)
    write_json(task.out, results)
    return results


_MARK = ".of_scores"  # in the folder of the clips to look at


def _claim(task: Evaluation) -> None:
    """Makes the folder of the clips to look at; refuses one that holds something else, the user's own clips for instance."""
    folder = task.out.with_suffix("")
    if folder == task.out:
        raise UserError(f"--out {task.out}: give a file with the suffix .json; clips to look at go into a folder of that name")
    is_ours = (folder / _MARK).is_file() or task.out.is_file()
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise UserError(f"--out {task.out}: clips to look at would go into {folder}, which holds others. Choose another name")
    write_text(folder / _MARK, f"{task.out.name}\n")


@dataclass(frozen=True)
class _Part:
    """What remains of a set once it is scored."""

    record: Record
    stems: Sequence[str]
    prompts: Sequence[str]
    shapes: frozenset[tuple[int, ...]]
    fps: float | None

    def listing(self) -> dict[str, Any]:
        per_clip = {name: [_number(x) for x in column] for name, column in self.record.per_clip.items()}
        return {"stems": list(self.stems), "prompts": list(self.prompts), "per_clip": per_clip}


def _scored(samples: ClipSet, scorers: Sequence[Scorer], references: Sequence[Any], task: Evaluation, number: int) -> _Part:
    seen = _Seen(samples.clips)
    _keep(seen, samples, task, number)
    samples = replace(samples, clips=seen)
    records = [scorer.score(samples, reference) for scorer, reference in zip(scorers, references, strict=True)]
    record = records[0]
    for other in records[1:]:
        record = record.joined(other)
    return _Part(record, samples.stems, samples.prompts, frozenset(seen.shapes), samples.fps)


class _Seen(Sequence[Clip]):
    """Clips, and the shapes of those that were asked for."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._clips, self.shapes = clips, set[tuple[int, ...]]()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, place: Any) -> Any:  # Any: a number or a slice
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        clip = self._clips[place]
        self.shapes.add(clip.shape[:3])
        return clip


# ---- the protocol ----------------------------------------------------------------------------------------------------

PROTOCOL = 1  # raised when the same settings give other numbers


def _settings(scorer: Scorer) -> dict[str, Any]:
    return {"kind": scorer.kind, **dump(scorer)}  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it


def _protocol(task: Evaluation, scorers: Sequence[Scorer], parts: Sequence[_Part]) -> dict[str, Any]:
    """All that decides the numbers but for the model."""
    texts = [f"{stem} {prompt}" for part in parts for stem, prompt in zip(part.stems, part.prompts)]
    return {
        "version": PROTOCOL,
        "scorers": [{**_settings(scorer), **scorer.protocol()} for scorer in scorers],
        "clips_per_set": task.num,
        "sets": len(parts),
        "seeds": [SEEDS + k for k in range(len(parts))],
        "prompts": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        "real": None if task.real is None else content_hash(list(clip_files(task.real).values())),
        "truth": None if task.truth is None else content_hash(list(clip_files(task.truth).values())),
        "frames_height_width": sorted(list(shape) for shape in {shape for part in parts for shape in part.shapes})[:20],
        "fps": sorted({part.fps for part in parts if part.fps is not None}),
        "controls": list(task.controls),
    }


def _anchors(records: Sequence[Record]) -> dict[str, Any]:
    """Scores of known clips by what they are: of several sets, the mean."""
    out: dict[str, Any] = {}
    for title in dict.fromkeys(title for record in records for title in record.anchors):
        columns = [record.anchors[title] for record in records if title in record.anchors]
        names = dict.fromkeys(name for column in columns for name in column)
        out[title] = {name: _written(over_sets([column[name] for column in columns if name in column])) for name in names}
    return out


def _write_features(task: Evaluation, records: Sequence[Record]) -> None:
    """Features of the clips, from which differences between two models are computed clip by clip."""
    tensors = {f"{k}/{name}": rows for k, record in enumerate(records) for name, rows in record.features.items()}
    if tensors:
        write_tensors(task.out.with_suffix("") / "features.safetensors", tensors)


@dataclass(frozen=True)
class _Choice:
    scorer: AnyScorer


def scorer_of(name: str | None, settings: Sequence[str] = (), features: str | None = None) -> Scorer | None:
    """The scorer of that name with settings KEY=VALUE; None if nothing says which.

    features: feature networks of the scorer `clips`, NAME or NAME=FILE, separated by commas.
    """
    if features is not None:
        if name not in (None, "clips"):
            raise ConfigError(f"--features is for the scorer clips, not for {name}")
        name = "clips"
    if name is None:
        if settings:
            raise ConfigError([(settings[0], "is a setting of a scorer: say which with --scorer NAME")])
        return None
    value: dict[str, Any] = {"kind": name}
    if features is not None:
        parts = [part.strip().partition("=") for part in features.split(",")]
        value["features"] = [{"kind": kind, **({"weights": file} if file else {})} for kind, _, file in parts]
    choice = parse(_Choice, {"scorer": value})
    return apply_overrides(choice, [f"scorer.{setting}" for setting in settings]).scorer


def _scorers_of(task: Evaluation) -> tuple[Scorer, ...]:
    """The scorers of the task; raises UserError if it lacks something that one of them needs."""
    if task.scorer is not None:
        scorers: tuple[Scorer, ...] = (task.scorer,)
    else:
        fidelity = (ControlFidelity(),) if task.controls else ()
        scorers = fidelity if fidelity and task.real is None else (_suitable(task), *fidelity)
    _control_kinds(task.controls)
    for scorer in scorers:
        if task.per_set < scorer.min_clips:
            raise UserError(f"--num {task.num}: a set needs at least {scorer.min_clips} clips, and better hundreds")
        if "real" in scorer.needs and task.real is None:
            raise UserError("--real: this scorer compares with real clips; give their folder")
    return scorers


def _suitable(task: Evaluation) -> Scorer:
    """The scorer that was made for clips like these, or the one for clips of any kind."""
    files = _files_of(task)
    stem, first = next(iter(files.items()))
    folder = Path(task.what) if _is_clips(task.what) else _prompts(task)
    captions = Layout.open(folder).files(CAPTIONS) if _is_data_set(folder) else {}
    texts = (captions[stem].read_text().strip(),) if stem in captions else ()
    kinds: dict[str, Any] = choices("scorer")
    return next((kind() for kind in kinds.values() if kind().suits(video.probe(first), texts)), AnyClips())


def _files_of(task: Evaluation) -> dict[str, Path]:
    """The clips to be scored, or the real clips of the prompts; refuses none."""
    where = task.what if _is_clips(task.what) else _prompts(task)
    files = clip_files(where)
    if not files:
        raise UserError(f"{where}: has no videos/*.mp4")
    return files


def _num(task: Evaluation) -> int:
    """Clips in a set: as asked for, or 512, or as many as there are."""
    return min(512, len(_files_of(task))) if task.num is None else task.num


def _device(task: Evaluation) -> str:
    return device_of(task.device)


def _within(task: Evaluation, envelope: Envelope) -> Evaluation:
    """The task with the frames and the size that the model was trained on, where neither is asked for."""
    size = (envelope.height, envelope.width) if envelope.height and envelope.width else None
    return replace(task, num_frames=task.num_frames or envelope.num_frames, size=task.size or size)


def _prompts(task: Evaluation) -> Path:
    if task.prompts is None:
        raise UserError(f"--prompts: {task.what} is not a folder of clips; give the data set whose captions it is to follow")
    return task.prompts


def _refuse_options(task: Evaluation, why: str) -> None:
    """Refuses options of a teacher's sampler where they would have no effect."""
    names = ["--calls"] * (task.calls is not None) + task.sampling.names()
    if names:
        raise UserError(f"{', '.join(names)}: {task.what} {why}. Leave it out: it is for a teacher")


def _refuse_all_given(task: Evaluation, codec: Codec, data: FolderData) -> None:
    """Refuses so many given frames that nothing is left to generate."""
    x0 = data.batch(torch.tensor([0])).x0 if task.given_frames else None
    if x0 is not None and task.given_frames >= codec.shape(*x0.shape[2:])[1]:
        num = codec.shape(*x0.shape[2:])[1]
        raise ConfigError(f"--given-frames {task.given_frames}: a clip has {num} latent frames, one of which must be generated")


def _few_sets(task: Evaluation, num: int) -> list[str]:
    return [f"{num} of {task.sets} sets: {task.what} holds no more clips."] * (num < task.sets)


def _reference(task: Evaluation, scorer: Scorer) -> Any:
    return scorer.reference(task.real, task.out.parent / "cache") if task.real is not None else scorer.reference(None)


def _number(x: float) -> float | None:
    """As JSON, which knows no nan: null is what could not be measured."""
    return x if math.isfinite(x) else None


def _written(value: Value) -> dict[str, Any]:
    return {
        "value": _number(value.value),
        "spread": _number(value.spread),
        "interval": [_number(x) for x in value.interval()],
        "num": value.num,
        "per_set": [_number(x) for x in value.per_set],
    }


def line(results: dict[str, Any]) -> str:
    """The scores one looks at first, and what makes them less than they seem."""
    shown = ((score["name"], results["scores"][score["name"]]) for score in results["legend"] if score["is_headline"])
    known = ((name, v["value"], v["spread"]) for name, v in shown if v["value"] is not None)
    text = "  ".join(f"{name} {value:.3g}" + ("" if spread is None else f" +- {spread:.2g}") for name, value, spread in known)
    return "\n".join([text, *(f"  note: {note}" for note in results["notes"])])


# ---- clips -----------------------------------------------------------------------------------------------------------


class Made(Sequence[Clip]):
    """Clips that are generated, a batch at a time, when they are asked for; as many stay in memory as fit into 2 GiB."""

    def __init__(self, make: Callable[[Tensor], np.ndarray], num: int, batch_size: int) -> None:
        self._make, self._num, self._batch_size = make, num, batch_size
        self._batches: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, place: Any) -> Any:  # Any: a number or a slice
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(self._num))]
        if not 0 <= place < self._num:
            raise IndexError(place)
        number, row = divmod(place, self._batch_size)
        if number not in self._batches:
            first = number * self._batch_size
            batch = self._make(torch.arange(first, min(first + self._batch_size, self._num)))
            if sum(other.nbytes for other in self._batches.values()) + batch.nbytes > _KEPT:
                self._batches.clear()
            self._batches[number] = batch
        return self._batches[number][row]


def _maker(
    model: Model, sampler: Sampler, codec: Codec, data: FolderData, task: Evaluation, number: int
) -> Callable[[Tensor], np.ndarray]:
    """What generates rows of evaluation set `number`: each from the same noise whatever the model."""

    @torch.no_grad()
    def make(rows: Tensor) -> np.ndarray:
        device = _device(task)
        batch, rng = data.batch(rows).to(device), Rng(SEEDS + number, 0, rows, device)
        assert batch.x0 is not None
        noise = rng.normal(codec.shape(*batch.x0.shape[2:]))
        control = {name: codec.encode(frames) for name, frames in batch.cond.control.items()}
        cond = replace(batch.cond, control=control)
        if task.given_frames:
            mask = first_frames(torch.full((len(rows),), task.given_frames, device=device), noise.shape[2]).to(noise.dtype)
            cond = model.network.given(cond, codec.encode(batch.x0), mask)
        negative = (
            None if batch.negative is None else replace(cond, text=batch.negative.text, text_mask=batch.negative.text_mask)
        )
        return to_uint8(codec.decode(sampler(model.network, noise, cond, rng, negative)), task.what)

    return make


def generated(
    model: Model, sampler: Sampler, codec: Codec, data: FolderData, task: Evaluation, num: int, number: int
) -> np.ndarray:
    """`num` clips of evaluation set `number`, all in memory."""
    make = _maker(model, sampler, codec, data, task, number)
    return np.concatenate([make(rows) for rows in torch.arange(num).split(task.batch_size)])


def _made(model: Model, sampler: Sampler, codec: Codec, data: FolderData, task: Evaluation, num: int, number: int) -> ClipSet:
    return _set_of(Made(_maker(model, sampler, codec, data, task, number), num, task.batch_size), data, task)


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
    num, table = min(RANKING, task.per_set), list[tuple[float, TeacherSampler]]()
    ways = ways_of(task.calls, sampler)
    if len(ways) == 1:
        return ways[0], []  # nothing to choose
    for way in ways:
        table.append((scorer.distance(_made(model, way, codec, data, task, num, task.sets), reference), way))
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


def opened(task: Evaluation, control: str | None = None) -> FolderData:
    """The data set of the prompts: the first `num_frames` frames of each clip, at the size of the task.

    control: what of the data set's the model receives.
    """
    folder = _prompts(task)
    header = video.probe(next(iter(_files_of(task).values())))
    data = Folder(
        str(folder),
        text=task.text,
        max_tokens=task.max_tokens,
        mask_text=task.mask_text,
        negative=task.negative,
        control=None if control is None else _control_kinds((control,))[control](),
        num_frames=None if task.num_frames in (None, header.num_frames) else task.num_frames,
        start_frame_interval=1 if task.num_frames in (None, header.num_frames) else 1 << 30,  # one window of each clip
        video_size=None if task.size in (None, header.size) else task.size,
    ).open()
    if len(data) < task.per_set:
        raise UserError(f"--num {task.num}: {task.prompts} has {len(data)} prompts")
    return data


def _through(codec: Codec, data: FolderData, task: Evaluation) -> Callable[[Tensor], np.ndarray]:
    @torch.no_grad()
    def make(rows: Tensor) -> np.ndarray:
        pixels = data.batch(rows).x0
        assert pixels is not None
        return to_uint8(codec.decode(codec.encode(pixels.to(_device(task)))), task.what)

    return make


def _is_data_set(folder: Path) -> bool:
    return any((folder / part.folder).is_dir() for part in (VIDEOS, IMAGES))


def _is_clips(what: str) -> bool:
    """Whether this is no model: a data set, a folder of mp4, or a pattern like clips/*.mp4."""
    folder = Path(what)
    return _is_data_set(folder) or "*" in what or (not (folder / "model_index.json").is_file() and bool(video_files(folder)))


def _set_of(clips: Sequence[Clip], data: FolderData, task: Evaluation, truth: Layout | None = None) -> ClipSet:
    """Clips that were made for the first samples of the data set."""
    stems = data.stems[: len(clips)]
    files = {} if truth is None else clip_files(truth.root)
    files = files if task.truth is None else clip_files(task.truth)
    own = data.layout.files(VIDEOS)
    fps = data.batch(torch.tensor([0])).cond.fps
    return ClipSet(
        clips,
        stems,
        data.captions()[: len(clips)],
        _signals(stems, data.layout, None, task.controls),
        _truth(stems, files, task),
        [own.get(stem) for stem in stems],
        None if fps is None else round(float(fps[0]), 3),
    )


def _truth(stems: Sequence[str], files: Mapping[str, Path], task: Evaluation) -> list[Path | None]:
    """The clip that each one should equal; refuses a folder that has none of them."""
    found = [files.get(stem) for stem in stems]
    if task.truth is not None and not any(found):
        raise UserError(f"--truth: {task.truth} has no clip named like those that are scored, {stems[0]} for instance")
    return found if any(found) else []


def _sets_of(task: Evaluation, needs_captions: bool) -> Iterator[ClipSet]:
    """The clips of the folder, `task.num` at a time, as many whole sets as there are, up to `task.sets`.

    Captions are the folder's own. The controls that the clips were conditioned on are those of --prompts, by file name; without
    --prompts they are the folder's own.
    """
    folder, files = Path(task.what), clip_files(task.what)
    own = Layout.open(folder) if _is_data_set(folder) else None
    theirs = own if task.prompts is None else Layout.open(task.prompts)
    captions = {} if own is None else own.files(CAPTIONS)
    if len(files) < task.per_set or (needs_captions and set(captions) != set(files)):
        raise UserError(f"{folder}: has {len(files)} clips and {len(captions)} captions; a set needs {task.num} of both")
    truth = {} if task.truth is None else clip_files(task.truth)
    sources = {} if task.prompts is None or theirs is None else theirs.files(VIDEOS)
    stems = list(files)
    for k in range(min(task.sets, len(files) // task.per_set)):
        part = stems[k * task.per_set : (k + 1) * task.per_set]
        prompts = [captions[stem].read_text().strip() if stem in captions else "" for stem in part]
        controls = {} if theirs is None else _signals(part, theirs, own if theirs != own else None, task.controls)
        clips = Files([files[stem] for stem in part], task.num_frames)
        fps = round(video.probe(files[part[0]]).fps, 3) or None
        yield ClipSet(clips, part, prompts, controls, _truth(part, truth, task), [sources.get(stem) for stem in part], fps)


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


def _keep(clips: Sequence[Clip], samples: ClipSet, task: Evaluation, number: int) -> None:
    """Writes clips to look at beside OUT: NN.mp4, their real clips and controls; of further sets two, as NN.seedK.mp4."""
    folder, fps = task.out.with_suffix(""), samples.fps or 16.0
    if number:
        for n in range(min(2, task.keep, len(clips))):
            video.write(folder / f"{n:02d}.seed{number}.mp4", clips[n], fps, quality="lossless")
        return
    for n in range(min(task.keep, len(clips))):
        clip = clips[n]
        video.write(folder / f"{n:02d}.mp4", clip, fps, quality="lossless")
        source = samples.sources[n] if samples.sources else None
        if source is not None and source.is_file():
            real = resized(video.read(source).frames[: len(clip)], *clip.shape[1:3])
            video.write(folder / f"{n:02d}.real.mp4", real, fps, quality="lossless")
        for name, signals in samples.controls.items():
            target = signals.conditioned[n]
            if target is not None and name in task.controls:
                signal = signals.control.read(target, Span(0, len(clip)), (clip.shape[1], clip.shape[2]))
                video.write(folder / f"{n:02d}.{name}.mp4", signal, fps, quality="lossless")


def measured_latency(model: Model, sampler: Sampler, codec: Codec, data: FolderData, task: Evaluation) -> dict[str, Any]:
    """Seconds of one clip, stage by stage, after one clip to warm up; see latency.py."""
    prompt = data.captions()[0]
    batch = data.batch(torch.tensor([0])).to(_device(task))
    return latency.measure(model, sampler, codec, batch, prompt, task.latency, _device(task))


def speed(task: Evaluation, num: int = 16, repeats: int = 3) -> Value:
    """Clips per second, noise to pixels, on one thread; the spread is over repeats."""
    import time

    torch.set_num_threads(1)
    model = open_model(task.what)
    task = replace(task, num=num, batch_size=num)
    codec, sampler = codec_of(model, task.what), model.sampler
    data, rates = opened(task), list[float]()
    if isinstance(sampler, TeacherSampler):
        sampler = changed(sampler, task.sampling)
    warm = replace(sampler, num_steps=min(2, sampler.num_steps)) if isinstance(sampler, TeacherSampler) else sampler
    generated(model, warm, codec, data, task, num, 0)
    for _ in range(repeats):
        began = time.monotonic()
        generated(model, sampler, codec, data, task, num, 0)
        rates.append(num / (time.monotonic() - began))
    return Value(statistics.mean(rates), statistics.stdev(rates), repeats, tuple(rates))
