"""Stable Diffusion 1.5, 2.1 and SDXL on the real diffusers class, `UNet2DConditionModel`: networks of the VP family.

They make pictures: B C H W, or clips of one frame, B C 1 H W. SDXL also receives three sizes (cond.size) and reads the
pooled vector of its second text encoder (cond.pooled). All attend to every token, padding too, as upstream has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import VP, Cache, Path, Prediction
from fewstep.diffusion.path import working_dtype
from fewstep.errors import UserError
from fewstep.networks.contract import DiffusersSpec, Distillation, Scheduling, Traits
from fewstep.networks.families.upstream import (
    Adapter,
    as_picture,
    enters_in_compute_dtype,
    needed,
    of_v,
    refuse_given,
    table_index,
)
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.networks.taps import block_outputs

PIXELS_PER_LATENT = 8  # of their autoencoders


@dataclass(frozen=True)
class Unet(Adapter):
    module: nn.Module  # UNet2DConditionModel
    path: Path = VP()
    predicts: Literal["eps", "v"] = "eps"  # SD 2.1 at 768 pixels: v

    part: ClassVar[str] = "unet"

    @property
    def traits(self) -> Traits:
        return Traits(
            lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
            scheduling=Scheduling(predicts=self.predicts),
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """From the picture's size down, the middle, and up again: a tap's feature is what the block hands to the next."""
        unet: Any = self.module  # Any: diffusers' stubs do not know its parts
        return (*unet.down_blocks, unet.mid_block, *unet.up_blocks)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        refuse_given(cond, "a UNet of Stable Diffusion")
        picture, time = as_picture(x, t, "a UNet of Stable Diffusion")
        extra: dict[str, Any] = {}
        if self.module.config.addition_embed_type == "text_time":  # pyright: ignore[reportAttributeAccessIssue]  # an attribute of a module
            pooled = needed(cond, "pooled", "SDXL", "the pooled vector of its prompt")
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": self._sizes(cond, picture)}
        with block_outputs(self.module, self.blocks, taps, self._stand_in) as outputs:
            raw = self.module(
                sample=picture,
                timestep=table_index(time),
                encoder_hidden_states=needed(cond, "text", "Stable Diffusion", "its prompt (B, 77, channels)"),
                return_dict=False,
                **extra,
            )[0]
        raw = raw.to(x.dtype).reshape(x.shape)
        maps = (outputs[i][0] if isinstance(outputs[i], tuple) else outputs[i] for i in taps)
        features = tuple(feature if x.ndim == 4 else feature[:, :, None] for feature in maps)
        if self.predicts == "v":
            return of_v(raw, x, t, self.path, features)
        return Prediction.of("eps", raw, x, t, self.path, features)

    def _stand_in(self, block: Any, hidden_states: Tensor, *others: object, **more: Any) -> Any:  # Any: diffusers' blocks
        """As many outputs as the block has and, where one that runs reads them, of the same shape."""
        unet: Any = self.module
        if block is unet.mid_block:
            return hidden_states
        if "res_hidden_states_tuple" in more:  # on the way up; the first of the last block's has the shape of its output
            return more["res_hidden_states_tuple"][0]
        return hidden_states, (hidden_states,) * (len(block.resnets) + len(block.downsamplers or ()))

    @staticmethod
    def _sizes(cond: Condition, picture: Tensor) -> Tensor:
        """cond.size, or where there is none the picture's own size, uncropped: upstream's default."""
        if cond.size is not None:
            return cond.size.to(picture.device).float()
        height, width = (PIXELS_PER_LATENT * size for size in picture.shape[2:])
        return torch.tensor([[height, width, 0.0, 0.0, height, width]], device=picture.device).expand(len(picture), -1)


@kind("unet", group="network")
@dataclass(frozen=True)
class UnetSpec(DiffusersSpec):
    """A UNet2DConditionModel: from a diffusers folder or hub id, or random of the size given. The defaults are SDXL."""

    diffusers_class: ClassVar[str] = "UNet2DConditionModel"
    pipeline_part: ClassVar[str] = "unet"
    in_force: ClassVar[tuple[str, ...]] = ("predicts", "zero_terminal_snr", "pooled_dim")
    predicts: Literal["eps", "v"] = "eps"
    zero_terminal_snr: bool = False  # some descendants of SD 2.1 and SDXL, with predicts=v
    latent_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280)  # of each level, from the picture's own size down
    with_attention: tuple[bool, ...] = (False, True, True)  # which levels attend to the text
    layers_per_block: int = 2
    transformer_layers: tuple[int, ...] = (1, 2, 10)
    num_heads: tuple[int, ...] = (5, 10, 20)
    norm_groups: int = 32
    text_dim: int = 2048
    linear_projection: bool = True  # SD 1.5 False
    pooled_dim: int | None = 1280  # None: no pooled text and no sizes (SD 1.5, 2.1)
    size_dim: int = 256  # of the embedding of each of the six sizes
    sample_size: int = 128

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> UnetSpec:
        """The scheduler of a pipeline says what the network predicts, and on which table."""
        scheduler = folder.scheduler
        kinds: dict[str, Literal["eps", "v"]] = {"epsilon": "eps", "v_prediction": "v"}
        name = scheduler.get("prediction_type", "epsilon")
        table = scheduler.get("beta_schedule", "scaled_linear")
        if name not in kinds or table != "scaled_linear":
            raise UserError(f"{folder.address}: its UNet predicts '{name}' on a table '{table}', for which there is no adapter")
        zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
        pooled = cls.pooled_dim if folder.denoiser.get("addition_embed_type") == "text_time" else None
        return cls(pretrained=folder.address, predicts=kinds[name], zero_terminal_snr=zero_snr, pooled_dim=pooled)

    @property
    def path(self) -> Path:
        return VP("scaled_linear", zero_terminal_snr=self.zero_terminal_snr)

    @property
    def distillation(self) -> Distillation:
        negative = "empty" if self.pooled_dim is None else "zeros"  # force_zeros_for_empty_prompt of SDXL's pipeline
        return Distillation(guidance=8.0, negative=negative, lr=5e-5, critic_lr=5e-5)  # FastGen, SDXL

    def build(self) -> Unet:
        extra: dict[str, Any] = {}
        if self.pooled_dim is not None:
            extra = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": self.size_dim,
                "projection_class_embeddings_input_dim": 6 * self.size_dim + self.pooled_dim,
            }
        module = self.in_diffusers(
            "UNet2DConditionModel",
            "unet",
            sample_size=self.sample_size,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            block_out_channels=self.widths,
            down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in self.with_attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(self.with_attention)),
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_groups,
            cross_attention_dim=self.text_dim,
            use_linear_projection=self.linear_projection,
            transformer_layers_per_block=self.transformer_layers,
            attention_head_dim=self.num_heads,  # it is the number of heads: upstream's historical name
            **extra,
        )
        return Unet(enters_in_compute_dtype(module, lambda unet: unet.conv_in.weight), self.path, self.predicts)


# The published networks.
SDXL = UnetSpec()
SD_1_5 = UnetSpec(
    widths=(320, 640, 1280, 1280),
    with_attention=(True, True, True, False),
    transformer_layers=(1, 1, 1, 1),
    num_heads=(8, 8, 8, 8),
    text_dim=768,
    linear_projection=False,
    pooled_dim=None,
    sample_size=64,
)
SD_2_1 = replace(SD_1_5, predicts="v", num_heads=(5, 10, 20, 20), text_dim=1024, linear_projection=True, sample_size=96)
