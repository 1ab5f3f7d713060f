"""The command line of `fewstep generate`, as a GenerateRequest. Reading it imports no torch.

It is read by argparse, unlike the other verbs: files of specifications (-i, --controlnet-specs) hold options of the same
command, which are read by the same parser before those that the user types; the names of four other tools are understood with
dashes or underscores (coming_from_cosmos.py); and --help shows its sixty options in groups.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from fewstep.config import ConfigError, apply_overrides, choices, load_file, parse
from fewstep.environment import DEVICES, ranks
from fewstep.errors import UserError
from fewstep.files import plain_name, unfit
from fewstep.inference.coming_from_cosmos import (
    Control,
    Print,
    as_typed,
    check_prompt,
    codec_in,
    control_of,
    given_of,
    guidance_of,
    in_our_words,
    model_of,
    read_specs,
    upsampler_of,
)
from fewstep.inference.guardrails import AnyGuardrail, Guardrail
from fewstep.inference.request import OFFLOADED, PRECISIONS, ClipRequest, GenerateRequest, SamplerOptions, read_prompts
from fewstep.inference.upsamplers import AnyUpsampler, Upsampler
from fewstep.networks.files.hub import no_id
from fewstep.solvers import SOLVERS


def read_command(arguments: Sequence[str], say: Print | None = None, checks_files: bool = False) -> GenerateRequest:
    """The request of a `generate` command; ConfigError for what it does not know, and for files that are not there."""
    try:
        request = _request(arguments, say)
        if checks_files:
            codec = request.codec  # of the original commands it lies below --checkpoint_dir
            reason = None if codec is None or Path(codec).is_dir() else no_id(codec)
            if reason is not None:
                raise ConfigError(f"--codec {codec!r}: {reason}")
            request.check_files()
        return request
    except ConfigError as error:
        raise ConfigError(as_typed(str(error), arguments)) from None


def _request(arguments: Sequence[str], say: Print | None) -> GenerateRequest:
    tell = say or (lambda text: print(text, file=sys.stderr))
    parser = _parser()
    words, cosmos = in_our_words(arguments, parser.options(), tell)
    options = vars(parser.parse_args(words))
    specs: dict[str, Control] = {}
    for option in ("controlnet_specs", "spec"):
        if options[option] is not None:
            more, specs = read_specs(options[option], "-i" if option == "spec" else "--controlnet-specs", tell)
            more, names = in_our_words(more, parser.options(), tell)
            options = vars(parser.parse_args([*more, *words]))  # the command itself comes last and counts
            cosmos += names
    if options["out"].suffix.lower() in (".mp4", ".png"):
        raise ConfigError(f"--out {options['out']}: names a folder; the clip in it is output.mp4, or with --name NAME NAME.mp4")
    if options["inference_type"] is not None and options["num_input_frames"] is None:
        options["num_input_frames"] = given_of(options["inference_type"])
    processes = ranks().size
    num = options["num_gpus"]
    if num is not None and num < 1:
        raise ConfigError(f"--num-gpus {num}: at least 1")
    if num not in (None, processes):
        raise ConfigError(f"--num-gpus {num}: {processes} process(es) run. Start it with torchrun --nproc_per_node={num}")
    options["context"] = next((num for num in (options["context"], options["num_gpus"]) if num is not None), 1)
    if options["config"] is not None:
        load_file(options["config"])
    options["guidance"] = guidance_of(options["guidance"], options["guidance_scale"], cosmos, tell)
    folder, transformer = options["checkpoint_dir"], options["diffusion_transformer_dir"]
    options["student_only"] |= (options["released"] or "").endswith("/distilled")
    options["published_guidance"] = bool(cosmos) and options["guidance"] is None
    of_specs = tuple(specs) if options["controlnet_specs"] is not None else ()
    addresses = (options["model"], options["released"], folder, transformer)
    options["model"] = model_of(*addresses, of_specs, options["student_only"], tell)
    options["codec"] = codec_in(options["codec"], folder)
    options["solver"] = None if options["solver"] == "auto" else options["solver"]
    options |= {"guardrails": _guardrails(options), "upsampler": _upsampler(options)}
    options |= {"clips": _clips(options, specs), "sampling": _of(SamplerOptions, options)}
    options["offload"] = frozenset(part for part in OFFLOADED if options["offload"] or options[f"offload_{part}"])
    if all(options[name] is None for name in ("prompt", "prompts", "embedding", "label")):
        check_prompt(cosmos, options["upsampler"] is not None, tell)
    return _of(GenerateRequest, options)


def _of(record: Any, options: Mapping[str, Any]) -> Any:  # Any: a record of request.py, and an instance of it
    return record(**{f.name: options[f.name] for f in fields(record)})


# ---- plug-ins --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plugins:
    guardrail: AnyGuardrail | None = None
    upsampler: AnyUpsampler | None = None


def _guardrails(options: Mapping[str, Any]) -> tuple[Guardrail, ...]:
    if options["guardrail"] and options["disable_guardrail"]:
        raise ConfigError("give --guardrail or --disable_guardrail, not both")
    return tuple(_plugin("guardrail", text, "no clip is made without it") for text in options["guardrail"])


def _upsampler(options: Mapping[str, Any]) -> Upsampler | None:
    text = upsampler_of(
        options["upsampler"], options["prompt_upsampler_dir"], options["checkpoint_dir"],
        asks=options["upsample_prompt"], is_off=options["disable_prompt_upsampler"],
    )  # fmt: skip
    return None if text is None else _plugin("upsampler", text, "no prompt is rewritten without it")


def _plugin(group: str, text: str, without: str) -> Any:  # Any: a guardrail or an upsampler
    """The plug-in that KIND=ADDRESS,setting=value,.. describes; KIND alone for one of the user's that needs no address."""
    name, _, rest = text.partition("=")
    kinds = choices(group)
    if not name:
        raise ConfigError(f"--{group}: which one? {without}. --{group} KIND=ADDRESS; kinds are {', '.join(kinds)}")
    if name not in kinds:
        raise ConfigError(f"--{group} {text}: there is no kind {name!r}; there are {', '.join(kinds)}")
    address, *settings = re.split(r",(?=\w+=)", rest)
    kind: Any = kinds[name]  # Any: a frozen dataclass
    names = [f.name for f in fields(kind)]
    if names and not address:
        raise ConfigError(f"--{group} {text}: give its {names[0]}: --{group} {name}={names[0].upper()}")
    plugin = parse(_Plugins, {group: {"kind": name, **({names[0]: address} if names else {})}})
    return getattr(apply_overrides(plugin, [f"{group}.{setting}" for setting in settings]), group)


