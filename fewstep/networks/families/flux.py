"""Flux.1 on the real diffusers class, `FluxTransformer2DModel`: a rectified flow over pictures, B C H W or B C 1 H W.

Two by two latents make a token. Flux.1-dev is distilled from guidance: the scale is an input of the network (`guidance`), not
two calls. In bf16 upstream rounds the time to bf16 inside the class, and so did the code these weights were trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import working_dtype
from fewstep.errors import UserError
from fewstep.networks.contract import DiffusersSpec, Distillation, Scheduling, Traits
from fewstep.networks.families.upstream import FlowAdapter, as_picture, enters_in_compute_dtype, needed, refuse_given
from fewstep.networks.taps import block_outputs, text_and_picture


def packed(picture: Tensor) -> Tensor:
    """B C H W -> B (H/2 W/2) (4 C), the channel before the place within the patch."""
    if picture.shape[2] % 2 or picture.shape[3] % 2:
        raise UserError(f"latents of {picture.shape[2]} x {picture.shape[3]} cannot be cut into patches of 2 x 2")
    patches = picture.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B C h 2 w 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """What `packed` made of a picture of the size of `like`, back."""
    height, width = like.shape[-2] // 2, like.shape[-1] // 2
    patches = tokens.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))  # B h w C 2 2
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@dataclass(frozen=True)
class Flux(FlowAdapter):
    module: nn.Module  # FluxTransformer2DModel
    guidance: float = 3.5  # input of a network that was distilled from guidance; the others have none

    @property
    def traits(self) -> Traits:
        targets = (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
            "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
        )  # fmt: skip
        return Traits(lora_targets=targets, scheduling=Scheduling(sends_sigmas=True))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those with two streams, then those with one."""
        flux: Any = self.module  # Any: diffusers' stubs do not know its parts
        return (*flux.transformer_blocks, *flux.single_transformer_blocks)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        refuse_given(cond, "Flux")
        picture, time = as_picture(x, t, "Flux")
        text = needed(cond, "text", "Flux", "its prompt (B, 512, channels)")
        height, width = picture.shape[2] // 2, picture.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x)
        extra: dict[str, Any] = {}
        if self.module.config.guidance_embeds:  # pyright: ignore[reportAttributeAccessIssue]  # an attribute of a module
            extra["guidance"] = torch.full((len(x),), self.guidance, dtype=torch.float32, device=x.device)
        with block_outputs(self.module, self.blocks, taps, text_and_picture) as outputs:
            raw = self.module(
                hidden_states=packed(picture),
                encoder_hidden_states=text,
                pooled_projections=needed(cond, "pooled", "Flux", "the pooled vector of its prompt"),
                timestep=time.float(),
                img_ids=places,
                txt_ids=places.new_zeros(text.shape[1], 3),
                return_dict=False,
                **extra,
            )[0]
        features = tuple(as_map(outputs[i][1], x) for i in taps)
        return Prediction(x, t, self.path, unpacked(raw.to(x.dtype), x).reshape(x.shape), features)


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """B N D as B D H/2 W/2, or B D 1 H/2 W/2 where `like` is a clip."""
    maps = tokens.transpose(1, 2).unflatten(2, (like.shape[-2] // 2, like.shape[-1] // 2))
    return maps if like.ndim == 4 else maps[:, :, None]


@kind("flux", group="network")
@dataclass(frozen=True)
class FluxSpec(DiffusersSpec):
    """A FluxTransformer2DModel: from a diffusers folder or hub id, or random of the size given; that of Flux.1-dev."""

    diffusers_class: ClassVar[str] = "FluxTransformer2DModel"
    path: ClassVar[Path] = RectifiedFlow()
    in_force: ClassVar[tuple[str, ...]] = ("guidance",)
    guidance: float = 3.5  # input of Flux.1-dev; schnell has none
    guidance_input: bool = True  # dev; schnell False
    latent_channels: int = 16
    num_heads: int = 24
    head_dim: int = 128
    num_layers: int = 19  # with two streams, text and picture
    num_single_layers: int = 38  # with one
    text_dim: int = 4096  # T5-XXL
    pooled_dim: int = 768  # CLIP L
    rotary_dims: tuple[int, int, int] = (16, 56, 56)  # of the head's channels

    @property
    def distillation(self) -> Distillation:
        return Distillation(guidance=1.0)  # its guidance is an input of the network

    def build(self) -> Flux:
        module = self.in_diffusers(
            "FluxTransformer2DModel",
            in_channels=4 * self.latent_channels,
            num_layers=self.num_layers,
            num_single_layers=self.num_single_layers,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.num_heads,
            joint_attention_dim=self.text_dim,
            pooled_projection_dim=self.pooled_dim,
            guidance_embeds=self.guidance_input,
            axes_dims_rope=self.rotary_dims,
        )
        exact = ("timestep", "guidance", "img_ids", "txt_ids")
        return Flux(enters_in_compute_dtype(module, lambda flux: flux.x_embedder.weight, exact), self.guidance)


# The published networks.
FLUX_DEV = FluxSpec()
FLUX_SCHNELL = replace(FLUX_DEV, guidance_input=False)
