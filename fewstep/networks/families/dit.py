"""Class-conditional DiT on the real diffusers class, `DiTTransformer2DModel`: square pictures, B C H W or B C 1 H W.

DiT (Peebles & Xie 2022, arXiv:2212.09748) is of the VP family and predicts eps. SiT (Ma et al. 2024, arXiv:2401.08740) has the
same layers on a straight path, and diffusers no class of its own for it: `family=flow` calls this class as SiT is called, whose
time runs from noise, 0, to data, 1, and whose velocity points to the data. Both learn a variance too, on as many channels
again, which nothing here reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import VP, Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import working_dtype
from fewstep.errors import UserError
from fewstep.networks.contract import DiffusersSpec, Distillation, Traits
from fewstep.networks.families.upstream import Adapter, as_picture, enters_in_compute_dtype, needed, refuse_given, table_index
from fewstep.networks.taps import block_outputs


@dataclass(frozen=True)
class Dit(Adapter):
    module: nn.Module  # DiTTransformer2DModel
    family: Literal["ddpm", "flow"] = "ddpm"

    @property
    def traits(self) -> Traits:
        return Traits(lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"))

    @property
    def path(self) -> Path:
        return VP("linear") if self.family == "ddpm" else RectifiedFlow()

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        refuse_given(cond, "DiT")
        picture, time = as_picture(x, t, "DiT")
        if picture.shape[2] != picture.shape[3]:
            raise UserError(f"diffusers' DiT makes square pictures only, not {picture.shape[2]} x {picture.shape[3]} latents")
        label = needed(cond, "label", "DiT", "its class (B,; -1 is none)").to(x.device)
        with block_outputs(self.module, self.blocks, taps) as outputs:
            raw = self.module(
                hidden_states=picture,
                timestep=table_index(time) if self.family == "ddpm" else (1 - time.double()).float(),
                class_labels=torch.where(label < 0, config.num_embeds_ada_norm, label),
                return_dict=False,
            )[0]
        raw = raw[:, : config.in_channels].to(x.dtype).reshape(x.shape)
        grid = (picture.shape[2] // config.patch_size,) * 2
        maps = (outputs[i].transpose(1, 2).unflatten(2, grid) for i in taps)
        features = tuple(feature if x.ndim == 4 else feature[:, :, None] for feature in maps)
        if self.family == "flow":
            return Prediction(x, t, self.path, -raw, features)
        return Prediction.of("eps", raw, x, t, self.path, features)


@kind("dit", group="network")
@dataclass(frozen=True)
class DitSpec(DiffusersSpec):
    """A DiTTransformer2DModel: from a diffusers folder or hub id, or random of the size given; that of DiT-XL/2 at 256."""

    diffusers_class: ClassVar[str] = "DiTTransformer2DModel"
    in_force: ClassVar[tuple[str, ...]] = ("family",)
    family: Literal["ddpm", "flow"] = "ddpm"  # flow: SiT
    latent_channels: int = 4
    learned_variance: bool = True
    num_labels: int = 1000
    num_heads: int = 16
    head_dim: int = 72
    num_layers: int = 28
    patch_size: int = 2
    sample_size: int = 32

    @property
    def path(self) -> Path:
        return VP("linear") if self.family == "ddpm" else RectifiedFlow()

    @property
    def distillation(self) -> Distillation:
        return Distillation(guidance=4.0, negative="zeros")  # its paper's

    def build(self) -> Dit:
        module = self.in_diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels,
            out_channels=self.latent_channels * (2 if self.learned_variance else 1),
            num_layers=self.num_layers,
            sample_size=self.sample_size,
            patch_size=self.patch_size,
            num_embeds_ada_norm=self.num_labels,
        )
        for block in module.transformer_blocks:  # while training it would drop a tenth of the classes by itself, unseen by us
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        return Dit(enters_in_compute_dtype(module, lambda dit: dit.pos_embed.proj.weight), self.family)


DIT_XL_2 = DitSpec()  # the published network
