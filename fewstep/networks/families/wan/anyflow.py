"""A flow map on Wan: diffusers' `AnyFlowTransformer3DModel`, which is Wan's network with a second time, r, where a jump ends.

Each time has an embedding, and (1 - gate) t + gate r of both is used, gate .25 (Gu et al. 2026, arXiv:2605.13724). All other
weights have Wan's names, so that it begins with those of a Wan teacher; the second embedding begins as a copy of the first, and
at r = t the answer is Wan's. Exported, a student opens in diffusers' AnyFlowPipeline with FlowMapEulerDiscreteScheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import working_dtype
from fewstep.diffusion.prediction import with_clean_frames
from fewstep.errors import UserError
from fewstep.networks.contract import DiffusersSpec, Traits, with_copies
from fewstep.networks.families.upstream import FlowAdapter, enters_in_compute_dtype
from fewstep.networks.families.wan.network import TEXT_TOKENS, WanSpec, text_of
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.networks.taps import block_outputs

SIZES = {
    "latent_channels": "out_channels", "num_heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "num_layers": "num_layers", "ffn_dim": "ffn_dim", "text_dim": "text_dim", "freq_dim": "freq_dim",
    "max_positions": "rope_max_seq_len", "image_dim": "image_dim",
}  # fmt: skip  # fields here and in diffusers
SECOND, FIRST = "condition_embedder.delta_embedder.", "condition_embedder.time_embedder."


@dataclass(frozen=True)
class AnyFlow(FlowAdapter):
    module: nn.Module  # AnyFlowTransformer3DModel
    text_tokens: int = TEXT_TOKENS  # shorter texts are padded with zeros, which it attends to

    blocks_part = "blocks"

    @property
    def traits(self) -> Traits:
        targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
        return Traits(lora_targets=targets, first_frames="time", reads_end=True, pipeline_class="AnyFlowPipeline")

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        num, channels, frames, height, width = x.shape
        if channels != config.out_channels:
            raise UserError(f"this Wan network works on latents of {config.out_channels} channels, but was given {channels}")
        text = text_of(cond, self.text_tokens)
        begin, end = (1000 * time.double() for time in (t, t if cond.end is None else cond.end))
        begin, end = (time if time.ndim == 2 else time[:, None].expand(num, frames) for time in (begin, end))
        inputs = x
        if cond.frames is not None and cond.frame_mask is not None:
            is_given = cond.frame_mask.bool()
            inputs = torch.where(is_given[:, None, :, None, None], cond.frames.to(x), x)
            begin, end = (torch.where(is_given, 0.0, time) for time in (begin, end))
        _, patch_h, patch_w = config.patch_size
        with block_outputs(self.module, self.blocks, taps) as outputs:
            raw = self.module(
                hidden_states=inputs.transpose(1, 2), timestep=begin.float(), r_timestep=end.float(),
                encoder_hidden_states=text, return_dict=False,
            )[0].transpose(1, 2)  # fmt: skip
        grid = (frames, height // patch_h, width // patch_w)
        features = tuple(outputs[i].unflatten(1, grid).permute(0, 4, 1, 2, 3) for i in taps)
        return with_clean_frames(Prediction(x, t, self.path, raw.to(x.dtype), features), cond.frames, cond.frame_mask)

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return with_copies(weights, FIRST, SECOND)


@kind("anyflow", group="network")
@dataclass(frozen=True)
class AnyFlowSpec(DiffusersSpec):
    """An AnyFlowTransformer3DModel: from a diffusers folder or hub id, or of the size given, to begin as a Wan teacher."""

    diffusers_class: ClassVar[str] = "AnyFlowTransformer3DModel"
    in_force: ClassVar[tuple[str, ...]] = ("text_tokens",)
    path: ClassVar[Path] = RectifiedFlow()

    latent_channels: int = 16
    num_heads: int = 12  # those of Wan 2.1 T2V 1.3B; 14B 40
    head_dim: int = 128
    num_layers: int = 30  # 14B 40
    ffn_dim: int = 8960  # 14B 13824
    text_dim: int = 4096
    text_tokens: int = TEXT_TOKENS
    freq_dim: int = 256
    max_positions: int = 1024
    gate: float = 0.25

    @property
    def starts_as_teacher(self) -> bool:
        return True

    @classmethod
    def like(cls, teacher: WanSpec) -> AnyFlowSpec:
        """The flow map of a Wan network's size. Raises UserError for those that read a picture beside their latents."""
        config = {} if teacher.pretrained is None else PipelineFolder(teacher.pretrained).denoiser
        sizes = {name: config.get(key, getattr(teacher, name)) for name, key in SIZES.items()}
        reads_image, channels = sizes.pop("image_dim") is not None, sizes["latent_channels"]
        if reads_image or config.get("in_channels", channels + teacher.beside_channels) != channels:
            raise UserError("a flow map of a Wan I2V network is not there: diffusers' AnyFlow has no channels for its picture")
        return cls(text_tokens=teacher.text_tokens, **sizes)

    def build(self) -> AnyFlow:
        module = self.in_diffusers(
            "AnyFlowTransformer3DModel",
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            text_dim=self.text_dim,
            freq_dim=self.freq_dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            rope_max_seq_len=self.max_positions,
            gate_value=self.gate,
        )
        exact = ("timestep", "r_timestep")
        return AnyFlow(enters_in_compute_dtype(module, lambda flow: flow.patch_embedding.weight, exact), self.text_tokens)
