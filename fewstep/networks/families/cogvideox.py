"""CogVideoX 2B, 5B and 1.5 on the real diffusers class, `CogVideoXTransformer3DModel`: v-prediction on a VP table whose
signal-to-noise ratio is shifted and ends at zero.

One time for the whole clip. The I2V networks read latents of the picture, zeros after its frame, on as many channels again
(cond.beside). 1.5 patches pairs of frames, so its latents need an even number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import VP, Cache, Path, Prediction
from fewstep.diffusion.path import working_dtype
from fewstep.errors import UserError
from fewstep.networks.contract import Beginning, DiffusersSpec, Distillation, Scheduling, Traits
from fewstep.networks.families.upstream import (
    Adapter,
    enters_in_compute_dtype,
    needed,
    of_v,
    one_time,
    refuse_given,
    table_index,
)
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.networks.taps import block_outputs, picture_and_text

MOTION = 2.0  # input of the "ofs" embedding of 1.5 I2V, always


@dataclass(frozen=True)
class CogVideoX(Adapter):
    module: nn.Module  # CogVideoXTransformer3DModel
    path: Path

    @property
    def traits(self) -> Traits:
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        return Traits(
            lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
            first_frames="picture" if config.in_channels > config.out_channels else "none",
            frame_multiple=config.patch_size_t or 1,
            side_multiple=config.patch_size,
            latent_channels=config.out_channels,
            text_channels=config.text_embed_dim,
            scheduling=Scheduling(predicts="v", shifts_table=True),
        )

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        refuse_given(cond, "CogVideoX")
        frames, height, width = x.shape[2:]
        patch_t, patch = config.patch_size_t or 1, config.patch_size
        grid = (frames // patch_t, height // patch, width // patch)
        if frames % patch_t:
            raise UserError(
                f"CogVideoX 1.5 works on {patch_t} latent frames at a time, and {frames} do not divide: "
                "upstream adds frames in front and drops them after decoding"
            )
        inputs = x
        if config.in_channels > config.out_channels:
            inputs = torch.cat([x, needed(cond, "beside", "CogVideoX I2V", "the latents of its picture").to(x)], 1)
        elif cond.beside is not None:
            raise UserError("this CogVideoX has no channels for a picture (cond.beside); those made for I2V have")
        extra: dict[str, Any] = {}
        if config.use_rotary_positional_embeddings:
            extra["image_rotary_emb"] = self._rotary(config, grid, x.device)
        if config.ofs_embed_dim is not None:
            extra["ofs"] = x.new_full((1,), MOTION)
        with block_outputs(self.module, self.blocks, taps, picture_and_text) as outputs:
            raw = self.module(
                hidden_states=inputs.transpose(1, 2),  # B T C H W
                encoder_hidden_states=needed(cond, "text", "CogVideoX", "its prompt (B, 226, channels)"),
                timestep=table_index(one_time(t, "CogVideoX")),
                return_dict=False,
                **extra,
            )[0]
        features = tuple(outputs[i][0].unflatten(1, grid).permute(0, 4, 1, 2, 3) for i in taps)
        return of_v(raw.transpose(1, 2).to(x.dtype), x, t, self.path, features)

    def begin(self, cond: Condition, beginning: Beginning) -> Condition:
        if self.traits.first_frames == "none":
            raise UserError("this CogVideoX cannot begin with a picture; those made for I2V can")
        latent = beginning.codec.encode(beginning.pixels)
        config: Any = beginning.codec.module.config
        if config.invert_scale_latents:  # 1.5 I2V was trained with the picture, and it alone, divided by the scale
            latent = latent / config.scaling_factor**2
        return replace(cond, beside=from_picture(latent, beginning.num_latents))

    @staticmethod
    def _rotary(config: Any, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables: of 1.0 scaled so that the grid spans the positions taught, of 1.5 the first of them."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        taught = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        if config.patch_size_t is None:
            crops = get_resize_crop_region_for_grid(grid[1:], taught[1], taught[0])
            extra: dict[str, Any] = {"crops_coords": crops}
        else:
            extra = {"crops_coords": None, "grid_type": "slice", "max_size": taught}
        return get_3d_rotary_pos_embed(  # pyright: ignore[reportReturnType]  # a pair, as use_real is left on
            embed_dim=config.attention_head_dim, grid_size=grid[1:], temporal_size=grid[0], device=device, **extra
        )


def from_picture(latent: Tensor, num_frames: int) -> Tensor:
    """cond.beside of CogVideoX I2V, B C T H W: the picture's latent B C 1 H W, then zeros."""
    return nn.functional.pad(latent, (0, 0, 0, 0, 0, num_frames - latent.shape[2]))


