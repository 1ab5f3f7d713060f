"""`fewstep evaluate`: clips of a model, of a codec, or of a folder, scored against real ones.

    fewstep evaluate MODEL --prompts heldout --real real --out scores.json       clips for the captions of a data set
    fewstep evaluate FOLDER --real real --out scores.json                        clips that are there already, in sets of --num
    fewstep evaluate PIPELINE --steps 35 --guidance 2 ...                        a teacher, by its sampler
    fewstep evaluate PIPELINE --calls 4 --guidance 2 ...                         the best a teacher does with so many calls
    fewstep evaluate STUDENT --calls 8 ...                                       a student at a number of calls not its own
    fewstep evaluate codec:FOLDER ...                                            what the codec alone does to real clips
    torchrun --nproc_per_node 8 -m fewstep evaluate MODEL ...                    divided over processes

The request, its protocol and its scorers are in evaluation.py; what is scored, and how its clips are generated or read, is in
clip_sets.py; here it is measured and written. Scorers that are `Divisible` measure in pieces (evaluation/measured.py): a killed
command goes on where it was. Plain ones, the toy world's for instance, need all clips of a set in one process.

The file has a protocol: all that decides a number besides the model. Two files whose protocols differ are not compared.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fewstep.config import dump
from fewstep.diffusion import TeacherSampler
from fewstep.environment import Ranks, ranks
from fewstep.errors import UserError
from fewstep.evaluation.measured import Divisible, Job, Measured, Part, Shares, Watch
from fewstep.evaluation.score import ClipSet, Record, Scorer, Value, over_sets
from fewstep.files import remove, write_json, write_text
from fewstep.inference.clip_sets import SEEDS, Source, Subject, keep, opened, subject_of
from fewstep.inference.evaluation import Evaluation, Protocol, hash_of_texts, hashes_of, scorers_of
from fewstep.inference.model import changed, codec_of, open_model

_PIECE = 16  # real clips that are measured together, where the clips of a model are not counted yet
PROTOCOL = 2  # raised when the same settings give other numbers


def run(task: Evaluation, protocol: Protocol | None = None) -> dict[str, Any] | None:
    """Scores what the task names, writes its JSON, and returns the same record; None while other processes still measure."""
    for name in ("num", "sets", "calls", "batch_size", "seeds"):
        if (value := getattr(task, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    torch.set_num_threads(1)
    _claim(task)
    task = (task if protocol is None else protocol.apply(task)).with_num()
    task = replace(task, scorers=scorers_of(task))
    others = [scorer for scorer in task.scorers if not isinstance(scorer, Divisible)]
    if others and ranks().size > 1:
        raise UserError(f"--scorer {_name(others[0])}: cannot be divided over {ranks().size} processes. Start one")
    if protocol is not None:
        protocol.refuse_other_hashes(task)
    task.refuse_bad_clips()
    subject = subject_of(task, lambda: _reference(task.scorers[0], task, Ranks(0, 1, 0)))
    task = subject.task
    shares = Shares(task.out.with_suffix("") / f"measured-{_hash(task, subject)}", ranks(), task.batch_size or 1)
    references = [_reference(scorer, task, ranks()) for scorer in task.scorers]
    parts = [_part(samples, shares, task, number) for number, samples in enumerate(subject.sets)]
    if any(one is _UNKNOWN for one in references) or any(part is None for part in parts):
        return None
    scored = [
        _scored(samples, part, references, task, number)
        for number, (samples, part) in enumerate(zip(subject.sets, parts, strict=True))
        if part is not None
    ]
    results = _results(task, subject, scored)
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
    # In this order: another process of the same scores writes the mark before it writes clips.
    has_files = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if has_files and not ((folder / _MARK).is_file() or task.out.is_file()):
        raise UserError(
            f"--out {task.out}: clips to look at would go into {folder}, which holds others. Give another name, "
            f"{task.out.parent / 'scores' / task.out.name} for instance"
        )
    write_text(folder / _MARK, f"{task.out.name}\n")


# ---- measuring -------------------------------------------------------------------------------------------------------


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


_UNKNOWN = object()  # a reference that other processes still measure


def _reference(scorer: Scorer, task: Evaluation, own: Ranks) -> Any:
    """The statistics of the real clips for a scorer; _UNKNOWN while other processes still measure them."""
    cache = task.out.parent / "cache"
    samples = scorer.real_clips(task.real) if isinstance(scorer, Divisible) and task.real is not None else None
    if not isinstance(scorer, Divisible) or task.real is None or samples is None:
        return scorer.reference(task.real, cache)
    facts = repr((PROTOCOL, scorer, dict(scorer.protocol()), hashes_of(task)["real"]))
    name = f"{_name(scorer)}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    part = Shares(cache, own, task.batch_size or _PIECE).measure_once(Job(name, samples, {_name(scorer): scorer}))
    return _UNKNOWN if part is None else scorer.reference_of(part.by_scorer[_name(scorer)], task.real)


def _part(samples: ClipSet, shares: Shares, task: Evaluation, number: int) -> Part | None:
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
    shapes, numbers = set(part.shapes), set(part.numbers)

    def look(row: int, clip: Any) -> None:
        shapes.add(clip.shape[:3])
        if row not in numbers:
            numbers.add(row)
            keep(clip, row, samples, task, number)

    records: list[Record] = []
    for scorer, reference in zip(task.scorers, references, strict=True):
        if isinstance(scorer, Divisible):
            records.append(scorer.summary(part.by_scorer.get(_name(scorer), Measured()), samples, reference))
        else:
            records.append(scorer.score(replace(samples, clips=Watch(samples.clips, look)), reference))
    record = records[0]
    for other in records[1:]:
        record = record.joined(other)
    return _Scored(record, samples, frozenset(shapes))


# ---- the record ------------------------------------------------------------------------------------------------------


def _results(task: Evaluation, subject: Subject, scored: Sequence[_Scored]) -> dict[str, Any]:
    records = [one.record for one in scored]
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    values = {name: over_sets([record[name] for record in records if name in record.scores]) for name in names}
    few: list[str] = []
    num, num_scored = len(task.files()) if task.is_of_clips else 0, len(scored) * task.per_set
    if len(scored) < task.sets and num != task.per_set:  # one set of all clips is what one gets without --num and --sets
        few.append(f"{len(scored)} of {task.sets} sets: {task.what} holds no more clips.")
    if num_scored < num:
        few.append(f"{num_scored} of {num} clips are scored; all are with --num {num} --sets 1.")
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
        "scores": {name: _entry(value) | {"draws": value.draws} for name, value in values.items()},
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
        "fps": sorted({rate for part in subject.sets for rate in part.rates}),
        "controls": list(task.controls),
    }


def _anchors(records: Sequence[Record]) -> dict[str, Any]:
    """Scores of known clips by what they are: of several sets, the mean."""
    out: dict[str, Any] = {}
    for title in dict.fromkeys(title for record in records for title in record.anchors):
        columns = [record.anchors[title] for record in records if title in record.anchors]
        names = dict.fromkeys(name for column in columns for name in column)
        out[title] = {name: _entry(over_sets([column[name] for column in columns if name in column])) for name in names}
    return out


def _number(x: float) -> float | None:
    """As JSON, which knows no nan: null is what could not be measured."""
    return x if math.isfinite(x) else None


def _entry(value: Value) -> dict[str, Any]:
    return {
        "value": _number(value.value),
        "spread": _number(value.spread),
        "interval": [_number(x) for x in value.interval()],
        "num": value.num,
        "per_set": [_number(x) for x in value.per_set],
    }


def line(results: Mapping[str, Any]) -> str:
    """The scores one looks at first; below them the same of known clips, and what makes them less than they seem."""
    names = [score["name"] for score in results["legend"] if score["is_headline"]]
    anchors = [f"  {title}: {text}" for title, scores in results["anchors"].items() if (text := _shown(scores, names))]
    if results["protocol"]["controls"] and "num_calls" in results and "sampler" not in results:
        anchors.append("  its teacher: the same command with the teacher in its place and its --num-steps and --guidance")
    return "\n".join([_shown(results["scores"], names), *anchors, *(f"  note: {note}" for note in results["notes"])])


def _shown(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """The named scores with their spreads, as far as they were measured."""
    values = ((name, scores[name]["value"], scores[name]["spread"]) for name in names if name in scores)
    measured = ((name, value, spread) for name, value, spread in values if value is not None)
    return "  ".join(
        f"{name} {value:.3g}" + ("" if spread is None else f" +- {spread:.2g}") for name, value, spread in measured
    )


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
