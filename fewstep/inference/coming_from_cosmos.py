"""The inference commands of the original Cosmos tools, in our words: option names, their json files, their guidance.

    --controlnet_specs FILE    Transfer1: controls by name; every other entry is an option of the command
    -i FILE                    Predict2.5, Transfer2.5: the same under other names; its paths begin at the folder of FILE

Cosmos writes guidance as cond + g (cond - uncond), we as uncond + w (cond - uncond), w = g + 1. --guidance is w; in a command
with an option that only Cosmos has (--checkpoint_dir, --video_save_name, --controlnet_specs, ..) it is g, which is printed, and
a teacher without it takes the default of the original command (`Traits.guidance`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError
from fewstep.errors import UserError
from fewstep.untrusted.text import read_json, read_text

Print = Callable[[str], None]
ALIASES = {  # theirs, and those of diffusers and FastGen: ours. An underscore for a dash is understood everywhere
    "prompt_file": "prompts", "batch_input_path": "prompts",
    "input_image_or_video_path": "input", "input_video_path": "input", "input_path": "input", "video_path": "input",
    "video_save_folder": "out", "output_dir": "out", "save_root": "out", "video_save_name": "name",
    "num_inference_steps": "num-steps", "guidance_scale_2": "guidance-low",
    "num_video_frames": "num-frames", "num_output_frames": "num-frames",
    "chunk_size": "chunk-frames", "num_frames_per_chunk": "chunk-frames", "num_video_frames_per_chunk": "chunk-frames",
    "chunk_overlap": "overlap", "num_conditional_frames": "overlap", "num_ar_conditional_frames": "overlap",
    "tokenizer_dir": "codec", "save_input_noise": "save-noise",
}  # fmt: skip
ALWAYS = ("offload_text_encoder_model", "offload_prompt_upsampler")  # prompts are read first, and what reads them is released
OF_THE_USER = (  # what runs code, where files go, what judges: not taken from a file of a clip
    *("config", "out", "output-file", "o", "guardrail", "disable-guardrail", "upsampler", "prompt-upsampler-dir"),
    *("spec", "i", "controlnet-specs"),
)
WITHOUT_EFFECT = {"benchmark": "every clip's seconds are in its .json"}
COSMOS_ONLY = {
    "checkpoint_dir", "diffusion_transformer_dir", "tokenizer_dir", "input_image_or_video_path", "video_save_name",
    "video_save_folder", "batch_input_path", "use_distilled", "num_video_frames", "controlnet_specs", "disable_guardrail",
    "disable_prompt_upsampler", "prompt_upsampler_dir", "upsample_prompt", "offload_diffusion_transformer", "offload_tokenizer",
    "offload_guardrail_models", *ALWAYS, *WITHOUT_EFFECT,
}  # fmt: skip
_GIVEN = {"text2world": 0, "image2world": 1, "video2world": 5}  # frames of pixels: 0, 1 and 2 latent frames
PRESETS = ("none", "very_low", "low", "medium", "high", "very_high")
PRESET_OF = {"canny_threshold": "edge", "blur_strength": "vis"}  # and the control that it belongs to
_CONTROL_WITHOUT_EFFECT = {
    "ckpt_path": "branches come with the model",
    "control_weight_prompt": "weights are numbers, they are not made from words",
}


@dataclass(frozen=True)
class Control:
    """A control video of one clip."""

    source: Path | None = None  # None: made from the input video
    weight: float = 1.0
    preset: str | None = None  # of one that is made; None: medium


def in_our_words(arguments: Sequence[str], options: Container[str], tell: Print) -> tuple[list[str], list[str]]:
    """The arguments with the names of our `options`, and the names among them that only Cosmos has."""
    ours: list[str] = []
    cosmos: list[str] = []
    for argument in arguments:
        if argument in ("-i", "--spec"):
            cosmos.append("-i")
        if not argument.startswith("--"):
            ours += [argument] if argument != "-" else []
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        theirs = name.replace("-", "_")
        if theirs in COSMOS_ONLY:
            cosmos.append(f"--{name}")
        if theirs in WITHOUT_EFFECT:
            tell(f"warning: --{name} has no effect: {WITHOUT_EFFECT[theirs]}")
        if not name or theirs in (*ALWAYS, *WITHOUT_EFFECT):
            continue
        own_name = _ours(name)
        ours.append(f"--{own_name if f'--{own_name}' in options else name}{equals}{value}")
    return ours, cosmos


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """The message with the names of options that were typed, where they are other tools' names of ours."""
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name.replace("-", "_") in ALIASES:
            message = re.sub(rf"--{_ours(name)}(?![\w-])", f"--{name} (here --{_ours(name)})", message, count=1)
    return message


