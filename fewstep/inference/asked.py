"""What is to be generated, from a command line: ours, and those of the tools that the seeds' documents use.

    --prompt TEXT | --prompts FILE.txt (one a line) | FILE.jsonl ({"prompt": .., "visual_input": .., "seed": .., ..})
    --input clip.mp4 --num-input-frames 9       first frames that are given
    --control edge=edge.mp4                     control videos; edge and vis can be made from --input: --control edge

Cosmos writes guidance as cond + g (cond - uncond), we as uncond + w (cond - uncond), w = g + 1. --guidance is w; in a command
that carries names which only Cosmos has (--checkpoint_dir, --video_save_name, --controlnet_specs, ..) it is g, and we say so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from fewstep.config import ConfigError
from fewstep.environment import ranks
from fewstep.inference.specs import Control, control_of, given_of, read_specs

SAMPLERS = ("auto", "euler", "heun", "dpmpp_2m", "unipc", "res_2ab")
# Accepted, so that a command pastes, and without effect: what each would switch off or on is not here.
WITHOUT_EFFECT = {
    "guardrail": "there is no guardrail",
    "offload_guardrail_models": "there is no guardrail",
    "disable_guardrail": "there is no guardrail",
    "disable_prompt_upsampler": "there is no prompt upsampler",
    "offload_prompt_upsampler": "there is no prompt upsampler",
    "prompt_upsampler_dir": "there is no prompt upsampler",
    "upsample_prompt": "there is no prompt upsampler",
    "offload_diffusion_transformer": "models are not moved between stages",
    "offload_tokenizer": "models are not moved between stages",
    "offload_text_encoder_model": "the text encoder is always left after its embeddings are made",
    "benchmark": "every clip's seconds are in its .json",
}
_COSMOS_ONLY = (
    "checkpoint_dir", "diffusion_transformer_dir", "tokenizer_dir", "input_image_or_video_path", "video_save_name",
    "video_save_folder", "batch_input_path", "use_distilled", "num_video_frames", *WITHOUT_EFFECT,
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One clip to be made."""

    name: str
    prompt: str = ""
    negative: str = ""
    embedding: Path | None = None  # of the prompt, instead of a text encoder
    negative_embedding: Path | None = None
    source: Path | None = None  # picture or video whose first frames are given, or that a control is made from
    num_input_frames: int = 0  # given ones, in pixels' frames
    control: Mapping[str, Control] = field(default_factory=dict[str, Control])
    seed: int = 0
    label: int | None = None  # of a class-conditional network


@dataclass(frozen=True)
class Asked:
    """The whole command."""

    model: str
    out: Path
    requests: tuple[Request, ...]
    num_steps: int | None = None  # None: the student's own, or a teacher's 35
    guidance: float = 1.0  # w
    sampler: str = "auto"
    shift: float | None = None  # of the grid, in flow time; None: 5 for video, which Predict2.5 and Wan were trained with
    sigma_max: float | None = None  # where the grid of an EDM network begins; None: its path's end
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
    wants_student: bool = False
    chunk_frames: int | None = None  # frames made at once; longer clips are made chunk after chunk. None: a student's own
    overlap: int | None = None  # frames of the chunk before that a chunk begins with; None: 1
    image_encoder: str | None = None
    network: str | None = None  # which published one the weights of MODEL are; None: as their shapes say
    guidance_low: float | None = None  # w of the low-noise one of two experts; None: the same
    shard: bool = False  # each process holds a part of the weights


