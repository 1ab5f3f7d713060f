"""`fewstep evaluate`: clips of a model, of a codec, or of a folder, scored against real ones.

    fewstep evaluate MODEL --prompts heldout --real real --out scores.json       clips for the captions of a data set
    fewstep evaluate FOLDER --real real --out scores.json                        clips that are there already, in sets of --num
    fewstep evaluate PIPELINE --steps 35 --guidance 2 ...                        a teacher, by its sampler
    fewstep evaluate PIPELINE --calls 4 --guidance 2 ...                         the best a teacher does with so many calls
    fewstep evaluate STUDENT --calls 8 ...                                       a student at a number of calls not its own
    fewstep evaluate codec:FOLDER ...                                            what the codec alone does to real clips
    torchrun --nproc_per_node 8 -m fewstep evaluate MODEL ...                    divided over processes

What is scored is an `Evaluation` (evaluation.py); how a set of clips is made is in clip_sets.py; scores are those of scorers
(evaluation/score.py). Scorers that are `Divisible` measure in pieces (shares.py): a killed command goes on where it was.

The file has a protocol: all that decides a number besides the model. Two files whose protocols differ are not compared.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.config import ConfigError, dump
from fewstep.data.folder.dataset import FolderData
from fewstep.diffusion import TeacherSampler
from fewstep.diffusion.sampling import Sampler
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.evaluation.measured import Divisible, Measured, Part
from fewstep.evaluation.score import ClipSet, Record, Scorer, Value, over_sets
from fewstep.files import remove, write_json, write_tensors, write_text
from fewstep.inference import latency
from fewstep.inference.clip_sets import SEEDS, Source, keep, opened, sets_of, through
from fewstep.inference.evaluation import Evaluation, Protocol, hash_of_texts, hashes_of
from fewstep.inference.model import changed, codec_of, open_model, place_network, student_of
from fewstep.inference.ranking import best_of, named
from fewstep.inference.scorers import scorers_of
from fewstep.inference.shares import Job, Seen, Shares
from fewstep.networks.encoders.codecs import Codec, fingerprint_of, open_codec

PROTOCOL = 2  # raised when the same settings give other numbers


def run(task: Evaluation, protocol: Protocol | None = None) -> dict[str, Any] | None:
    """Scores what the task names, writes its JSON, and returns the same record; None while other processes still measure."""
    for name in ("num", "sets", "calls", "batch_size", "seeds"):
        if (value := getattr(task, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    torch.set_num_threads(1)
    _claim(task)
    task = (task if protocol is None else protocol.apply(task)).counted()
    task = replace(task, scorers=scorers_of(task))
    others = [scorer for scorer in task.scorers if not isinstance(scorer, Divisible)]
    if others and ranks().size > 1:
        raise UserError(f"--scorer {_name(others[0])}: cannot be divided over {ranks().size} processes. Start one")
    if protocol is not None:
        protocol.refuse_other_hashes(task)
    subject = _subject(task)
    task = subject.task
    folder = task.out.with_suffix("") / f"measured-{_hash(task, subject)}"
    shares = Shares(folder, ranks(), task.batch_size or 1)
    references = _references(task, shares)
    parts = [_measured(samples, shares, task, number) for number, samples in enumerate(subject.sets)]
    if references is None or any(part is None for part in parts):
        return None
    scored = [
        _scored(samples, part, references, task, number)
        for number, (samples, part) in enumerate(zip(subject.sets, parts, strict=True))
        if part is not None
    ]
    results = _results(task, subject, scored)
    _write_features(task, [one.record for one in scored])
    _keep_more(task, subject)
    Protocol.of(task).write(task.out.with_suffix("") / "protocol.yaml")
    write_json(task.out, results)
    for path in task.out.with_suffix("").glob("measured-*"):
        remove(path)
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


# ---- what is scored --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is scored: its sets of clips, and what the record says of it."""

    task: Evaluation
    sets: Sequence[ClipSet]
    fingerprint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    timed: Callable[[], Mapping[str, Any]] = dict[str, Any]  # measures its latency
    more: Callable[[int], ClipSet] | None = None  # the first two clips of a further set


def _subject(task: Evaluation) -> Subject:
    if task.is_of_clips:
        return _of_clips(task)
    if task.what.startswith("codec:"):
        return _of_codec(task)
    return _of_model(task)


def _of_clips(task: Evaluation) -> Subject:
    task.refuse_sampling("holds clips that are made already")
    sets = list(sets_of(task, any("prompts" in scorer.needs for scorer in task.scorers)))
    digest = hashlib.sha256()
    for stem, path in task.files().items():
        status = path.stat()
        digest.update(f"{stem} {status.st_size} {status.st_mtime_ns}".encode())
    return Subject(task.batched(), sets, digest.hexdigest())


def _of_codec(task: Evaluation) -> Subject:
    task.refuse_sampling("is a codec, which takes no steps")
    if task.what == "codec:":
        raise UserError("codec: which one? codec:FOLDER, of an autoencoder of diffusers or of its pipeline")
    codec = open_codec(task.what.removeprefix("codec:"), device=str(task.where))
    task = task.batched()
    return Subject(task, [through(codec, opened(task), task)], codec.fingerprint)


