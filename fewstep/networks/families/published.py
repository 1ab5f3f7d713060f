"""The published networks: how large each is, what it reads, under which licence it came. Loads neither torch nor a network.

The table is published.yaml, one row a network; tests build every one of them without weights and count its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

FAMILIES: Mapping[str, str] = {  # network= : what it is, in a line
    "cosmos": "Cosmos-Predict; CosmosTransformer3DModel; rectified flow, Predict1 EDM",
    "cosmos_control": "Cosmos-Transfer; the same with control branches; rectified flow, Transfer1 EDM",
    "wan": "Wan 2.1, Wan 2.2 5B; WanTransformer3DModel; rectified flow",
    "anyflow": "Wan as a flow map, with a second time; AnyFlowTransformer3DModel; rectified flow",
    "causal": "any of Wan and Cosmos Predict2, 2.5 with causal attention between chunks of frames",
    "experts": "Wan 2.2 A14B, two networks by noise level; rectified flow",
    "cogvideox": "CogVideoX; CogVideoXTransformer3DModel; VP with zero terminal SNR, v",
    "unet": "SDXL, Stable Diffusion; UNet2DConditionModel; VP, eps or v",
    "flux": "Flux.1; FluxTransformer2DModel; rectified flow",
    "qwen_image": "Qwen-Image; QwenImageTransformer2DModel; rectified flow",
    "dit": "DiT, SiT (family=flow); DiTTransformer2DModel; VP, eps, or rectified flow",
    "tiny": "networks of ours, trained from nothing: the toy world's, and an MLP for points",
    "gaussian_mixture": "the analytic teacher: exact answers, no weights",
}

CHECKPOINT = "checkpoint"  # the number in the safetensors header of the published file, as third parties quote it


@dataclass(frozen=True)
class Published:
    """One published network."""

    model: str
    network: str  # kind: network=...
    constant: str  # below fewstep.networks.families: the specification of this size
    parameters: int  # of one network, without control branches
    reads: tuple[str, ...]  # fields of Condition; masks and padding are not named
    license: str  # of the published weights, as a note: the model card decides
    known_from: str
    networks: int = 1  # that many networks, each of these parameters
    branch: int = 0  # parameters of each control branch besides

    @property
    def size(self) -> str:
        """The parameters in words."""
        times = f"{self.networks} x " if self.networks > 1 else ""
        return f"{times}{self.parameters:,}" + (f" + {self.branch:,} a control" if self.branch else "")

    def spec(self) -> Any:  # Any: the specification of any family
        """What builds this network; here, and not before, its family is imported."""
        file, _, name = self.constant.rpartition(".")
        models = getattr(import_module(f"fewstep.networks.families.{file}"), name)
        return models[self.model] if isinstance(models, Mapping) else models


PUBLISHED: tuple[Published, ...] = tuple(
    Published(**row | {"reads": tuple(row["reads"])})
    for row in yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
)