def read_command(arguments: Sequence[str], say: Any = None) -> Asked:
    """The command; ConfigError for what it does not know."""
    tell = say or (lambda text: print(text, file=sys.stderr))
    spoken = [argument for argument in arguments if argument not in ("-", "--")]
    options = vars(_parser().parse_args(spoken))
    said = {name for name in _COSMOS_ONLY if any(re.match(f"--{name}(=|$)", argument) for argument in spoken)}
    specs: dict[str, Control] = {}
    for option in ("controlnet_specs", "spec"):
        if options[option] is not None:
            more, specs = read_specs(options[option], "-i" if option == "spec" else f"--{option}", tell)
            options = vars(_parser().parse_args([*more, *spoken]))  # what the command says itself comes last and counts
            said |= {option}
    for name, why in WITHOUT_EFFECT.items():
        if options.pop(name):
            tell(f"warning: --{name} has no effect: {why}")
    for option in ("controlnet_specs", "spec"):
        options.pop(option)
    if options["out"].suffix.lower() in (".mp4", ".png"):
        raise ConfigError(f"--out {options['out']}: names a folder; the clip in it is output.mp4, or with --name NAME NAME.mp4")
    inference_type = options.pop("inference_type")
    if inference_type is not None and options["num_input_frames"] is None:
        options["num_input_frames"] = given_of(inference_type)
    guidance = options.pop("guidance")
    scale = options.pop("guidance_scale")
    if guidance is not None and scale is not None:
        raise ConfigError("give --guidance or --guidance_scale, not both")
    w = float(next((value for value in (guidance, scale) if value is not None), 1.0))
    if guidance is not None and said:
        w = float(guidance) + 1
        told = f"--{min(said)}" if said != {"spec"} else "-i"
        tell(
            f"guidance {float(guidance):g} is read as Cosmos writes it, because of {told}: "
            f"w = {w:g} in uncond + w (cond - uncond)"
        )
    model, released = options.pop("model"), options.pop("released")
    if model is None and released is not None:
        raise ConfigError(
            f"--model {released}: names of released models are not known; give its folder: fewstep generate FOLDER"
        )
    if released is not None:
        tell(f"warning: --model {released} has no effect: the model is {model}")
    folder, transformer = options.pop("checkpoint_dir"), options.pop("diffusion_transformer_dir")
    if model is None and transformer is not None:
        model = str(Path(folder or "checkpoints") / transformer)
    if model is None:
        raise ConfigError("which model? fewstep generate MODEL --prompt ...: a run, a folder of fewstep export or of diffusers")
    num_gpus = options.pop("num_gpus")
    size = ranks().size
    if num_gpus not in (None, size):
        raise ConfigError(f"--num_gpus {num_gpus}: {size} process(es) run. Start it with torchrun --nproc_per_node={num_gpus}")
    requests = _requests(options, specs)
    return Asked(model=model, requests=requests, guidance=w, **{name: options[name] for name in _ASKED})


