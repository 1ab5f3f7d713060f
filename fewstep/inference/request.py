"""What a command of this room asks for, as one frozen record per verb. Reading a command imports no torch.

    fewstep generate MODEL --prompt TEXT | --prompts FILE.txt (one a line) | FILE.jsonl ({"prompt": .., "visual_input": .., ..})
    --input clip.mp4 --num-input-frames 9       first frames that the network receives
    --control edge=edge.mp4                     control videos; edge and vis can be made from --input: --control edge

The option names of the original tools are translated first: coming_from_cosmos.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fewstep.config import ConfigError
from fewstep.errors import UserError
from fewstep.files import plain_name
from fewstep.inference.coming_from_cosmos import Control
from fewstep.inference.guardrails import Guardrail
from fewstep.inference.upsamplers import Upsampler
from fewstep.solvers import SOLVERS
from fewstep.untrusted.text import parse_json, read_text

PRECISIONS = ("fp32", "bf16")


def _refuse_below(request: Any, least: int, *names: str) -> None:  # Any: one of the records here
    """Raises ConfigError for a field that is set and below `least`, by the name of its option."""
    for name in names:
        value = getattr(request, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least}")


def quality_of(text: str) -> Literal["lossless"] | int:
    """The quality of an mp4, as --quality has it. Raises ConfigError for another text."""
    if text == "lossless":
        return "lossless"
    if not text.isdigit() or int(text) > 51:
        raise ConfigError(f"--quality is 'lossless' or a CRF from 0 to 51, not {text!r}")
    return int(text)


def refuse_other_precision(name: str) -> None:
    if name not in PRECISIONS:
        raise ConfigError(f"--precision is one of {', '.join(PRECISIONS)}, not {name!r}")


@dataclass(frozen=True)
class SamplerOptions:
    """What a command line changes in the sampler of a teacher; None: as the teacher's own record has it."""

    num_steps: int | None = None
    solver: str | None = None
    shift: float | None = None  # of a grid in flow time
    sigma_max: float | None = None  # where a Karras grid begins
    guidance: float | None = None  # w in uncond + w (cond - uncond)
    guidance_low: float | None = None  # w of the low-noise expert of Wan A14B

    SPELLED: ClassVar[Mapping[str, str]] = {
        "num_steps": "--num-steps",
        "solver": "--sampler",
        "shift": "--shift",
        "sigma_max": "--sigma-max",
        "guidance": "--guidance",
        "guidance_low": "--guidance-low",
    }

    def __post_init__(self) -> None:
        if self.solver is not None and self.solver not in SOLVERS:
            raise ConfigError(f"--sampler is one of {', '.join(SOLVERS)}, not {self.solver!r}")
        _refuse_below(self, 1, "num_steps")
        for name in ("guidance", "guidance_low"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{self.SPELLED[name]} {value}: is no finite number")
        for name in ("shift", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{self.SPELLED[name]} {value:g}: above 0")

    def values(self) -> dict[str, Any]:
        """The fields that the command line sets."""
        return {name: getattr(self, name) for name in self.SPELLED if getattr(self, name) is not None}

    def names(self) -> list[str]:
        """The options that the command line sets."""
        return [self.SPELLED[name] for name in self.values()]


@dataclass(frozen=True)
class ClipRequest:
    """One clip of a `generate` command."""

    name: str
    prompt: str = ""
    negative: str | None = None  # None: what the pipeline takes for no prompt, the empty text or zeros
    embedding: Path | None = None  # of the prompt, instead of a text encoder
    negative_embedding: Path | None = None
    source: Path | None = None  # picture or video whose first frames the clip begins with, or that a control is made from
    num_input_frames: int = 0  # in pixels' frames
    control: Mapping[str, Control] = field(default_factory=dict[str, Control])
    seed: int = 0
    label: int | None = None  # of a class-conditional network
    switches: tuple[tuple[int, str], ...] = ()  # frames of a stream, and the prompt from each of them on

    def check_files(self) -> None:
        """Refuses files that are not there, before anything large is read."""
        files = {"--embedding": self.embedding, "--negative-embedding": self.negative_embedding, "--input": self.source}
        files |= {f"--control {name}": control.source for name, control in self.control.items()}
        if self.num_input_frames and self.source is None:
            raise ConfigError(
                f"clip '{self.name}' begins with {self.num_input_frames} given frame(s): give the file, --input FILE"
            )
        for name, path in files.items():
            if path is not None and not path.is_file():
                raise ConfigError(f"{name} {path}: {'is no' if path.exists() else 'no such'} file (for clip '{self.name}')")


@dataclass(frozen=True)
class GenerateRequest:
    """A `generate` command."""

    model: str
    out: Path
    clips: tuple[ClipRequest, ...]
    sampling: SamplerOptions = SamplerOptions()
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    codec: str | None = None
    text_encoder: str | None = None
    max_tokens: int | None = None
    tile: int | None = None
    device: str | None = None
    precision: str = "fp32"
    quality: str = "18"
    force: bool = False
    save_noise: bool = False
    student_only: bool = False
    chunk_frames: int | None = None  # frames made at once; longer clips are made chunk after chunk. None: a student's own
    overlap: int | None = None  # frames of the chunk before that a chunk begins with; None: 1
    image_encoder: str | None = None
    network: str | None = None  # which published one the weights of MODEL are; None: as their shapes say
    shard: bool = False  # each process holds a part of the weights
    context: int = 1  # processes that make a clip together, each a share of its tokens
    stream: bool = False  # a causal student's clip grows while it is made
    batch_size: int = 1  # clips that go through the network together
    published_guidance: bool = False  # a teacher without --guidance takes what the original tools take
    offload: frozenset[str] = frozenset()  # of OFFLOADED: parts that are loaded for their stage and released after it
    save_controls: bool = False
    guardrails: tuple[Guardrail, ...] = ()  # what they block is not written
    upsampler: Upsampler | None = None  # rewrites the prompts

    def check_files(self) -> None:
        """Refuses files that are not there, of clips that are not made yet."""
        for clip in self.clips:
            if not any(path.is_file() for path in files_of(self.out, clip.name)):
                clip.check_files()

    def __post_init__(self) -> None:
        quality_of(self.quality)
        refuse_other_precision(self.precision)
        _refuse_below(self, 1, "num_frames", "height", "width", "chunk_frames", "batch_size", "max_tokens", "tile", "context")
        _refuse_below(self, 0, "overlap")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigError(f"--fps {self.fps:g}: above 0")
        for clip in self.clips:
            _refuse_below(clip, 0, "seed", "num_input_frames")
            plain_name(clip.name, "the name of a clip")
            if clip.switches and not self.stream:
                raise ConfigError("--switch-at: the prompt changes in a stream; add --stream")
            if any(frame < 1 for frame, _ in clip.switches):
                raise ConfigError("--switch-at FRAME:PROMPT: frames are counted from 0, where --prompt holds; at least 1")


def files_of(out: Path, name: str) -> tuple[Path, Path]:
    """Where a clip is written: of several frames, of one."""
    return out / f"{name}.mp4", out / f"{name}.png"


@dataclass(frozen=True)
class Sizes:
    """What a command line says about the shape of the clips; None: as the data, or the model, have it."""

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        _refuse_below(self, 1, "num_frames", "height", "width")
        if self.fps is not None and not 0 < self.fps < 1e6:
            raise ConfigError(f"--fps {self.fps}: a rate in frames per second")
        if (self.height is None) != (self.width is None):
            raise ConfigError("--height and --width go together")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def is_partial(self) -> bool:
        return self.num_frames is None or self.size is None

    def text(self) -> str:
        """The options of the command line; "" for none of them."""
        options = {"--num-frames": self.num_frames, "--height": self.height, "--width": self.width}
        return " ".join(f"{name} {value}" for name, value in options.items() if value is not None)


@dataclass(frozen=True)
class PairsRequest:
    """A `pairs` command."""

    model: str
    dataset: Path | None  # None: `prompts` alone
    out: Path
    sampling: SamplerOptions = SamplerOptions()
    path_times: tuple[float, ...] | int = ()  # times of the states to keep, in the time of the teacher's path; or their number
    student_shift: float = 5.0  # of the student's times, where path_times is their number
    given_frames: int = 0  # clean latent frames of the data set's own clip that the teacher receives
    control: str | None = None
    codec: str | None = None
    text: str = "t5_xxl"
    negative: str | None = None  # zeros, or a file of the data set; None: zeros, or of prompts alone the negative prompt
    max_tokens: int | None = None  # None: 512, or of prompts alone as the text encoder has it
    mask_text: bool = False
    num: int | None = None
    seed: int = 0
    quality: str = "18"
    precision: str = "fp32"
    batch_size: int = 32
    device: str | None = None
    sizes: Sizes = Sizes()
    prompts: Path | None = None  # a file of prompts, instead of a data set
    text_encoder: str | None = None  # of `prompts`; None: the teacher's own
    negative_prompt: str | None = None  # of `prompts`; None: what the pipeline takes for no prompt
    form: str = "ours"
    verify: int = 0  # pairs that are solved again and compared
    shard: bool = False  # each process holds a part of the weights
    context: int = 1  # processes that make a clip together, each a share of its tokens

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.prompts is None):
            raise ConfigError("give a data set, or --prompts FILE (.txt, one a line; or .jsonl): one of the two")
        of_prompts = {"--text-encoder": self.text_encoder, "--negative-prompt": self.negative_prompt}
        of_data = {"--control": self.control, "--given-frames": self.given_frames}
        for name, value in (of_prompts if self.prompts is None else of_data).items():
            if value:
                where = "--prompts, text by itself" if self.prompts is None else "a data set"
                raise ConfigError(f"{name} {value}: goes with {where}")
        if self.prompts is not None and self.negative not in (None, "zeros"):
            raise ConfigError(f"--negative {self.negative}: a file of a data set. With --prompts give --negative-prompt TEXT")
        if self.form not in ("ours", "fastgen"):
            raise ConfigError(f"--format is ours or fastgen, not {self.form!r}")
        quality_of(self.quality)
        refuse_other_precision(self.precision)
        _refuse_below(self, 1, "batch_size", "num", "max_tokens", "context")
        _refuse_below(self, 0, "given_frames", "verify")


OFFLOADED = {  # parts of a pipeline: the option that loads each for its stage only
    "network": "--offload-diffusion-transformer",
    "codec": "--offload-tokenizer",
    "guardrail": "--offload-guardrail-models",  # of frames; those of prompts are always released
}


def path_times_of(text: str | None) -> tuple[float, ...] | int:
    """Times with commas between, or the number of a student's steps: "80,9.7,0.5" or "4"."""
    try:
        times = tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ConfigError(f"--path-times takes numbers with commas between, not {text!r}") from None
    number = times[0] if len(times) == 1 else 0.0
    if list(times) != sorted(set(times), reverse=True) or any(not 0 < t < float("inf") for t in times):
        raise ConfigError(f"--path-times {text}: times descend from noise to the clip, above 0")
    return int(number) if number > 1 and number.is_integer() else times  # 1 is a time: pure noise on a flow


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts: lines of text, or of json."""
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: no such file")
    try:
        text = read_text(path)
    except UserError as error:
        raise ConfigError(f"--prompts {error}") from None
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {path}: is empty")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in lines]
    try:
        return [parse_json(line, f"--prompts {path}, line {number}: is no json object", "") for number, line in lines]
    except UserError as error:
        raise ConfigError(str(error)) from None