def _of_model(task: Evaluation) -> Subject:
    model = open_model(task.what, controls=task.controls)
    task = task.within(model.envelope)
    branches = model.network.traits.controls
    given = [name for name in task.controls if name in branches]
    if branches and not given:
        raise UserError(f"--control: {task.what} is conditioned on {', '.join(branches)}; name those that it is to receive")
    data = opened(task, reads_frames=bool(given))
    controls = {name: opened(task, reads_frames=True, control=name) for name in given}
    sampler: Sampler = model.sampler
    if not isinstance(sampler, TeacherSampler):
        sampler = student_of(sampler, task.sampling, task.calls)
    elif task.calls is not None and (names := [name for name in task.sampling.names() if name != "--guidance"]):
        raise UserError(f"--calls: finds steps, sampler and shift by itself; leave out {', '.join(names)}")
    task = task.batched()
    fingerprint = fingerprint_of(model.network.module, {}, sampled=4096)
    codec = codec_of(model, task.what, task.codec, precision=task.precision, device=str(task.where))
    _refuse_all_given(task, codec, data)
    place_network(model, task.where, task.precision)
    candidates: list[dict[str, Any]] = []
    if isinstance(sampler, TeacherSampler):
        sampler = changed(sampler, task.sampling)
        if task.calls is not None:
            ranks_by = task.scorers[0]
            reference = ranks_by.reference(task.real, _cache(task)) if task.real is not None else ranks_by.reference(None)
            source = Source(model, sampler, codec, data, controls)
            sampler, candidates = best_of(source, sampler, task, ranks_by, reference)
    source = Source(model, sampler, codec, data, controls)
    facts: dict[str, Any] = {"num_calls": sampler.num_calls, "candidates": candidates, "guidance": sampler.guidance}
    facts |= {"sampler": named(sampler)} if isinstance(sampler, TeacherSampler) else {}
    sets = [source.clips(task, task.per_set, k) for k in range(task.sets)]

    def timed() -> Mapping[str, Any]:
        if not task.latency:
            return {}
        batch, own = source.batch(torch.tensor([0])).to(task.where), replace(model, network=source.network)
        return {"latency": latency.measure(own, sampler, codec, batch, data.captions()[0], task.latency, str(task.where))}

    fingerprint = f"{fingerprint} {codec.fingerprint} {sampler}"
    return Subject(task, sets, fingerprint, facts, timed, lambda k: source.clips(task, min(2, task.per_set), k))


def _refuse_all_given(task: Evaluation, codec: Codec, data: FolderData) -> None:
    """Refuses so many given frames that nothing is left to generate."""
    x0 = data.batch(torch.tensor([0])).x0 if task.given_frames else None
    if x0 is not None and task.given_frames >= codec.shape(*x0.shape[2:])[1]:
        num = codec.shape(*x0.shape[2:])[1]
        raise ConfigError(f"--given-frames {task.given_frames}: a clip has {num} latent frames, one of which must be generated")


# ---- measuring -------------------------------------------------------------------------------------------------------


def _cache(task: Evaluation) -> Path:
    return task.out.parent / "cache"


def _name(scorer: Scorer) -> str:
    return scorer.kind  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it


def _hash(task: Evaluation, subject: Subject) -> str:
    """Over all that decides a clip and what is measured of it."""
    facts = (
        subject.fingerprint,
        _protocol(task, subject),
        task.num_frames,
        task.size,
        task.given_frames,
        task.precision,
        task.text,
    )
    return hashlib.sha256(repr((*facts, task.negative, task.max_tokens, task.mask_text)).encode()).hexdigest()[:12]


def _references(task: Evaluation, shares: Shares) -> list[Any] | None:
    """The statistics of the real clips, for every scorer; None while other processes still measure them."""
    out: list[Any] = []
    is_whole = True
    for scorer in task.scorers:
        samples = scorer.real_clips(task.real, _cache(task)) if isinstance(scorer, Divisible) and task.real else None
        if not isinstance(scorer, Divisible) or task.real is None or samples is None:
            out.append(scorer.reference(task.real, _cache(task)) if task.real is not None else scorer.reference(None))
            continue
        part = shares.measure(Job(f"real-{_name(scorer)}", samples, {_name(scorer): scorer}))
        if part is not None:
            out.append(scorer.reference_of(part.by_scorer[_name(scorer)], task.real, _cache(task)))
        is_whole = is_whole and part is not None
    return out if is_whole else None


def _measured(samples: ClipSet, shares: Shares, task: Evaluation, number: int) -> Part | None:
    """What the divisible scorers keep of a set; None while other processes still measure it."""
    scorers = {_name(scorer): scorer for scorer in task.scorers if isinstance(scorer, Divisible)}
    if not scorers:
        return Part()
    return shares.measure(Job(f"set{number}", samples, scorers, lambda row, clip: keep(clip, row, samples, task, number)))


