"""The request of `fewstep evaluate`: `Evaluation`, its protocol, and the scorers that it names or that suit its clips.

A protocol is all of the request that decides a number besides the model. `OUT/protocol.yaml` has it, and `--protocol` takes it
back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.config import ConfigError, apply_overrides, choices, dump, parse
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.data.files import video
from fewstep.data.folder.layout import CAPTIONS, IMAGES, VIDEOS, Layout
from fewstep.data.folder.samples import read_caption
from fewstep.errors import UserError, some
from fewstep.evaluation.clips import AnyClips, clip_files, content_hash, problems_of, video_files
from fewstep.evaluation.fidelity import ControlFidelity
from fewstep.evaluation.score import AnyScorer, Scorer
from fewstep.files import write_text
from fewstep.inference.card import Envelope
from fewstep.inference.request import SamplerOptions
from fewstep.parallel import device_of

_BATCH, _PIXELS = 64, 1 << 22  # clips, and pixels of all their frames, that a model makes together


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
    seeds: int | None = None  # noises of which a model's first two clips are kept to look at; None: as many as sets
    text: str | None = "t5_xxl"
    negative: str | None = "zeros"
    max_tokens: int = 512
    mask_text: bool = False
    num_frames: int | None = None  # of every clip; None: as the model was trained, or as the files are
    size: tuple[int, int] | None = None  # height, width of the clips that a model makes; None: likewise
    given_frames: int = 0  # clean latent frames of the data set's own clip that the model receives
    batch_size: int | None = None  # clips that a model makes together; None: 64 small ones, or as many as have 4 million pixels
    codec: str | None = None  # None: the one beside the model
    scorers: tuple[Scorer, ...] = ()  # (): `clips`, or the one that suits these clips
    controls: tuple[str, ...] = ()  # of the data set: scored, and the one that a model has a branch for is given to it
    truth: Path | None = None  # clips of the same names that each one should equal
    precision: str = "fp32"
    device: str | None = None
    latency: int = 0  # timed repetitions of one clip, stage by stage; 0: none

    @property
    def per_set(self) -> int:
        assert self.num is not None, "counted by `run`"
        return self.num

    @property
    def where(self) -> torch.device:
        """The device that computes: of several processes each has its own GPU."""
        return torch.device(device_of(self.device))

    @property
    def is_of_clips(self) -> bool:
        """Whether it is of no model: a data set, a folder of mp4, or a pattern like clips/*.mp4."""
        folder = Path(self.what)
        is_plain = not (folder / "model_index.json").is_file() and bool(video_files(folder))
        return is_data_set(folder) or "*" in self.what or is_plain

    @property
    def prompts_folder(self) -> Path:
        if self.prompts is None:
            raise UserError(f"--prompts: {self.what} is no folder of clips; give the data set whose captions it is to follow")
        return self.prompts

    def files(self) -> dict[str, Path]:
        """The clips to be scored, or the real clips of the prompts; refuses none."""
        where = self.what if self.is_of_clips else self.prompts_folder
        files = clip_files(where)
        if not files:
            raise UserError(f"{where}: has no videos/*.mp4")
        return files

    def with_num(self) -> Evaluation:
        """With the number of clips in a set: as asked for, or 512, or as many as there are."""
        return self if self.num is not None else replace(self, num=min(512, len(self.files())))

    def within(self, envelope: Envelope) -> Evaluation:
        """With the frames and the size that the model was trained on, where neither is asked for."""
        size = (envelope.height, envelope.width) if envelope.height and envelope.width else None
        return replace(self, num_frames=self.num_frames or envelope.num_frames, size=self.size or size)

    def batched(self) -> Evaluation:
        """With the number of clips that a model makes together."""
        if self.batch_size is not None:
            return self
        header = video.probe(next(iter(self.files().values())))
        height, width = self.size or header.size
        pixels = (self.num_frames or header.num_frames or 1) * height * width
        return replace(self, batch_size=max(1, min(_BATCH, _PIXELS // pixels)))

    def refuse_bad_clips(self) -> None:
        """Raises UserError, which names all clips that cannot be read, before one is measured."""
        folders = ([self.what] if self.is_of_clips else []) + [where for where in (self.real, self.truth) if where is not None]
        files = [file for where in dict.fromkeys(map(str, folders)) for file in clip_files(where).values()]
        problems = problems_of(files, self.num_frames if self.is_of_clips else None)
        if problems:
            raise UserError(
                f"{len(problems)} of {len(files)} clips cannot be scored. Remove them, or make them again:\n"
                + some(problems, 5, "\n")
            )

    def refuse_sampling(self, why: str) -> None:
        """Refuses options of a teacher's sampler where they would have no effect."""
        names = ["--calls"] * (self.calls is not None) + self.sampling.names()
        if names:
            raise UserError(f"{', '.join(names)}: {self.what} {why}. Leave it out: it is for a teacher")


def is_data_set(folder: Path) -> bool:
    return any((folder / part.folder).is_dir() for part in (VIDEOS, IMAGES))


# ---- the protocol ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """All that decides the scores besides the model, as a file; each value is an option of the command."""

    prompts: Path | None = None
    real: str | None = None
    truth: Path | None = None
    num: int | None = None
    sets: int = 3
    num_frames: int | None = None
    size: tuple[int, int] | None = None  # height, width
    given_frames: int = 0
    text: str | None = "t5_xxl"
    negative: str | None = "zeros"
    max_tokens: int = 512
    mask_text: bool = False
    controls: tuple[str, ...] = ()
    scorers: tuple[AnyScorer, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])  # of real clips, truth and feature networks

    @classmethod
    def read(cls, path: Path) -> Protocol:
        """Raises ConfigError for a key or a value that does not exist."""
        return parse(cls, read_yaml_mapping(read_text(path), str(path)))

    @classmethod
    def of(cls, task: Evaluation) -> Protocol:
        return cls(**{name: getattr(task, name) for name in _SHARED}, hashes=hashes_of(task))

    def apply(self, task: Evaluation) -> Evaluation:
        """The task as the protocol has it. Raises ConfigError for an option of the command line that says otherwise."""
        plain = Evaluation(task.what, None, None, task.out)
        other = [n for n in _SHARED if getattr(task, n) not in (getattr(plain, n), getattr(self, n))]
        if other:
            raise ConfigError([(f"--{name.replace('_', '-')}", "is fixed by --protocol: leave it out") for name in other])
        return replace(task, **{name: getattr(self, name) for name in _SHARED})

    def refuse_other_hashes(self, task: Evaluation) -> None:
        """Raises UserError if real clips or feature networks are not those of the protocol."""
        now = hashes_of(task)
        other = [name for name, value in self.hashes.items() if now.get(name) != value]
        if other:
            raise UserError(f"--protocol: {', '.join(other)} changed since it was written: the scores would not compare")

    def write(self, path: Path) -> None:
        import yaml

        write_text(path, yaml.safe_dump(dump(self), sort_keys=False))


_SHARED = tuple(one.name for one in fields(Protocol) if one.name != "hashes")


def hashes_of(task: Evaluation) -> dict[str, str]:
    """Hashes of what the scores depend on besides the model, before a clip is made."""
    out: dict[str, str] = {}
    if task.real is not None:
        out["real"] = content_hash(list(clip_files(task.real).values()))
    if task.truth is not None:
        out["truth"] = content_hash(list(clip_files(task.truth).values()))
    for scorer in task.scorers:
        out |= {f"features.{name}": str(value) for name, value in scorer.protocol().get("features", {}).items()}
    return out


def hash_of_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


# ---- scorers ---------------------------------------------------------------------------------------------------------


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


def control_kinds(names: Sequence[str]) -> dict[str, Any]:
    """The named controls, or all that there are."""
    kinds: dict[str, Any] = choices("control")
    for name in names:
        if name not in kinds:
            raise UserError(f"--control {name}: there are {', '.join(kinds)}")
    return {name: kinds[name] for name in names or kinds}


def scorers_of(task: Evaluation) -> tuple[Scorer, ...]:
    """The scorers of the task; raises UserError if it lacks something that one of them needs."""
    scorers = task.scorers
    if not scorers:
        fidelity = (ControlFidelity(),) if task.controls else ()
        scorers = fidelity if fidelity and task.real is None else (_suitable(task), *fidelity)
    scorers = tuple(_of_length(scorer, task) for scorer in scorers)
    control_kinds(task.controls)
    for scorer in scorers:
        if task.per_set < scorer.min_clips:
            raise UserError(f"--num {task.num}: a set needs at least {scorer.min_clips} clips, and better hundreds")
        if "real" in scorer.needs and task.real is None:
            raise UserError("--real: this scorer compares with real clips; give their folder")
    return scorers


def _of_length(scorer: Scorer, task: Evaluation) -> Scorer:
    """The scorer, which reads as many frames of the real clips as --num-frames says, where they have as many."""
    if not isinstance(scorer, AnyClips) or scorer.num_frames is not None or task.num_frames is None or task.real is None:
        return scorer
    is_long = not problems_of(list(clip_files(task.real).values()), task.num_frames)
    return replace(scorer, num_frames=task.num_frames) if is_long else scorer


def _suitable(task: Evaluation) -> Scorer:
    """The scorer that was made for clips like these, or the one for clips of any kind."""
    files = task.files()
    stem, first = next(iter(files.items()))
    folder = Path(task.what) if task.is_of_clips else task.prompts_folder
    captions = Layout.open(folder).files(CAPTIONS) if is_data_set(folder) else {}
    texts = (read_caption(captions[stem]),) if stem in captions else ()
    kinds: dict[str, Any] = choices("scorer")
    return next((kind() for kind in kinds.values() if kind().suits(video.probe(first), texts)), AnyClips())
