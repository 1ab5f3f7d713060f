"""The chains of `fewstep pipeline`: their trainings and settings, and what a command asks for. Reading them imports no torch.

    self_forcing         pairs -> kd -> kd_scores -> bridge -> sf -> sf_scores -> export -> report      FastGen's three stages
    causal_consistency   text -> latents -> tf -> cd -> cd_scores -> bridge -> sf -> ..                 without pairs

cosmos_, wan_ and toy_ are the same with the recipes of FastGen, or of the toy world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import fewstep
from fewstep.config import ConfigError

AGAIN = "fewstep pipeline"
FASTGEN_TIMES = "0.999,0.937,0.833,0.624"
SEED_PAIRS = ("--sampler", "unipc", "--shift", "5", "--steps", "35", "--path-times", FASTGEN_TIMES)  # generate_ode_pairs.py


@dataclass(frozen=True)
class Training:
    """A stage that trains: what, by which recipe, and what it begins with."""

    name: str
    about: str
    recipe: str
    words: tuple[str, ...] = ()
    begins: str = ""  # setting that names the run it begins with: that of the training before
    is_scored: bool = False  # its student is sampled, scored, and handed on through a file


@dataclass(frozen=True)
class Chain:
    about: str
    trainings: tuple[Training, ...]
    pairs: tuple[str, ...] | None = None  # options of `fewstep pairs`; None: it is trained on clips
    teacher: str | None = None  # where the command names none

    @property
    def stages(self) -> Iterator[str]:
        """Their names, in their order."""
        yield from ("text", "latents") if self.pairs is None else ("pairs",)
        for training in self.trainings:
            yield training.name
            if training.is_scored:
                yield f"{training.name}_scores"
                yield "bridge" if training is not self.trainings[-1] else "export"
        yield "report"


def _kd(recipe: str, *words: str) -> Training:
    return Training("kd", "CausalKD: the causal student regresses onto the teacher's states", recipe, words, is_scored=True)


def _sf(recipe: str, *words: str) -> Training:
    about = "Self-Forcing: the student learns on clips that it generates from its own chunks"
    return Training("sf", about, recipe, words, "networks.student.init", is_scored=True)


def _without_pairs(finetune: str, consistency: str, sf: str, begins: str = "teacher") -> tuple[Training, ...]:
    about = "the teacher becomes causal, by teacher forcing on clips"
    distilled = "consistency distillation of the causal teacher: a few-step student without pairs"
    return (
        Training("tf", about, finetune),
        Training("cd", distilled, consistency, (), begins, is_scored=True),
        _sf(sf),
    )


_TOY_PAIRS = (
    *("--sampler", "unipc", "--steps", "35", "--guidance", "2", "--path-times", "4", "--student-shift", "3"),
    *("--num-frames", "17", "--height", "32", "--width", "32", "--fps", "16", "--max-tokens", "40", "--mask-text"),
)
CHAINS: Mapping[str, Chain] = {
    "self_forcing": Chain(
        "any teacher of Wan or Cosmos, from prompts alone: pairs, CausalKD, Self-Forcing",
        (_kd("causal_kd"), _sf("self_forcing")),
        ("--path-times", "4"),
    ),
    "causal_consistency": Chain(
        "any teacher of Wan or Cosmos, from clips: teacher forcing, causal consistency, Self-Forcing",
        _without_pairs("causal_finetune", "causal_consistency", "self_forcing"),
    ),
    "cosmos_self_forcing": Chain(
        "Cosmos-Predict2.5 2B, FastGen's three stages (train_cosmos_sf.sh) with their published settings",
        (_kd("CosmosPredict2_kd_causal"), _sf("CosmosPredict2_sf")),
        (*SEED_PAIRS, "--guidance", "3", "--num-frames", "93", "--height", "480", "--width", "832"),
    ),
    "wan_self_forcing": Chain(
        "Wan 2.1 T2V 1.3B, the same stages",
        (_kd("WanT2V_kd_causal"), _sf("WanT2V_sf")),
        (*SEED_PAIRS, "--guidance", "5", "--num-frames", "81", "--height", "480", "--width", "832"),
    ),
    "toy_self_forcing": Chain(
        "the toy world's teacher: pairs, CausalKD, Self-Forcing",
        (_kd("toy_kd_causal"), _sf("toy_sf", "data.negative=zeros")),
        _TOY_PAIRS,
        str(fewstep.TOY),
    ),
    "toy_causal_consistency": Chain(
        "the toy world's teacher, from clips: teacher forcing, causal consistency, Self-Forcing",
        _without_pairs("toy_causal_finetune", "toy_causal_consistency", "toy_sf_consistency", "networks.teacher_init"),
        teacher=str(fewstep.TOY),
    ),
}


@dataclass(frozen=True)
class PipelineRequest:
    """What a `pipeline` command asks for."""

    name: str
    out: Path
    teacher: str | None = None  # None: that of the chain
    prompts: Path | None = None  # of pairs
    dataset: Path | None = None  # clips with captions, of a chain without pairs
    chunk: int | None = None  # None: as the recipes have it
    span: int | None = None
    only: tuple[str, ...] = ()  # stages to run; none: all
    processes: int = 1
    num_eval: int = 64
    bounds: Mapping[str, float] = field(default_factory=dict[str, float])  # of scores, by their names
    settings: tuple[str, ...] = ()  # STAGE.KEY=VALUE of a training, STAGE.OPTION=VALUE of other commands

    @property
    def chain(self) -> Chain:
        return CHAINS[self.name]

    @property
    def address(self) -> str:
        """The teacher's."""
        return self.teacher or self.chain.teacher or ""

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def data(self) -> Path:
        """What is trained on."""
        if self.chain.pairs is not None:
            return self.work / "pairs"
        assert self.dataset is not None
        return self.dataset

    def __post_init__(self) -> None:
        source, other = ("prompts", "dataset") if self.chain.pairs is not None else ("dataset", "prompts")
        if getattr(self, source) is None:
            raise ConfigError(f"pipeline {self.name}: begins with {source}; give --{source}")
        if getattr(self, other) is not None:
            raise ConfigError(f"pipeline {self.name}: begins with {source}, and has no use for --{other}")
        if not self.address:
            raise ConfigError(f"pipeline {self.name}: of which teacher? Give a pipeline's folder: --teacher FOLDER")
        names = list(self.chain.stages)
        for name in self.only:
            if name not in names:
                raise ConfigError(f"--only {name}: pipeline {self.name} has the stages {', '.join(names)}")
        takes = [*(name for name in names if name != "report" and not name.endswith("_scores")), "scores"]
        for word in self.settings:
            stage, dot, rest = word.partition(".")
            if stage not in takes or not dot or not rest:
                raise ConfigError(f"{word}: settings are written STAGE.KEY=VALUE; the stages are {', '.join(takes)}")

    def settings_of(self, stage: str) -> list[str]:
        return [word.removeprefix(f"{stage}.") for word in self.settings if word.startswith(f"{stage}.")]