_ASKED = (
    "out", "num_steps", "sampler", "shift", "sigma_max", "num_frames", "height", "width", "fps", "codec", "text_encoder",
    "max_tokens", "tile", "device", "precision", "quality", "force", "save_noise", "wants_student",
    "chunk_frames", "overlap", "image_encoder", "network", "guidance_low", "shard",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"generate: {message} (fewstep generate --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fewstep generate", description="Videos from a student or a teacher.", allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", help="a run, a folder of fewstep export or of diffusers, a hub id, Cosmos weights")
    add("--network", help="which published Cosmos network MODEL is, where it is files of weights whose shapes fit several")
    add("--prompt", help="text of one clip")
    add("--prompts", "--prompt_file", "--batch_input_path", dest="prompts", type=Path, help=".txt, one a line; or .jsonl")
    add("--negative-prompt", "--negative_prompt", dest="negative", help="what guidance pushes away from")
    add("--embedding", type=Path, help="file of the prompt's embedding, instead of a text encoder")
    add("--negative-embedding", type=Path, dest="negative_embedding")
    add("--label", type=int, help="class, for class-conditional networks")
    inputs = ("--input", "--input_image_or_video_path", "--input_video_path", "--input_path")
    add(*inputs, dest="source", type=Path, help="picture or video that begins the clip, or that a control is made from")
    frames = ("--num-input-frames", "--num_input_frames")
    add(
        *frames, dest="num_input_frames", type=int, help="frames of --input that are given: 1 or 9; all that --control needs: 0"
    )
    add("--control", action="append", default=[], help="NAME=FILE.mp4, or edge or vis alone: made from --input")
    add("--controlnet_specs", type=Path, help="Transfer1's json of controls")
    add("-i", "--spec", dest="spec", type=Path, help="Predict2.5's and Transfer2.5's json of one clip")
    add("--inference-type", "--inference_type", dest="inference_type", help="Predict2.5: text2world, image2world, video2world")
    add("--model", dest="released", help=argparse.SUPPRESS)
    add("-o", "--out", "--video_save_folder", "--output_dir", "--save_root", dest="out", type=Path, default=Path("outputs"))
    add("--name", "--video_save_name", dest="name", help="of the file, without .mp4; of several: NAME_0000, ..")
    add("--num-steps", "--num_steps", "--steps", "--num_inference_steps", dest="num_steps", type=int)
    add("--guidance", type=float, help="w in uncond + w (cond - uncond), 1 is off; g of Cosmos in a command with Cosmos' names")
    add("--guidance_scale", "--guidance-scale", type=float, dest="guidance_scale", help="w, as diffusers and FastGen have it")
    names = ("--guidance-low", "--guidance_scale_2")
    add(*names, type=float, dest="guidance_low", help="w of Wan A14B's low-noise expert; --guidance is the other's")
    add("--seed", type=int, help="of the first clip; each further one has one more")
    add("--sampler", choices=SAMPLERS, default="auto", help="of a teacher; auto: res_2ab on EDM, unipc elsewhere")
    add("--shift", type=float, help="of a teacher's grid")
    add("--sigma-max", "--sigma_max", type=float, dest="sigma_max")
    add("--num-frames", "--num_video_frames", "--num_frames", dest="num_frames", type=int)
    names = ("--chunk-frames", "--chunk_size", "--num_frames_per_chunk", "--num_video_frames_per_chunk")
    add(*names, dest="chunk_frames", type=int, help="frames made at once; a student's own. Longer clips: chunk after chunk")
    names = ("--overlap", "--chunk_overlap", "--num_conditional_frames", "--num_ar_conditional_frames")
    add(*names, dest="overlap", type=int, help="frames that a chunk takes from the one before, 1")
    add("--height", type=int)
    add("--width", type=int)
    add("--fps", type=float)
    add("--codec", "--tokenizer_dir", dest="codec", help="folder or hub id of the autoencoder; the model's own")
    add("--text-encoder", "--text_encoder", dest="text_encoder", help="folder or hub id; the model's own")
    add("--image-encoder", "--image_encoder", dest="image_encoder", help="of Wan 2.1 I2V: a pipeline's folder or hub id")
    add("--max-tokens", type=int, dest="max_tokens")
    add("--tile", type=int, help="pixels along a tile of the codec, to save memory; not exact")
    add("--device")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--quality", default="18", help="of the mp4: a CRF, or lossless")
    add(
        "--num-gpus",
        "--num_gpus",
        dest="num_gpus",
        type=int,
        help="must be torchrun's number of processes, which divide the clips",
    )
    add(
        "--save-noise",
        "--save_input_noise",
        dest="save_noise",
        action="store_true",
        help="keep OUT/noise/NAME.pickle, of variance 1",
    )
    add("--shard", action="store_true", help="torchrun's processes hold a part of the weights each, instead of all of them")
    add("--use_distilled", dest="wants_student", action="store_true", help="refuse a model that is no student")
    add(
        "--force",
        action="store_true",
        help="take a student's number of steps and guidance as told, although it was not trained so",
    )
    add("--checkpoint_dir")
    add("--diffusion_transformer_dir")
    for name in WITHOUT_EFFECT:
        add(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _requests(options: dict[str, Any], specs: Mapping[str, Control]) -> tuple[Request, ...]:
    control = {**specs, **dict(_control(text) for text in options["control"])}
    source, given = options["source"], options["num_input_frames"]
    if given is None:
        given = 1 if source is not None and not control else 0
    if given and source is None and options["prompts"] is None:
        raise ConfigError("--num-input-frames needs --input, the picture or video they are taken from")
    one = Request(
        name=options["name"] or "output",
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
    "prompt",
    "name",
    "visual_input",
    "seed",
    "negative_prompt",
    "num_input_frames",
    "control_overrides",
    "embedding",
    "label",
)


def _row(request: Request, row: Mapping[str, Any], path: Path) -> Request:
    unknown = sorted(set(row) - set(_ROW))
    if unknown:
        raise ConfigError(f"--prompts {path}: a row has '{unknown[0]}'; known are {', '.join(_ROW)}")
    changes: dict[str, Any] = {}
    names = {"prompt": "prompt", "negative_prompt": "negative", "seed": "seed", "num_input_frames": "num_input_frames"}
    changes |= {ours: row[theirs] for theirs, ours in (names | {"label": "label"}).items() if theirs in row}
    if "name" in row:
        if Path(row["name"]).name != row["name"]:
            raise ConfigError(f"--prompts {path}: name {row['name']!r} must be a file's name, without folders")
        changes["name"] = row["name"]
    changes |= {"embedding": Path(row["embedding"])} if "embedding" in row else {}
    if "visual_input" in row:
        changes["source"] = Path(row["visual_input"])
        if not request.control and "num_input_frames" not in row:
            changes["num_input_frames"] = max(request.num_input_frames, 1)
    if row.get("control_overrides"):
        control = dict(request.control)
        for name, told in row["control_overrides"].items():
            control[name] = control_of(name, told, control.get(name, Control()), lambda text: None)
        changes["control"] = control
    return replace(request, **changes)


def _control(text: str) -> tuple[str, Control]:
    name, _, path = text.partition("=")
    return name, Control(Path(path) if path else None)