@kind("cogvideox", group="network")
@dataclass(frozen=True)
class CogVideoXSpec(DiffusersSpec):
    """A CogVideoXTransformer3DModel: from a diffusers folder or hub id, or random of the size given. The defaults are 2B."""

    diffusers_class: ClassVar[str] = "CogVideoXTransformer3DModel"
    in_force: ClassVar[tuple[str, ...]] = ("snr_shift",)
    snr_shift: float = 3.0  # 5B and 1.5: 1
    latent_channels: int = 16
    has_picture: bool = False  # I2V: reads as many channels again
    num_heads: int = 30  # 5B 48
    head_dim: int = 64
    num_layers: int = 30  # 5B 42
    text_dim: int = 4096  # T5-XXL
    text_tokens: int = 226  # 1.5: 224
    time_dim: int = 512
    rotary: bool = False  # 5B and 1.5 True
    learned_positions: bool = False  # 5B I2V True
    motion_dim: int | None = None  # 1.5 I2V 512
    patch_t: int | None = None  # 1.5: 2
    sample_size: tuple[int, int] = (60, 90)  # height and width of the latents taught; 1.5: (300, 300), the most positions
    sample_frames: int = 49  # 1.5: 81

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> CogVideoXSpec:
        """The scheduler of a pipeline says how its table is shifted."""
        return cls(pretrained=folder.address, snr_shift=folder.scheduler.get("snr_shift_scale", cls.snr_shift))

    @property
    def path(self) -> Path:
        return VP("scaled_linear", zero_terminal_snr=True, snr_shift=self.snr_shift)

    @property
    def distillation(self) -> Distillation:
        return Distillation(guidance=6.0)  # its pipelines'

    def build(self) -> CogVideoX:
        module = self.in_diffusers(
            "CogVideoXTransformer3DModel",
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels * (2 if self.has_picture else 1),
            out_channels=self.latent_channels,
            time_embed_dim=self.time_dim,
            ofs_embed_dim=self.motion_dim,
            text_embed_dim=self.text_dim,
            num_layers=self.num_layers,
            sample_width=self.sample_size[1],
            sample_height=self.sample_size[0],
            sample_frames=self.sample_frames,
            patch_size_t=self.patch_t,
            patch_bias=self.patch_t is None,
            max_text_seq_length=self.text_tokens,
            use_rotary_positional_embeddings=self.rotary,
            use_learned_positional_embeddings=self.learned_positions,
        )
        module = enters_in_compute_dtype(module, lambda cog: cog.patch_embed.proj.weight)
        return CogVideoX(module, self.path)


# The published networks.
COGVIDEOX_2B = CogVideoXSpec()
COGVIDEOX_5B = CogVideoXSpec(snr_shift=1.0, num_heads=48, num_layers=42, rotary=True)
COGVIDEOX_5B_I2V = replace(COGVIDEOX_5B, has_picture=True, learned_positions=True)
COGVIDEOX_1_5_5B = replace(COGVIDEOX_5B, patch_t=2, sample_size=(300, 300), sample_frames=81, text_tokens=224)