# ---- options ---------------------------------------------------------------------------------------------------------


def _number(text: str) -> float:
    """A finite number, as `type` of an option."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(DEVICES, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, cuda, cuda:1, mps ..")
    return text


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: {'is no file' if path.exists() else 'no such file'}")
    return path


def _folder(text: str) -> Path:
    reason = unfit(Path(text), is_folder=True)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {reason}")
    return Path(text)


def _model(text: str) -> str:
    reason = None if Path(text).is_dir() else no_id(text)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}")
    return text


# How options of one kind are read, and what --help calls their values.
_COUNT: dict[str, Any] = {"type": int, "metavar": "N"}
_REAL: dict[str, Any] = {"type": _number, "metavar": "X"}
_WEIGHT: dict[str, Any] = {"type": _number, "metavar": "W"}
_FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
_MODEL: dict[str, Any] = {"type": _model, "metavar": "FOLDER"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"generate: {message} (fewstep generate --help)")

    def options(self) -> set[str]:
        return set(self._option_string_actions)


def _parser() -> _Parser:
    parser = _Parser(
        prog="fewstep generate",
        usage="fewstep generate MODEL --prompt TEXT [options]",
        description="Make videos with a run, an exported student or a teacher. The guide is docs/generate.md.",
        epilog="The options of Cosmos, diffusers and FastGen are understood, too: docs/coming-from-cosmos.md.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    for add in (_of_model, _of_prompts, _of_frames, _of_clip, _of_sampler, _of_plugins, _of_output, _of_memory, _of_others):
        add(parser)
    return parser


def _of_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Model").add_argument
    add("model", nargs="?", metavar="MODEL", help="a run, a folder of fewstep export or of diffusers, a hub id, Cosmos weights")
    add("--network", metavar="NAME", help="the published Cosmos network, where MODEL is weights whose shapes fit several")
    add("--codec", "--tokenizer-dir", metavar="FOLDER", help="folder or hub id of the autoencoder (default: the model's own)")
    add("--text-encoder", "--encoder", **_MODEL, help="folder or hub id of the text encoder (default: the model's own)")
    add("--image-encoder", **_MODEL, help="of Wan 2.1 I2V: a pipeline's folder or hub id (default: the model's own)")
    add("--max-tokens", **_COUNT, help="cut texts to N tokens; embeddings are also padded (default: the encoder's)")
    add("--config", type=_file, metavar="FILE.py", help="file that registers networks, guardrails or controls of your own")
    add("--use-distilled", dest="student_only", action="store_true", help="refuse a model that is no student")


def _of_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Prompts").add_argument
    add("--prompt", metavar="TEXT", help="text of one clip")
    add("--prompts", **_FILE, help="file of prompts, one a line (.txt) or as JSON (.jsonl)")
    help = "text that guidance moves away from (default: the empty text; of SDXL zeros)"
    add("--negative-prompt", dest="negative", metavar="TEXT", help=help)
    add("--embedding", **_FILE, help="embedding of the prompt, instead of a text encoder")
    add("--negative-embedding", **_FILE, help="embedding of the negative prompt (default: zeros)")
    add("--label", **_COUNT, help="class, for class-conditional networks")


def _of_frames(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("First frames and controls").add_argument
    add("--input", dest="source", **_FILE, help="picture or video that begins the clip or makes a control")
    add("--num-input-frames", **_COUNT, help="frames of --input that begin the clip (default: 1; with --control 0)")
    add("--control", action="append", default=[], metavar="NAME[=FILE]", help="a control; without a file made from --input")
    add("--controlnet-specs", **_FILE, help="JSON file of controls, as Cosmos-Transfer1 has it")
    add("-i", "--spec", dest="spec", **_FILE, help="JSON file of one clip, as Predict2.5 and Transfer2.5 have it")
    add("--inference-type", metavar="TYPE", help="of Predict2.5: text2world, image2world or video2world")


def _of_clip(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Clip (default: as a student was trained; a teacher needs frames and size)").add_argument
    add("--num-frames", **_COUNT, help="number of frames")
    add("--height", **_COUNT, help="pixels")
    add("--width", **_COUNT, help="pixels")
    add("--fps", type=_number, metavar="RATE", help="frames per second (default: the student's own, or 24)")
    add("--chunk-frames", **_COUNT, help="frames made at once; a longer clip is made chunk after chunk")
    add("--overlap", **_COUNT, help="frames that a chunk takes from the one before (default: 1)")


def _of_sampler(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Sampling (of a teacher; default: as published)").add_argument
    add("--seed", **_COUNT, help="of the first clip; each further one has one more (default: 0)")
    add("--num-steps", "--steps", **_COUNT, help="steps of the solver")
    add(
        "--sampler",
        dest="solver",
        choices=("auto", *SOLVERS),
        default="auto",
        help=f"the solver: {', '.join(SOLVERS)}",
        metavar="NAME",
    )
    add("--guidance", **_WEIGHT, help="w in uncond + w (cond - uncond); 1 is off (default); beside Cosmos' names g")
    add("--guidance-scale", **_WEIGHT, help="w, as diffusers and FastGen have it")
    add("--guidance-low", **_WEIGHT, help="w of Wan A14B's low-noise expert; --guidance is the other's")
    add("--shift", **_REAL, help="shift of a grid in flow time")
    add("--sigma-max", **_REAL, help="where the grid of an EDM teacher begins")
    add("--force", action="store_true", help="use steps or a guidance that a student was not trained for")


def _of_plugins(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Guardrails and prompt upsampler (default: none)")
    ask: dict[str, Any] = {"nargs": "?", "const": "", "metavar": "KIND=ADDRESS"}
    group.add_argument("--guardrail", action="append", default=[], help="block prompts or clips; may be repeated", **ask)
    group.add_argument("--upsampler", help="rewrite prompts with a language model", **ask)


def _of_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Output").add_argument
    add(
        "--out",
        "-o",
        "--output-file",
        type=_folder,
        default=Path("outputs"),
        metavar="FOLDER",
        help="folder to write (default: outputs)",
    )
    add("--name", help="name of the file, without .mp4 (default: output); of several clips NAME_0000, ..")
    add("--quality", default="18", metavar="CRF", help="of the mp4: 0 (best) to 51, or lossless (default: 18)")
    add("--stream", action="store_true", help="of a causal student: the clip grows while it is made; frames per second")
    add("--switch-at", action="append", default=[], metavar="FRAME:PROMPT", help="of --stream: another prompt from a frame on")
    add("--save-noise", action="store_true", help="write OUT/noise/NAME.pickle, of variance 1")
    add("--save-controls", action="store_true", help="write the controls as they were used: OUT/edge/NAME.mp4")


def _of_memory(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Memory and devices").add_argument
    add("--device", type=_device, metavar="NAME", help="cpu, cuda:0, .. (default: a GPU if there is one)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        metavar="TYPE",
        help="fp32 or bf16, of network and codec (default: fp32)",
    )
    add("--batch-size", type=int, default=1, metavar="N", help="clips that go through the network together (default: 1)")
    add("--tile", **_COUNT, help="pixels along a tile of the codec, to save memory; not exact")
    add("--offload", action="store_true", help="keep each part in memory for its stage only")
    for part, option in OFFLOADED.items():
        add(option, dest=f"offload_{part}", action="store_true", help=f"the same for the {part} alone")
    add("--shard", action="store_true", help="each process of torchrun holds a part of the weights, instead of all of them")
    add("--context", **_COUNT, help="N processes of torchrun make each clip together, for a shorter wait (default: 1)")
    add("--num-gpus", **_COUNT, help="torchrun's number of processes, which make each clip together: --context N")


def _of_others(parser: argparse.ArgumentParser) -> None:
    """Options of other tools that need more than another name."""
    for name in ("--model", "--checkpoint-dir", "--diffusion-transformer-dir", "--prompt-upsampler-dir"):
        parser.add_argument(name, dest="released" if name == "--model" else None, help=argparse.SUPPRESS)
    for name in ("--upsample-prompt", "--disable-prompt-upsampler", "--disable-guardrail"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


# ---- clips -----------------------------------------------------------------------------------------------------------


def _clips(options: Mapping[str, Any], specs: Mapping[str, Control]) -> tuple[ClipRequest, ...]:
    control = {**specs, **dict(_control(text) for text in options["control"])}
    source, num_input_frames = options["source"], options["num_input_frames"]
    if num_input_frames is None:
        num_input_frames = 1 if source is not None and not control else 0
    if num_input_frames and source is None and options["prompts"] is None:
        raise ConfigError("--num-input-frames needs --input, the picture or video they are taken from")
    one = ClipRequest(
        name=_file_name(options["name"] or "output", "--name"),
        prompt=options["prompt"] or "",
        negative=options["negative"],
        embedding=options["embedding"],
        negative_embedding=options["negative_embedding"],
        source=source,
        num_input_frames=num_input_frames,
        control=control,
        seed=options["seed"] or 0,
        label=options["label"],
        switches=tuple(_switch(text) for text in options["switch_at"]),
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


def _switch(text: str) -> tuple[int, str]:
    frame, colon, prompt = text.partition(":")
    if not colon or not frame.strip().isdecimal():
        raise ConfigError(f'--switch-at {text}: is written FRAME:PROMPT, for instance 81:"the ball stops"')
    return int(frame), prompt.strip()


def _file_name(name: str, option: str) -> str:
    try:
        return plain_name(name, option)
    except UserError as error:
        raise ConfigError(str(error)) from None


_ROW = (
    "prompt", "name", "visual_input", "seed", "negative_prompt", "num_input_frames", "control_overrides", "embedding", "label",
    "switch_at",
)  # fmt: skip


def _row(clip: ClipRequest, row: Mapping[str, Any], path: Path) -> ClipRequest:
    unknown = sorted(set(row) - set(_ROW))
    if unknown:
        raise ConfigError(f"--prompts {path}: a row has '{unknown[0]}'; known are {', '.join(_ROW)}")
    for name, type_ in (("prompt", str), ("negative_prompt", str), ("seed", int), ("num_input_frames", int), ("label", int)):
        if name in row and not (isinstance(row[name], type_) and not isinstance(row[name], bool)):
            raise ConfigError(f"--prompts {path}: {name} of a row is {row[name]!r}, which is no {type_.__name__}")
    if not any(name in row for name in ("prompt", "embedding", "label")) and clip.embedding is None and clip.label is None:
        raise ConfigError(f"--prompts {path}: a row has no prompt, which may be empty: {dict(row)}")
    changes: dict[str, Any] = {}
    names = {name: name for name in ("prompt", "seed", "num_input_frames", "label")} | {"negative_prompt": "negative"}
    changes |= {ours: row[theirs] for theirs, ours in names.items() if theirs in row}
    if "name" in row:
        changes["name"] = _file_name(str(row["name"]), f"--prompts {path}: name")
    changes |= {"embedding": Path(row["embedding"])} if "embedding" in row else {}
    if "switch_at" in row:
        rows = row["switch_at"]
        if not isinstance(rows, dict) or not all(isinstance(prompt, str) for prompt in rows.values()):
            raise ConfigError(f'--prompts {path}: switch_at of a row is written {{"FRAME": "PROMPT", ..}}, not {rows!r}')
        changes["switches"] = tuple(_switch(f"{frame}:{prompt}") for frame, prompt in rows.items())
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