def _ours(name: str) -> str:
    return ALIASES.get(name.replace("-", "_"), name.replace("_", "-"))


def guidance_of(guidance: float | None, scale: float | None, cosmos: Sequence[str], tell: Print) -> float | None:
    """w of --guidance, which is Cosmos' g in a command with the names `cosmos`, or of --guidance_scale, which is always w."""
    if guidance is not None and scale is not None:
        raise ConfigError("give --guidance or --guidance_scale, not both")
    if guidance is None or not cosmos:
        return scale if guidance is None else guidance
    w = guidance + 1
    tell(
        f"guidance {guidance:g} is read as Cosmos writes it, because of {min(cosmos)}: w = {w:g} in uncond + w (cond - uncond)"
    )
    return w


def model_of(
    model: str | None,
    released: str | None,
    folder: str | None,
    transformer: str | None,
    controls: Sequence[str],
    is_distilled: bool,
    tell: Print,
) -> str:
    """The model that a command names: MODEL, or --checkpoint_dir and --diffusion_transformer_dir.

    controls: those of --controlnet_specs, whose files lie in a fixed place below --checkpoint_dir.
    """
    if model is None and released is not None:
        raise ConfigError(
            f"--model {released}: names of released models are not known; give its folder: fewstep generate FOLDER"
        )
    if released is not None:
        means = "says only that it is a student" if released.endswith("/distilled") else "has no effect"
        tell(f"warning: --model {released} {means}: the model is {model}")
    if model is None and transformer is not None:
        return str(Path(folder or "checkpoints") / transformer)
    if model is None and controls:
        place = Path(folder or "checkpoints") / "nvidia/Cosmos-Transfer1-7B"
        if is_distilled:
            return str(place / f"{controls[0]}_control_distilled.pt")
        return "+".join([str(place / "base_model.pt"), *(f"{name}={place}/{name}_control.pt" for name in controls)])
    if model is None:
        raise ConfigError("which model? fewstep generate MODEL --prompt ...: a run, a folder of fewstep export or of diffusers")
    return model


def codec_in(codec: str | None, folder: str | None) -> str | None:
    """--tokenizer_dir: in the original commands a folder below --checkpoint_dir."""
    below = None if codec is None or folder is None else Path(folder) / codec
    return codec if below is None or Path(codec or "").exists() or not below.exists() else str(below)


def upsampler_of(upsampler: str | None, place: str | None, folder: str | None, *, asks: bool, is_off: bool) -> str | None:
    """KIND=ADDRESS of the prompt upsampler; None for none.

    place, folder: --prompt_upsampler_dir, in --checkpoint_dir if it is there. asks, is_off: --upsample_prompt and
    --disable_prompt_upsampler.
    """
    if is_off:
        if upsampler is not None or asks:
            raise ConfigError("--disable_prompt_upsampler: leave it out, or the options that ask for an upsampler")
        return None
    if upsampler is None and place is not None:
        inside = Path(folder or "checkpoints") / place
        return f"causal_lm={inside if inside.is_dir() else place}"
    if upsampler is None and asks:
        raise ConfigError("--upsample_prompt: with which model? Add --upsampler causal_lm=FOLDER, a language model")
    return upsampler


