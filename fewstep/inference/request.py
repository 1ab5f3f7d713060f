"""What a command of this room asks for, as one frozen record per verb. Reading a command imports no torch.

    fewstep generate MODEL --prompt TEXT | --prompts FILE.txt (one a line) | FILE.jsonl ({"prompt": .., "visual_input": .., ..})
    --input clip.mp4 --num-input-frames 9       first frames that the network receives
    --control edge=edge.mp4                     control videos; edge and vis can be made from --input: --control edge

The option names of the original tools are translated first: coming_from_cosmos.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from fewstep.config import ConfigError, load_file
from fewstep.environment import ranks
from fewstep.inference.coming_from_cosmos import (
    Control,
    Print,
    codec_in,
    control_of,
    given_of,
    guidance_of,
    in_our_words,
    model_of,
    read_specs,
)
from fewstep.solvers import SOLVERS


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
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"--num-steps {self.num_steps}: at least 1")

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
    negative: str = ""
    embedding: Path | None = None  # of the prompt, instead of a text encoder
    negative_embedding: Path | None = None
    source: Path | None = None  # picture or video whose first frames the clip begins with, or that a control is made from
    num_input_frames: int = 0  # in pixels' frames
    control: Mapping[str, Control] = field(default_factory=dict[str, Control])
    seed: int = 0
    label: int | None = None  # of a class-conditional network


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
    batch_size: int = 1  # clips that go through the network together
    published_guidance: bool = False  # a teacher without --guidance takes what the original tools take
    offload: frozenset[str] = frozenset()  # of OFFLOADED: parts that are loaded for their stage and released after it


@dataclass(frozen=True)
class Sizes:
    """What a command line says about the shape of the clips; None: as the data, or the model, have it."""

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
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

    def named(self) -> str:
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
    negative_prompt: str = ""  # of `prompts`
    form: str = "ours"
    verify: int = 0  # pairs that are solved again and compared
    shard: bool = False  # each process holds a part of the weights

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
            raise ConfigError(f"--form is ours or fastgen, not {self.form!r}")
        if self.quality != "lossless" and not self.quality.isdigit():
            raise ConfigError(f"--quality is 'lossless' or a CRF from 0 to 51, not {self.quality!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision is one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        for name, least in (("batch_size", 1), ("num", 1), ("given_frames", 0), ("verify", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least}")


PRECISIONS = ("fp32", "bf16")
OFFLOADED = {  # parts of a pipeline: the option that loads each for its stage only
    "network": "--offload-diffusion-transformer",
    "codec": "--offload-tokenizer",
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


def read_command(arguments: Sequence[str], say: Print | None = None) -> GenerateRequest:
    """The request of a `generate` command; ConfigError for what it does not know."""
    tell = say or (lambda text: print(text, file=sys.stderr))
    parser = _parser()
    words, cosmos = in_our_words(arguments, parser.options(), tell)
    options = vars(parser.parse_args(words))
    specs: dict[str, Control] = {}
    for option in ("controlnet_specs", "spec"):
        if options[option] is not None:
            more, specs = read_specs(options[option], "-i" if option == "spec" else f"--{option}", tell)
            more, names = in_our_words(more, parser.options(), tell)
            options = vars(parser.parse_args([*more, *words]))  # the command itself comes last and counts
            cosmos += names
    if options["out"].suffix.lower() in (".mp4", ".png"):
        raise ConfigError(f"--out {options['out']}: names a folder; the clip in it is output.mp4, or with --name NAME NAME.mp4")
    if options["inference_type"] is not None and options["num_input_frames"] is None:
        options["num_input_frames"] = given_of(options["inference_type"])
    if options["batch_size"] < 1:
        raise ConfigError(f"--batch-size {options['batch_size']}: at least 1")
    processes = ranks().size
    if options["num_gpus"] not in (None, processes):
        num = options["num_gpus"]
        raise ConfigError(f"--num_gpus {num}: {processes} process(es) run. Start it with torchrun --nproc_per_node={num}")
    options["guidance"] = guidance_of(options["guidance"], options["guidance_scale"], cosmos, tell)
    folder, transformer = options["checkpoint_dir"], options["diffusion_transformer_dir"]
    options["student_only"] |= (options["released"] or "").endswith("/distilled")
    options["published_guidance"] = bool(cosmos) and options["guidance"] is None
    of_specs = tuple(specs) if options["controlnet_specs"] is not None else ()
    named = (options["model"], options["released"], folder, transformer)
    options["model"] = model_of(*named, of_specs, options["student_only"], tell)
    options["codec"] = codec_in(options["codec"], folder)
    options["solver"] = None if options["solver"] == "auto" else options["solver"]
    options |= {"clips": _clips(options, specs), "sampling": _of(SamplerOptions, options)}
    options["offload"] = frozenset(part for part in OFFLOADED if options["offload"] or options[f"offload_{part}"])
    if options["config"] is not None:
        load_file(options["config"])
    return _of(GenerateRequest, options)


def _of(record: Any, options: Mapping[str, Any]) -> Any:  # Any: a class of this file, and an instance of it
    return record(**{f.name: options[f.name] for f in fields(record)})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"generate: {message} (fewstep generate --help)")

    def options(self) -> set[str]:
        return set(self._option_string_actions)


def _parser() -> _Parser:
    parser = _Parser(prog="fewstep generate", description="Videos from a student or a teacher.", allow_abbrev=False)
    hidden = argparse.SUPPRESS

    def add(*names: str, help: str | None = None, **settings: Any) -> None:
        parser.add_argument(*names, help=help, **settings)

    add("model", nargs="?", help="a run, a folder of fewstep export or of diffusers, a hub id, Cosmos weights")
    add("--network", help="which published Cosmos network MODEL is, where it is files of weights whose shapes fit several")
    add("--prompt", help="text of one clip")
    add("--prompts", type=Path, help="file of prompts: .txt, one a line; or .jsonl")
    add("--negative-prompt", dest="negative", help="the text that guidance pushes away from")
    add("--embedding", type=Path, help="file of the prompt's embedding, instead of a text encoder")
    add("--negative-embedding", type=Path, help="file of the negative prompt's embedding")
    add("--label", type=int, help="class, for class-conditional networks")
    add("--input", dest="source", type=Path, help="picture or video that begins the clip, or that a control is made from")
    add("--num-input-frames", type=int, help="how many frames of --input the clip begins with (default: 1; with --control: 0)")
    add("--control", action="append", default=[], help="NAME=FILE.mp4, or edge or vis alone: made from --input")
    add("--controlnet-specs", type=Path, help="a json file of controls, as Transfer1 has it")
    add("-i", "--spec", dest="spec", type=Path, help="a json file of one clip, as Predict2.5 and Transfer2.5 have it")
    add("--inference-type", help="of Predict2.5: text2world, image2world or video2world")
    add("--model", dest="released", help=hidden)
    add("-o", "--out", type=Path, default=Path("outputs"), help="folder to write (default: outputs)")
    add("--name", help="name of the file, without .mp4 (default: output); of several clips: NAME_0000, ..")
    add("--num-steps", type=int, help="steps of a teacher's solver (default: as published)")
    add("--guidance", type=float, help="w in uncond + w (cond - uncond), 1 is off; in a command with Cosmos' names: their g")
    add("--guidance-scale", type=float, help="w, as diffusers and FastGen have it")
    add("--guidance-low", type=float, help="w of Wan A14B's low-noise expert; --guidance is the other's")
    add("--seed", type=int, help="of the first clip (default: 0); each further one has one more")
    add("--sampler", dest="solver", choices=("auto", *SOLVERS), default="auto", help="a teacher's solver (auto: as published)")
    add("--shift", type=float, help="shift of a teacher's grid in flow time (default: as published)")
    add("--sigma-max", type=float, help="where the grid of an EDM teacher begins (default: as published)")
    add("--num-frames", type=int, help="frames of a clip (default: a student's own)")
    add(
        "--chunk-frames",
        type=int,
        help="frames made at once; longer clips are made chunk after chunk (default: a student's own)",
    )
    add("--overlap", type=int, help="frames that a chunk takes from the one before (default: 1)")
    add("--height", type=int, help="pixels (default: a student's own)")
    add("--width", type=int, help="pixels (default: a student's own)")
    add("--fps", type=float, help="frames per second (default: a student's own, or 24)")
    add("--codec", help="folder or hub id of the autoencoder (default: the model's own)")
    add("--text-encoder", help="folder or hub id of the text encoder (default: the model's own)")
    add("--image-encoder", help="of Wan 2.1 I2V: a pipeline's folder or hub id")
    add("--max-tokens", type=int, help="cut texts to this number of tokens; with --embedding also pad to it")
    add("--tile", type=int, help="pixels along a tile of the codec, to save memory; not exact")
    add("--device", help="cpu, cuda, .. (default: a GPU if there is one)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network and the codec (default: fp32)")
    add("--config", type=Path, help="FILE.py that registers networks of your own")
    add("--batch-size", type=int, default=1, help="clips that go through the network together (default: 1)")
    add("--quality", default="18", help="of the mp4: a CRF, or lossless (default: 18)")
    add("--num-gpus", type=int, help="must be torchrun's number of processes, which divide the clips")
    add("--save-noise", action="store_true", help="keep OUT/noise/NAME.pickle, of variance 1")
    add("--shard", action="store_true", help="torchrun's processes hold a part of the weights each, instead of all of them")
    add("--use-distilled", dest="student_only", action="store_true", help="refuse a model that is no student")
    add("--force", action="store_true", help="sample a student with a number of steps or a guidance it was not trained for")
    add("--offload", action="store_true", help="load every part for its stage only, and release it after it")
    for part, option in OFFLOADED.items():
        add(option, dest=f"offload_{part}", action="store_true", help=hidden)
    add("--checkpoint-dir", help=hidden)
    add("--diffusion-transformer-dir", help=hidden)
    return parser


def _clips(options: Mapping[str, Any], specs: Mapping[str, Control]) -> tuple[ClipRequest, ...]:
    control = {**specs, **dict(_control(text) for text in options["control"])}
    source, given = options["source"], options["num_input_frames"]
    if given is None:
        given = 1 if source is not None and not control else 0
    if given and source is None and options["prompts"] is None:
        raise ConfigError("--num-input-frames needs --input, the picture or video they are taken from")
    one = ClipRequest(
        name=_file_name(options["name"] or "output", "--name"),
        prompt=options["prompt"] or "",
        negative=options["negative"] or "",
        embedding=options["embedding"],
        negative_embedding=options["negative_embedding"],
        source=source,
        num_input_frames=given,
        control=control,
        seed=options["seed"] or 0,
        label=options["label"],
    )
    if options["prompts"] is None:
        return (one,)
    if options["prompt"] is not None:
        raise ConfigError("give --prompt or --prompts, not both")
    rows = read_prompts(options["prompts"])
    stem = options["name"] or options["prompts"].stem
    return tuple(
        _row(replace(one, name=f"{stem}_{i:04d}", seed=one.seed + i), row, options["prompts"]) for i, row in enumerate(rows)
    )


def _file_name(name: str, option: str) -> str:
    if Path(name).name != name:
        raise ConfigError(f"{option} {name!r} must be a file's name, without folders")
    return name


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts: lines of text, or of json."""
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: no such file")
    lines = [(i, line.strip()) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {path}: is empty")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in lines]
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--prompts {path}, line {number}: is no json ({error})") from None
        if not isinstance(row, dict):
            raise ConfigError(f"--prompts {path}, line {number}: is no json object")
        rows.append(row)
    return rows


_ROW = (
    "prompt", "name", "visual_input", "seed", "negative_prompt", "num_input_frames", "control_overrides", "embedding", "label",
)  # fmt: skip


def _row(clip: ClipRequest, row: Mapping[str, Any], path: Path) -> ClipRequest:
    unknown = sorted(set(row) - set(_ROW))
    if unknown:
        raise ConfigError(f"--prompts {path}: a row has '{unknown[0]}'; known are {', '.join(_ROW)}")
    changes: dict[str, Any] = {}
    names = {name: name for name in ("prompt", "seed", "num_input_frames", "label")} | {"negative_prompt": "negative"}
    changes |= {ours: row[theirs] for theirs, ours in names.items() if theirs in row}
    if "name" in row:
        changes["name"] = _file_name(str(row["name"]), f"--prompts {path}: name")
    changes |= {"embedding": Path(row["embedding"])} if "embedding" in row else {}
    if "visual_input" in row:
        changes["source"] = Path(row["visual_input"])
        if not clip.control and "num_input_frames" not in row:
            changes["num_input_frames"] = max(clip.num_input_frames, 1)
    if row.get("control_overrides"):
        control = dict(clip.control)
        for name, entries in row["control_overrides"].items():
            control[name] = control_of(name, entries, control.get(name, Control()), lambda text: None)
        changes["control"] = control
    return replace(clip, **changes)


def _control(text: str) -> tuple[str, Control]:
    name, _, path = text.partition("=")
    return name, Control(Path(path) if path else None)
