"""The json files that the inference tools of Cosmos are given: one clip, its controls, and arguments of the command.

--controlnet_specs FILE    Transfer1: controls by name, everything else is an argument of the command
-i FILE                    Predict2.5, Transfer2.5: the same under other names
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError

# Their words for a clip, and ours; what is not here is an argument of the command under its own name.
_WORDS = {
    "video_path": "input_video_path",
    "input_path": "input_video_path",
    "num_output_frames": "num_frames",
}
_GIVEN = {"text2world": 0, "image2world": 1, "video2world": 5}  # frames of pixels: 0, 1 and 2 latent frames
_WITHOUT_EFFECT = {  # of a control
    "ckpt_path": "branches come with the model",
    "control_weight_prompt": "weights are numbers, they are not made from words",
}


@dataclass(frozen=True)
class Control:
    source: Path | None = None  # None: made from the input video
    weight: float = 1.0
    preset: str | None = None  # of one that is made; None: medium


def read_specs(path: Path, option: str, tell: Callable[[str], None]) -> tuple[list[str], dict[str, Control]]:
    """The arguments that the file stands for, each as --name=value, and its controls by name."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None
    if not isinstance(told, dict):
        raise ConfigError(f"{option} {path}: is no json object")
    controls: dict[str, Control] = {}
    arguments: list[str] = []
    for name, value in told.items():
        if isinstance(value, dict):
            controls[name] = control_of(name, value, Control(), tell)
        elif name == "inference_type":
            arguments.append(f"--num_input_frames={given_of(str(value))}")
        elif name == "prompt_path":
            arguments.append(f"--prompt={_prompt(Path(value), option)}")
        elif value is True:
            arguments.append(f"--{name}")
        elif value is not False and value is not None:
            arguments.append(f"--{_WORDS.get(name, name)}={value}")
    return arguments, controls


def given_of(inference_type: str) -> int:
    """How many frames of its input a clip of Predict2.5 begins with."""
    if inference_type not in _GIVEN:
        raise ConfigError(f"inference_type {inference_type!r}: is none of {', '.join(_GIVEN)}")
    return _GIVEN[inference_type]


def control_of(name: str, told: Mapping[str, Any], before: Control, tell: Callable[[str], None]) -> Control:
    """One control as such a file tells it; what is not told stays as it was."""
    weight = told.get("control_weight", before.weight)
    if not isinstance(weight, int | float):
        raise ConfigError(f"control {name}: its weight is {weight!r}; maps of weights (.pt files) are not read, only numbers")
    known = {"control_weight", "input_control", "control_path", "canny_threshold", "blur_strength", *_WITHOUT_EFFECT}
    unknown = sorted(set(told) - known)
    if unknown:
        raise ConfigError(f"control {name}: has '{unknown[0]}', which is not read; known are {', '.join(sorted(known))}")
    for key, why in _WITHOUT_EFFECT.items():
        if key in told:
            tell(f"warning: {key} of control {name} has no effect: {why}")
    source = told.get("input_control") or told.get("control_path")
    preset = told.get("canny_threshold") or told.get("blur_strength")
    return replace(
        before, source=Path(source) if source else before.source, weight=float(weight), preset=preset or before.preset
    )


def _prompt(path: Path, option: str) -> str:
    """The text of a file, or of a json file the one under "prompt"."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: prompt_path {path}: {error}") from None
    if path.suffix != ".json":
        return text.strip()
    told = json.loads(text)
    if not isinstance(told, dict) or not isinstance(told.get("prompt"), str):
        raise ConfigError(f"{option}: prompt_path {path}: holds no 'prompt'")
    return told["prompt"]