def check_prompt(cosmos: Sequence[str], has_upsampler: bool, tell: Print) -> None:
    """Of a command without a prompt: refuses it; of one of Cosmos, whose upsampler describes the picture, says what happens."""
    if not cosmos or has_upsampler:
        raise ConfigError(
            "there is no prompt: give --prompt TEXT (--prompt '' is an empty one), --prompts FILE or --embedding FILE"
        )
    tell("warning: there is no --prompt. The original's upsampler would describe the picture; here the prompt is empty")


def read_specs(path: Path, option: str, tell: Print) -> tuple[list[str], dict[str, Control]]:
    """The options that the file stands for, each as --name=value, and its controls by name."""
    try:
        entries: dict[str, Any] = read_json(path, f"It is what {option} reads: a JSON object of options")
    except UserError as error:
        raise ConfigError(f"{option} {error}") from None
    own = [name for name in entries if _ours(name) in OF_THE_USER]
    if own:
        raise ConfigError(f"{option} {path}: has {own[0]!r}, which no file of a clip may set. Give it on the command line")
    controls: dict[str, Control] = {}
    arguments: list[str] = []
    if option == "-i":
        entries = _from_folder(entries, path.parent)
    for name, value in entries.items():
        if isinstance(value, dict):
            controls[name] = control_of(name, value, Control(), tell)
        elif name == "inference_type":
            arguments.append(f"--num-input-frames={given_of(str(value))}")
        elif name == "prompt_path":
            arguments.append(f"--prompt={_prompt(Path(value), option)}")
        elif value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            arguments.append(f"--{name}={value}")
    return arguments, controls


def _from_folder(entries: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entries, in which a path that exists below `folder` begins there."""
    out: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            out[name] = _from_folder(value, folder)
        elif name.endswith("_path") and isinstance(value, str) and (folder / value).exists():
            out[name] = str(folder / value)
        else:
            out[name] = value
    return out


def given_of(inference_type: str) -> int:
    """How many frames of its input a clip of Predict2.5 begins with."""
    if inference_type not in _GIVEN:
        raise ConfigError(f"inference_type {inference_type!r}: is none of {', '.join(_GIVEN)}")
    return _GIVEN[inference_type]


def control_of(name: str, entries: Mapping[str, Any], before: Control, tell: Print) -> Control:
    """The control `before` with the changes that `entries` of such a file make."""
    weight = entries.get("control_weight", before.weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"control {name}: its weight is {weight!r}; maps of weights (.pt files) are not read, only numbers")
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"control {name}: its weight {weight:g} must not be negative")
    own = [key for key, control in PRESET_OF.items() if control == name]
    keys = {"control_weight", "input_control", "control_path", *own, *_CONTROL_WITHOUT_EFFECT}
    unknown = sorted(set(entries) - keys)
    if unknown:
        raise ConfigError(f"control {name}: has '{unknown[0]}', which is not read; known are {', '.join(sorted(keys))}")
    for key, why in _CONTROL_WITHOUT_EFFECT.items():
        if key in entries:
            tell(f"warning: {key} of control {name} has no effect: {why}")
    source = entries.get("input_control") or entries.get("control_path")
    preset = next((entries[key] for key in own if entries.get(key)), None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"control {name}: its preset {preset!r} is none of {', '.join(PRESETS)}")
    return replace(
        before, source=Path(source) if source else before.source, weight=float(weight), preset=preset or before.preset
    )


@dataclass(frozen=True)
class _Prompt:
    prompt: str


def _prompt(path: Path, option: str) -> str:
    """The text of a file, or of a json file the one under "prompt"."""
    try:
        if path.suffix == ".json":
            return read_json(path, "Give it a 'prompt', a text", _Prompt).prompt
        return read_text(path).strip()
    except (OSError, UserError) as error:
        raise ConfigError(f"{option}: prompt_path {error}") from None
