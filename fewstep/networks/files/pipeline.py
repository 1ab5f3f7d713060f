"""A folder of diffusers, or a repository on the hub: a whole pipeline, or a network alone. Its small json files, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.networks.files import hub
from fewstep.untrusted.text import read_json

_ADVICE = "Copy that folder again"


@dataclass(frozen=True)
class PipelineFolder:
    address: str  # a folder, or OWNER/NAME on the hub

    @property
    def path(self) -> Path:
        return Path(self.address)

    @property
    def pipeline(self) -> str:
        """The class of the pipeline; "" for a network alone, or a pipeline whose code lies in the folder."""
        name = self.index.get("_class_name", "")
        return name if isinstance(name, str) else ""

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """num_frames, height and width of the clips that it was trained on, where model_index.json says so.

        It does under a name with an underscore, which diffusers passes over.
        """
        sizes = self.index.get("_trained_on")
        return sizes if isinstance(sizes, dict) else {}

    @property
    def has_zeros_for_no_prompt(self) -> bool:
        """Whether its unconditional prompt is zeros, and not the empty text: Stable Diffusion XL, unless its file says no."""
        return self.pipeline.startswith("StableDiffusionXL") and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """model_index.json; {} for a network alone."""
        return self.read("model_index.json")

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The configuration of the pipeline's scheduler; {} where there is none."""
        return self.read("scheduler/scheduler_config.json")

    @cached_property
    def denoiser(self) -> Mapping[str, Any]:
        """config.json of its denoiser."""
        if self.path.is_dir():
            for part in ("transformer", "unet", ""):
                if (self.path / part / "config.json").is_file():
                    return self.read(f"{part}/config.json" if part else "config.json")
            raise UserError(f"no model at {self.address}: it has no transformer/, no unet/ and no config.json")
        hub.expect_id(self.address, "model")
        part = "transformer" if "transformer" in self.index else "unet"
        return self.read(f"{part}/config.json") or self.read("config.json")

    def read(self, name: str) -> Mapping[str, Any]:
        """A JSON file; {} where there is none."""
        if self.path.is_dir():
            return read_json(self.path / name, _ADVICE) if (self.path / name).is_file() else {}
        return hub.read_json(self.address, name) or {}


def is_diffusers_folder(folder: Path) -> bool:
    """Whether it holds a pipeline, or a network alone. Downloads of the original Cosmos have a config.json beside model.pt."""
    if any((folder / name).exists() for name in ("model_index.json", "transformer", "unet")):
        return True
    return (folder / "config.json").exists() and not (folder / "model.pt").is_file()
