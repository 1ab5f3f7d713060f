"""A network family in one file of your own: LTX-Video (HaCohen et al. 2024, arXiv:2501.00103) over the class of diffusers.

    fewstep train --config examples/my_network.py experiment=my_ltx_dmd2
    fewstep export RUN --out student --base PIPELINE --config examples/my_network.py
    fewstep generate student --prompt "a red ball" --config examples/my_network.py

A rectified flow over latents B C T H W. Each latent is one token, and the class receives 1000 t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind, recipe
from fewstep.data.mock import Mock
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import working_dtype
from fewstep.methods import DMD2
from fewstep.networks.contract import DiffusersSpec, Traits
from fewstep.networks.families.upstream import FlowAdapter, enters_in_compute_dtype, needed, one_time, refuse_given
from fewstep.networks.roles import Networks
from fewstep.networks.taps import block_outputs
from fewstep.training.run import Job, Run, Trainer

FPS = 25.0  # of the clips it was trained on
SCALE = (8, 32, 32)  # frames and pixels per latent of its codec


@dataclass(frozen=True)
class Ltx(FlowAdapter):
    module: nn.Module  # LTXVideoTransformer3DModel

    @property
    def traits(self) -> Traits:
        return Traits(lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"))

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        refuse_given(cond, "LTX-Video")
        x = x_t.to(working_dtype(x_t))
        frames, height, width = x.shape[2:]
        text = needed(cond, "text", "LTX-Video", "its prompt (B, tokens, channels)")
        with block_outputs(self.module, self.blocks, taps) as outputs:
            raw = self.module(
                hidden_states=x.flatten(2).transpose(1, 2),
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(text.shape[:2]).to(x) if cond.text_mask is None else cond.text_mask.to(x),
                timestep=(1000 * one_time(t, "LTX-Video").double()).float(),
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(SCALE[0] / FPS, *SCALE[1:]),
                return_dict=False,
            )[0]
        velocity, *features = (
            tokens.transpose(1, 2).unflatten(2, (frames, height, width)) for tokens in (raw, *(outputs[i] for i in taps))
        )
        return Prediction(x, t, self.path, velocity.to(x.dtype), tuple(features))


@kind("ltx", group="network")
@dataclass(frozen=True)
class LtxSpec(DiffusersSpec):
    """An LTXVideoTransformer3DModel: from a diffusers folder or hub id, or random of the size given; that of 0.9."""

    diffusers_class: ClassVar[str] = "LTXVideoTransformer3DModel"
    path: ClassVar[Path] = RectifiedFlow()

    latent_channels: int = 128
    num_heads: int = 32
    head_dim: int = 64
    num_layers: int = 28
    text_dim: int = 4096  # T5-XXL

    def build(self) -> Ltx:
        module = self.in_diffusers(
            "LTXVideoTransformer3DModel",
            in_channels=self.latent_channels,
            out_channels=self.latent_channels,
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            cross_attention_dim=self.num_heads * self.head_dim,
            num_layers=self.num_layers,
            caption_channels=self.text_dim,
        )
        return Ltx(enters_in_compute_dtype(module, lambda ltx: ltx.proj_in.weight))


@recipe("my_ltx_dmd2")
def my_ltx_dmd2() -> Run:
    """DMD2 of LTX-Video on random latents of its shapes; a run on it learns nothing until `data` names clips."""
    return Run(
        job=Job(project="examples", group="my", name="my_ltx_dmd2"),
        method=DMD2(guidance=3.0),
        networks=Networks(teacher=LtxSpec()),
        data=Mock((128, 4, 16, 24), (128, 4096), fps=FPS),
        trainer=Trainer(max_iter=100, batch_size=1),
    )
