"""Qwen-Image on the real diffusers class, `QwenImageTransformer2DModel`: a rectified flow over pictures, B C H W or B C 1 H W.

Two by two latents make a token, as in Flux. Upstream guides it in a way of its own: see `guided_at_length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Denoiser, Path, Prediction, RectifiedFlow
from fewstep.diffusion.denoiser import Around
from fewstep.diffusion.guidance import with_and_without
from fewstep.diffusion.path import working_dtype
from fewstep.networks.contract import DiffusersSpec, Distillation, Scheduling, Traits
from fewstep.networks.families.flux import as_map, packed, unpacked
from fewstep.networks.families.upstream import FlowAdapter, as_picture, enters_in_compute_dtype, needed, refuse_given
from fewstep.networks.taps import block_outputs, text_and_picture


@dataclass(frozen=True)
class QwenImage(FlowAdapter):
    module: nn.Module  # QwenImageTransformer2DModel

    @property
    def traits(self) -> Traits:
        targets = (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "img_mlp.net.0.proj",
            "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
        )  # fmt: skip
        return Traits(lora_targets=targets, scheduling=Scheduling(sends_sigmas=True))

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        refuse_given(cond, "Qwen-Image")
        picture, time = as_picture(x, t, "Qwen-Image")
        grid = (picture.shape[2] // 2, picture.shape[3] // 2)
        with block_outputs(self.module, self.blocks, taps, text_and_picture) as outputs:
            raw = self.module(
                hidden_states=packed(picture),
                encoder_hidden_states=needed(cond, "text", "Qwen-Image", "its prompt (B, tokens, channels)"),
                encoder_hidden_states_mask=None if cond.text_mask is None else cond.text_mask.bool(),
                timestep=time.float(),
                img_shapes=[[(1, *grid)]] * len(x),
                return_dict=False,
            )[0]
        features = tuple(as_map(outputs[i][1], x) for i in taps)
        return Prediction(x, t, self.path, unpacked(raw.to(x.dtype), x).reshape(x.shape), features)


def guided_at_length(denoiser: Denoiser, negative: Condition, w: float) -> Denoiser:
    """uncond + w (cond - uncond), every token of it scaled to the length it has in cond: how upstream guides Qwen-Image."""
    return _GuidedAtLength(denoiser, negative, w)


@dataclass(frozen=True)
class _GuidedAtLength(Around):
    inner: Denoiser
    negative: Condition
    w: float

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        first, without = with_and_without(self.inner, self.negative, x_t, t, cond, taps=taps, cache=cache)
        x, with_text = first.x_t, first.velocity
        target = packed(with_text.reshape(len(x), -1, *x.shape[-2:]))
        mixed = packed((without + self.w * (with_text - without)).reshape(len(x), -1, *x.shape[-2:]))
        mixed = mixed * (target.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return replace(first, velocity=unpacked(mixed, x).reshape(x.shape))


@kind("qwen_image", group="network")
@dataclass(frozen=True)
class QwenImageSpec(DiffusersSpec):
    """A QwenImageTransformer2DModel: from a diffusers folder or hub id, or random of the size given; that of Qwen-Image."""

    diffusers_class: ClassVar[str] = "QwenImageTransformer2DModel"
    path: ClassVar[Path] = RectifiedFlow()
    latent_channels: int = 16
    num_heads: int = 24
    head_dim: int = 128
    num_layers: int = 60
    text_dim: int = 3584  # Qwen2.5-VL 7B
    rotary_dims: tuple[int, int, int] = (16, 56, 56)  # of the head's channels

    @property
    def distillation(self) -> Distillation:
        return Distillation(guidance=4.0)  # its pipelines'

    def build(self) -> QwenImage:
        module = self.in_diffusers(
            "QwenImageTransformer2DModel",
            in_channels=4 * self.latent_channels,
            out_channels=self.latent_channels,
            num_layers=self.num_layers,
            attention_head_dim=self.head_dim,
            num_attention_heads=self.num_heads,
            joint_attention_dim=self.text_dim,
            axes_dims_rope=self.rotary_dims,
        )
        return QwenImage(enters_in_compute_dtype(module, lambda qwen: qwen.img_in.weight))


QWEN_IMAGE = QwenImageSpec()  # the published network
