"""What a `distill` command asks for. Reading it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewstep.config import ConfigError

METHODS = ("kd", "dmd2", "kd+dmd2")
TRAININGS = ("kd", "dmd2")  # which take settings: kd.optim.lr=1e-4


@dataclass(frozen=True)
class DistillRequest:
    teacher: str
    dataset: Path
    out: Path
    steps: int = 4
    method: str = "kd+dmd2"  # one of METHODS
    rank: int = 0  # of adapters; 0: all weights
    control: str | None = None
    guidance: float | None = None  # None: as students of the family are published
    negative: str | None = None  # zeros or empty: what guidance pushes away from; None: the same
    shift: float | None = None  # of the student's times; None: the same
    teacher_steps: int | None = None  # None: as published
    num_pairs: int | None = None  # None: one for each clip, up to MOST_PAIRS
    kd_iters: int | None = None  # None: by the number of pairs
    iters: int | None = None  # of DMD2; None: by the number of clips
    num_frames: int | None = None  # of a window; None: whole clips, or the longest that fit
    size: tuple[int, int] | None = None  # height, width; None: those of the clips
    prompt: str | None = None  # one caption for all clips
    text_encoder: str | None = None  # None: the teacher's
    codec: str | None = None  # None: the teacher's
    heldout: Path | None = None  # clips with captions for the scores; None: the data set's own
    num_eval: int | None = None  # clips of an evaluation; None: as many as there are, up to MOST_EVAL
    processes: int = 1  # of torchrun
    precision: str | None = None  # None: as the recipes have it
    calls_per_s: float | None = None  # network calls per second, for the hours of --dryrun
    work: Path | None = None  # None: beside `out`
    name: str = "student"  # of the group of its runs, below `work`
    strict: bool = False
    settings: tuple[str, ...] = ()  # kd.KEY=VALUE and dmd2.KEY=VALUE

    def __post_init__(self) -> None:
        for word in self.settings:
            if not any(word.startswith(f"{name}.") and "=" in word for name in TRAININGS):
                raise ConfigError(f"{word}: settings of a training are written kd.KEY=VALUE or dmd2.KEY=VALUE")
        for name in TRAININGS:
            if self.settings_of(name) and name not in self.trainings:
                raise ConfigError(f"{name}.{self.settings_of(name)[0]}: --method {self.method} has no such training")

    @property
    def trainings(self) -> list[str]:
        """The names of the trainings, in their order."""
        return self.method.split("+")

    @property
    def work_dir(self) -> Path:
        """Where runs, pairs and the records of the stages are."""
        return self.work or self.out.with_name(f"{self.out.name}.work")

    def settings_of(self, training: str) -> list[str]:
        """The settings KEY=VALUE of a training."""
        return [word.removeprefix(f"{training}.") for word in self.settings if word.startswith(f"{training}.")]