def _keep_more(task: Evaluation, subject: Subject) -> None:
    """Keeps the first two clips from further noises, as many as --seeds asks for."""
    if subject.more is None:
        return
    for number in range(task.sets, task.seeds or 0):
        samples = subject.more(number)
        for row in range(len(samples.clips)):
            keep(samples.clips[row], row, samples, task, number)


@dataclass(frozen=True)
class _Scored:
    """What remains of a set once it is scored."""

    record: Record
    samples: ClipSet
    shapes: frozenset[tuple[int, ...]]

    def listing(self) -> dict[str, Any]:
        per_clip = {name: [_number(x) for x in column] for name, column in self.record.per_clip.items()}
        return {"stems": list(self.samples.stems), "prompts": list(self.samples.prompts), "per_clip": per_clip}


def _scored(samples: ClipSet, part: Part, references: Sequence[Any], task: Evaluation, number: int) -> _Scored:
    shapes, seen = set(part.shapes), set(part.numbers)

    def look(row: int, clip: Any) -> None:
        shapes.add(clip.shape[:3])
        if row not in seen:
            seen.add(row)
            keep(clip, row, samples, task, number)

    records: list[Record] = []
    for scorer, reference in zip(task.scorers, references, strict=True):
        if isinstance(scorer, Divisible):
            records.append(scorer.summary(part.by_scorer.get(_name(scorer), Measured()), samples, reference))
        else:
            records.append(scorer.score(replace(samples, clips=Seen(samples.clips, look)), reference))
    record = records[0]
    for other in records[1:]:
        record = record.joined(other)
    return _Scored(record, samples, frozenset(shapes))


# ---- the record ------------------------------------------------------------------------------------------------------


def _results(task: Evaluation, subject: Subject, scored: Sequence[_Scored]) -> dict[str, Any]:
    records = [one.record for one in scored]
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    values = {name: over_sets([record[name] for record in records if name in record.scores]) for name in names}
    few = [f"{len(scored)} of {task.sets} sets: {task.what} holds no more clips."] * (len(scored) < task.sets)
    shapes = sorted(list(shape) for shape in frozenset[tuple[int, ...]]().union(*(one.shapes for one in scored)))
    return {
        "what": task.what,
        **subject.facts,
        **subject.timed(),
        "scorers": [_settings(scorer) for scorer in task.scorers],
        "measured_by": records[0].name,
        "num_reference": records[0].num_reference,
        "protocol": {**_protocol(task, subject), "frames_height_width": shapes[:20]},
        "notes": sorted({*few, *(note for record in records for note in record.notes)}),
        "legend": [asdict(score) for scorer in task.scorers for score in scorer.legend if score.name in values],
        "scores": {name: _written(value) for name, value in values.items()},
        "anchors": _anchors(records),
        "sets": [one.listing() for one in scored],
    }


def _settings(scorer: Scorer) -> dict[str, Any]:
    return {"kind": _name(scorer), **dump(scorer)}


def _protocol(task: Evaluation, subject: Subject) -> dict[str, Any]:
    """All that decides the numbers but for the model and the sizes of its clips."""
    texts = [f"{stem} {prompt}" for part in subject.sets for stem, prompt in zip(part.stems, part.prompts)]
    hashes = hashes_of(task)
    return {
        "version": PROTOCOL,
        "scorers": [{**_settings(scorer), **scorer.protocol()} for scorer in task.scorers],
        "clips_per_set": task.num,
        "sets": len(subject.sets),
        "seeds": [SEEDS + k for k in range(len(subject.sets))],
        "prompts": hash_of_texts(texts),
        "real": hashes.get("real"),
        "truth": hashes.get("truth"),
        "fps": sorted({part.fps for part in subject.sets if part.fps is not None}),
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


def line(results: Mapping[str, Any]) -> str:
    """The scores one looks at first, and what makes them less than they seem."""
    shown = ((score["name"], results["scores"][score["name"]]) for score in results["legend"] if score["is_headline"])
    known = ((name, v["value"], v["spread"]) for name, v in shown if v["value"] is not None)
    text = "  ".join(f"{name} {value:.3g}" + ("" if spread is None else f" +- {spread:.2g}") for name, value, spread in known)
    return "\n".join([text, *(f"  note: {note}" for note in results["notes"])])


def speed(task: Evaluation, num: int = 16, repeats: int = 3) -> Value:
    """Clips per second, noise to pixels, on one thread; the spread is over repeats."""
    torch.set_num_threads(1)
    model = open_model(task.what)
    task = replace(task, num=num, batch_size=num)
    sampler, rates = model.sampler, list[float]()
    if isinstance(sampler, TeacherSampler):
        sampler = changed(sampler, task.sampling)
    source = Source(model, sampler, codec_of(model, task.what), opened(task))
    warm = replace(sampler, num_steps=min(2, sampler.num_steps)) if isinstance(sampler, TeacherSampler) else sampler
    replace(source, sampler=warm).generated(task, num, 0)
    for _ in range(repeats):
        began = time.monotonic()
        source.generated(task, num, 0)
        rates.append(num / (time.monotonic() - began))
    return Value(statistics.mean(rates), statistics.stdev(rates), repeats, tuple(rates))
