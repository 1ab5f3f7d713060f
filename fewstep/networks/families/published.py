"""The published networks: how large each is, what it reads, under which licence it came. Loads neither torch nor a network.

`parameters` is what the class holds when it is built at that size; tests build every one of them without weights and count
(tests/networks/test_real_sizes.py, test_cosmos_models.py), and `known_from` says what that count was held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

FAMILIES: Mapping[str, str] = {  # network= : what it is, in a line
    "cosmos": "Cosmos-Predict; CosmosTransformer3DModel; rectified flow, Predict1 EDM",
    "cosmos_control": "Cosmos-Transfer; the same with control branches; rectified flow, Transfer1 EDM",
    "wan": "Wan 2.1, Wan 2.2 5B; WanTransformer3DModel; rectified flow",
    "experts": "Wan 2.2 A14B, two networks by noise level; rectified flow",
    "cogvideox": "CogVideoX; CogVideoXTransformer3DModel; VP with zero terminal SNR, v",
    "unet": "SDXL, Stable Diffusion; UNet2DConditionModel; VP, eps or v",
    "flux": "Flux.1; FluxTransformer2DModel; rectified flow",
    "qwen_image": "Qwen-Image; QwenImageTransformer2DModel; rectified flow",
    "dit": "DiT, SiT (family=flow); DiTTransformer2DModel; VP, eps, or rectified flow",
    "tiny": "networks of ours, trained from nothing: the toy world's, and an MLP for points",
    "tokenizer": "the toy world's video tokenizer",
    "eye": "what that tokenizer's clips are to look right to: convolutions that know the toy world",
    "clip_critic": "what tells that tokenizer's clips from real ones, while both learn",
    "gaussian_mixture": "the analytic teacher: exact answers, no weights",
}

NVIDIA = "NVIDIA Open Model License"
APACHE = "Apache-2.0"
RAIL_M = "CreativeML Open RAIL-M"
RAIL_PP_M = "CreativeML Open RAIL++-M"
COGVIDEOX = "CogVideoX License"
FLUX_DEV = "FLUX.1 [dev] Non-Commercial License"
CC_BY_NC = "CC-BY-NC 4.0"

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
        found = getattr(import_module(f"fewstep.networks.families.{file}"), name)
        return found[self.model] if isinstance(found, Mapping) else found


def _cosmos(model: str, parameters: int, reads: tuple[str, ...], known_from: str, branch: int = 0) -> Published:
    network = "cosmos_control" if branch else "cosmos"
    return Published(model, network, "cosmos.models.MODELS", parameters, reads, NVIDIA, known_from, branch=branch)


PUBLISHED: tuple[Published, ...] = (
    _cosmos("predict1_7b", 7_236_208_640, ("text", "frames", "fps"), "model card: 7B"),
    _cosmos("predict1_14b", 14_267_169_792, ("text", "frames", "fps"), "model card: 14B"),
    _cosmos("predict1_7b_text2world", 7_236_192_256, ("text", "fps"), "model card: 7B"),
    _cosmos("predict1_14b_text2world", 14_267_149_312, ("text", "fps"), "model card: 14B"),
    _cosmos("predict2_2b", 1_956_413_440, ("text", "frames", "fps"), "model card: 2B"),
    _cosmos("predict2_14b", 14_265_285_632, ("text", "frames", "fps"), "model card: 14B"),
    _cosmos("predict2_2b_text2image", 1_956_405_248, ("text",), "model card: 2B"),
    _cosmos("predict2_14b_text2image", 14_265_265_152, ("text",), "model card: 14B"),
    _cosmos("predict2_5_2b", 2_059_174_912, ("text", "frames"), "model card: the same"),
    _cosmos("predict2_5_14b", 14_368_047_104, ("text", "frames"), "model card: 900 more, which are no weights of the class"),
    _cosmos("transfer1_7b", 7_236_208_640, ("text", "frames", "fps", "control"), "its configuration", 890_089_248),
    _cosmos("transfer2_5_2b", 2_413_864_960, ("text", "frames", "control"), "diffusers' conversion script", 471_255_040),
    Published("Wan 2.1 T2V 1.3B", "wan", "wan.network.T2V_1_3B", 1_418_996_800, ("text",), APACHE, CHECKPOINT),
    Published("Wan 2.1 T2V 14B", "wan", "wan.network.T2V_14B", 14_288_491_584, ("text",), APACHE, CHECKPOINT),
    Published(
        "Wan 2.1 I2V 14B", "wan", "wan.network.I2V_14B", 16_394_878_784, ("text", "beside", "image"), APACHE, "model card: 16B"
    ),
    Published(
        "Wan 2.1 FLF2V 14B",
        "wan",
        "wan.network.FLF2V_14B",
        16_395_536_704,
        ("text", "beside", "image"),
        APACHE,
        "model card: 16B",
    ),
    Published("Wan 2.2 TI2V 5B", "wan", "wan.network.TI2V_5B", 4_999_787_712, ("text", "frames"), APACHE, CHECKPOINT),
    Published("Wan 2.2 T2V A14B", "experts", "wan.experts.A14B", 14_288_491_584, ("text",), APACHE, CHECKPOINT, networks=2),
    Published(
        "Wan 2.2 I2V A14B",
        "experts",
        "wan.experts.I2V_A14B",
        14_288_901_184,
        ("text", "beside"),
        APACHE,
        CHECKPOINT,
        networks=2,
    ),
    Published("CogVideoX 2B", "cogvideox", "cogvideox.COGVIDEOX_2B", 1_693_783_872, ("text",), APACHE, "model card: 2B"),
    Published("CogVideoX 5B", "cogvideox", "cogvideox.COGVIDEOX_5B", 5_570_283_072, ("text",), COGVIDEOX, CHECKPOINT),
    Published(
        "CogVideoX 5B I2V",
        "cogvideox",
        "cogvideox.COGVIDEOX_5B_I2V",
        5_570_479_680,
        ("text", "beside"),
        COGVIDEOX,
        "model card: 5B",
    ),
    Published(
        "CogVideoX 1.5 5B", "cogvideox", "cogvideox.COGVIDEOX_1_5_5B", 5_570_676_352, ("text",), COGVIDEOX, "model card: 5B"
    ),
    Published("SDXL", "unet", "unet.SDXL", 2_567_463_684, ("text", "pooled", "size"), RAIL_PP_M, CHECKPOINT),
    Published("Stable Diffusion 1.5", "unet", "unet.SD_1_5", 859_520_964, ("text",), RAIL_M, CHECKPOINT),
    Published("Stable Diffusion 2.1", "unet", "unet.SD_2_1", 865_910_724, ("text",), RAIL_PP_M, CHECKPOINT),
    Published("Flux.1-dev", "flux", "flux.FLUX_DEV", 11_901_408_320, ("text", "pooled"), FLUX_DEV, CHECKPOINT),
    Published("Flux.1-schnell", "flux", "flux.FLUX_SCHNELL", 11_891_178_560, ("text", "pooled"), APACHE, "model card: 12B"),
    Published("Qwen-Image", "qwen_image", "qwen_image.QWEN_IMAGE", 20_430_401_088, ("text",), APACHE, CHECKPOINT),
    Published(
        "DiT-XL/2",
        "dit",
        "dit.DIT_XL_2",
        749_826_464,
        ("label",),
        CC_BY_NC,
        "paper: 675M; diffusers repeats the embedding of time and class in each block",
    ),
)
