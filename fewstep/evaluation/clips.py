"""The general scorer (`--scorer clips`): sets of clips of any size, length and rate against real ones. No toy in it.

For every feature extractor X (features/): mmd_X, frechet_X with its bias, precision_X, recall_X, density_X, coverage_X and
vendi_X.
Of every clip: motion, flicker, warping error, sharpness (pixels.py). With clips that each one should equal: PSNR and SSIM.
Beside them stand the same scores of real clips, one half of them against the other.

Each clip is read once and forgotten; what is kept of it is one row of features for each extractor. Results of several processes
merge: `Measured.merge`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fewstep.config import kind
from fewstep.config.types import kind_of
from fewstep.data.files import video
from fewstep.data.folder.layout import IMAGES, VIDEOS, Layout
from fewstep.errors import UserError
from fewstep.evaluation import pixels
from fewstep.evaluation.feature_set import LEAST, FeatureSet, Scale, compare, scaled
from fewstep.evaluation.features.contract import AnyExtractor, Extractor
from fewstep.evaluation.features.descriptors import Descriptors
from fewstep.evaluation.features.efficientnet import EfficientNet
from fewstep.evaluation.features.random_network import RandomNetwork
from fewstep.evaluation.features.transnet import TransNet
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Scorer, Value, mean_over_clips
from fewstep.files import write_tensors

_BATCH = 16  # clips that go through a feature network together
_PIXELS = 1 << 26  # of such a batch, at the most
HALVES = "one half of the real clips against the other"

# What a set score is: title, meaning, better.
_OF_FEATURES: dict[str, tuple[str, str, Any]] = {
    "mmd": ("MMD", "Distance from real clips (unbiased MMD) on {}.", "lower"),
    "frechet": ("Frechet distance", "Squared Frechet distance from real clips on {}; raised by its bias.", "lower"),
    "frechet_bias": ("Frechet bias", "What the Frechet distance on {} would lose with infinitely many clips.", "lower"),
    "precision": ("Precision", "Share of clips that lie among real ones on {}.", "higher"),
    "recall": ("Recall", "Share of real clips that lie among these on {}.", "higher"),
    "density": ("Density", "How densely real clips surround these on {}; about 1 for real ones.", "higher"),
    "coverage": (
        "Coverage",
        "Share of real clips that have one of these nearby on {}; low when a model has collapsed.",
        "higher",
    ),
    "vendi": ("Vendi score", "Effective number of different clips on {}.", "as real"),
}
_HEADLINES = ("mmd", "coverage")


@dataclass(frozen=True)
class Measured:
    """What is kept of the clips of a set."""

    features: Mapping[str, FeatureSet]  # by the name of the extractor
    per_clip: Mapping[int, Mapping[str, float]]  # by the number of the clip

    def merge(self, other: Measured) -> Measured:
        """Both together, of clips that are in one of them only."""
        features = {name: own.merge(other.features[name]) for name, own in self.features.items()}
        return Measured(features, {**self.per_clip, **other.per_clip})

    def columns(self) -> dict[str, list[float]]:
        """The scores of single clips by name, in the order of their numbers."""
        rows = [self.per_clip[number] for number in sorted(self.per_clip)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}


class Reference(NamedTuple):
    """Real clips."""

    measured: Measured
    fps: tuple[float, ...]  # their rates
    fingerprint: str  # of their files, and of all that was computed from them


@kind("clips", group="scorer")
@dataclass(frozen=True)
class AnyClips(Scorer):
    """Clips of any size, length and rate against real ones: distances, diversity, motion, closeness to a truth."""

    features: tuple[AnyExtractor, ...] = ()  # (): pretrained networks that are installed, else descriptors and random_network
    num_frames: int | None = None  # the first so many frames of every clip, real ones too; none: all
    draws: int = 20  # random halves from which spreads are computed

    needs: ClassVar[frozenset[Need]] = frozenset({"real"})
    min_clips: ClassVar[int] = LEAST

    def problems(self) -> Iterable[tuple[str, str]]:
        names = [_name(extractor) for extractor in self.features]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield "features", f"has {name} twice: its scores would have one name"
        if self.draws < 2:
            yield "draws", f"must be at least 2, not {self.draws}"

    @property
    def extractors(self) -> Mapping[str, Extractor]:
        """By name."""
        chosen = self.features or _installed()
        return {_name(extractor): extractor for extractor in chosen}

    @property
    def legend(self) -> Sequence[Score]:
        rows: list[Score] = []
        for place, (name, extractor) in enumerate(self.extractors.items()):
            for score, (title, meaning, better) in _OF_FEATURES.items():
                own = f"{extractor.frechet.upper()}" if score == "frechet" and extractor.frechet != "frechet" else title
                is_headline = place == 0 and score in _HEADLINES
                key = _key(extractor, score, name)
                rows.append(Score(key, f"{own}, {extractor.label}", meaning.format(extractor.label), better, is_headline))
        return (*rows, *pixels.LEGEND, *pixels.PAIRED)

    def protocol(self) -> Mapping[str, Any]:
        return {"features": {name: extractor.fingerprint for name, extractor in self.extractors.items()}}

    # ---- measuring -----------------------------------------------------------------------------------------------------

    def measured(self, samples: ClipSet, numbers: Sequence[int] | None = None) -> Measured:
        """What is kept of the clips; `numbers` are theirs in the whole set (None: 0, 1, 2, ..)."""
        numbers = range(len(samples.clips)) if numbers is None else numbers
        sets = {name: FeatureSet() for name in self.extractors}
        per_clip: dict[int, dict[str, float]] = {}
        for places, clips in self._batches(samples.clips):
            for name, extractor in self.extractors.items():
                least = min(len(clip) for clip in clips)
                if least < extractor.least_frames:
                    raise UserError(f"{extractor.label} needs {extractor.least_frames} frames, a clip has {least}")
                sets[name].update(extractor.features(np.stack(clips)), [numbers[place] for place in places])
            for place, clip in zip(places, clips, strict=True):
                scores = pixels.in_time(clip)
                truth = samples.truth[place] if samples.truth else None
                if truth is not None:
                    scores |= pixels.closeness(clip, self._cut(video.read(truth).frames))
                per_clip[numbers[place]] = scores
        return Measured(sets, per_clip)

    def _batches(self, clips: Sequence[Clip]) -> Iterator[tuple[list[int], list[Clip]]]:
        """Neighbouring clips of one size and length, with their places."""
        places, batch = list[int](), list[Clip]()
        for place in range(len(clips)):
            clip = self._cut(clips[place])
            is_full = len(batch) == _BATCH or (batch and (len(batch) + 1) * clip.size > 3 * _PIXELS)
            if batch and (is_full or clip.shape != batch[0].shape):
                yield places, batch
                places, batch = [], []
            places.append(place)
            batch.append(clip)
        if batch:
            yield places, batch

    def _cut(self, clip: Clip) -> Clip:
        if self.num_frames is None:
            return clip
        if len(clip) < self.num_frames:
            raise UserError(f"a clip has {len(clip)} frames, num_frames asks for {self.num_frames}")
        return clip[: self.num_frames]

    # ---- real clips ----------------------------------------------------------------------------------------------------

    def reference(self, real: Path | str | None, cache: Path | None = None) -> Reference:
        """Measures the real clips, or reads what was measured of the same files before."""
        assert real is not None, "checked by `needs`"
        files = list(clip_files(real).values())
        if len(files) < LEAST:
            raise UserError(f"--real {real}: has {len(files)} clips; at least {LEAST} are needed, better hundreds")
        fps = tuple(video.probe(file).fps for file in files)
        settings = repr((self.num_frames, dict(self.protocol()), content_hash(files), _VERSION))
        fingerprint = hashlib.sha256(settings.encode()).hexdigest()[:16]
        path = None if cache is None else Path(cache) / f"clips-{fingerprint}.safetensors"
        known = None if path is None or not path.is_file() else _read(path)
        if known is not None:
            return Reference(known, fps, fingerprint)
        measured = self.measured(ClipSet(Files(files)))
        if path is not None:
            _write(path, measured)
        return Reference(measured, fps, fingerprint)

    # ---- scores --------------------------------------------------------------------------------------------------------

    def score(self, samples: ClipSet, reference: Reference) -> Record:
        return self.summary(self.measured(samples), reference, samples.fps)

    def summary(self, samples: Measured, reference: Reference, fps: float | None = None) -> Record:
        """The scores of clips that are measured."""
        scores, real, notes = dict[str, Value](), dict[str, Value](), list[str]()
        features: dict[str, torch.Tensor] = {}
        for name, extractor in self.extractors.items():
            known = reference.measured.features[name]
            scale = Scale.of(known) if extractor.is_standardised else Scale.none(known.clips.shape[1])
            found = compare(samples.features[name], known, scale, draws=self.draws)
            scores |= {_key(extractor, score, name): value for score, value in found.scores.items()}
            notes += [f"{extractor.label}: {note}." for note in found.notes]
            features |= {name: scaled(samples.features[name], scale).float(), f"{name}.real": scaled(known, scale).float()}
            if len(known) >= 2 * LEAST:
                floor = compare(*known.halves(), scale, draws=self.draws).scores
                real |= {_key(extractor, score, name): value for score, value in floor.items()}
        columns = samples.columns()
        scores |= {name: mean_over_clips(values) for name, values in columns.items()}
        real |= {name: mean_over_clips(values) for name, values in reference.measured.columns().items()}
        notes += _of_rates(fps, reference.fps)
        if not self.features and not any(TransNet.label == one.label for one in self.extractors.values()):
            notes.append("No pretrained feature network is installed: pip install 'fewstep[eval]' adds two.")
        labels = ", ".join(f"{e.label} ({e.fingerprint})" for e in self.extractors.values())
        num = len(reference.measured.per_clip)
        return Record(labels, scores, num, tuple(notes), {HALVES: real}, columns, features)

    def distance(self, samples: ClipSet, reference: Reference) -> float:
        name, extractor = next(iter(self.extractors.items()))
        return self.score(samples, reference)[_key(extractor, "mmd", name)].value


_VERSION = 1  # of what is kept of a clip


def _installed() -> tuple[Extractor, ...]:
    pretrained: list[Extractor] = []
    if TransNet.is_installed():
        pretrained.append(TransNet())
    if EfficientNet.is_installed():
        pretrained.append(EfficientNet())
    return tuple(pretrained) or (Descriptors(), RandomNetwork())


def _name(extractor: Extractor) -> str:
    own = kind_of(extractor)
    if own is None:
        raise UserError(f"{extractor!r}: is no registered feature extractor; add @kind(NAME, group='features') to its class")
    return own[1]


def _key(extractor: Extractor, score: str, name: str) -> str:
    if score == "frechet" and extractor.frechet != "frechet":
        return extractor.frechet  # fid, fvd
    return f"{score}_{name}"


def _of_rates(fps: float | None, real: Sequence[float]) -> list[str]:
    others = sorted({round(rate, 2) for rate in real if rate})
    if fps is None or not others or (len(others) == 1 and abs(others[0] - fps) < 0.02):
        return []
    text = ", ".join(f"{rate:g}" for rate in others[:4])
    return [f"The clips play {fps:g} frames a second, the real ones {text}: scores of motion compare steps of unequal time."]


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(path: Path, measured: Measured) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, features in measured.features.items():
        tensors |= {f"{name}/{key}": tensor for key, tensor in features.state_dict().items()}
    scores = {str(number): row for number, row in measured.per_clip.items()}
    write_tensors(path, tensors, {"per_clip": json.dumps(scores)})


def _read(path: Path) -> Measured | None:
    """What `_write` wrote; None where it is damaged, and is to be measured again."""
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                name, _, rest = key.partition("/")
                parts.setdefault(name, {})[rest] = file.get_tensor(key)
            scores = json.loads(file.metadata()["per_clip"])
        features = {name: FeatureSet.of_state(state) for name, state in parts.items()}
        return Measured(features, {int(number): row for number, row in scores.items()})
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None


class Files(Sequence[Clip]):
    """The clips of files, or their first frames, read when they are asked for."""

    def __init__(self, files: Sequence[Path], num_frames: int | None = None) -> None:
        self._files, self._num_frames = files, num_frames

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: Any) -> Any:  # Any: a number or a slice
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        return video.read(self._files[place], count=self._num_frames).frames


def clip_files(where: Path | str) -> dict[str, Path]:
    """The videos or pictures of a folder, of the data set it is, or of a pattern like clips/*.mp4, by name, in that order."""
    folder = Path(where)
    if "*" in str(where):
        first = next(n for n, part in enumerate(folder.parts) if "*" in part)
        found = sorted(Path(*folder.parts[:first]).glob(str(Path(*folder.parts[first:]))))
        if not found:
            raise UserError(f"{where}: there is no such file")
        return {file.stem: file for file in found}
    if not any((folder / part.folder).is_dir() for part in (VIDEOS, IMAGES)):
        plain = video_files(folder)
        if plain:
            return {file.stem: file for file in plain}
    place = Layout.open(folder)
    return place.files(VIDEOS) or place.files(IMAGES)


def video_files(folder: Path) -> list[Path]:
    """The videos that lie in a folder itself, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in (".mp4", ".mov") and not file.name.startswith(".")
    )


def content_hash(files: Sequence[Path]) -> str:
    """Over the size, the first and the last MiB of each file; their names do not count."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{size}".encode() + stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
