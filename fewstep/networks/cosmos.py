"""Cosmos-Predict on the real diffusers class, `CosmosTransformer3DModel`.

Two families share it. Predict2.5 is a rectified flow: the raw output is the velocity, its time is s in [0, 1]. Predict1 and
Predict2 are EDM (Karras et al. 2022): x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4).

Given frames enter clean, at a time of their own next to 0, and are told by the mask channel; the answer keeps them. Every
frame may carry its own noise level.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import EDM, Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import spread, working_dtype
from fewstep.diffusion.precondition import edm_preconditioning
from fewstep.diffusion.prediction import keep_given
from fewstep.networks.contract import refuse_cache

CLEAN_TIME = 1e-4  # flow time at which given frames are shown (Predict2.5, sigma_conditional)


@dataclass(frozen=True)
class Cosmos:
    module: nn.Module  # CosmosTransformer3DModel
    family: Literal["flow", "edm"] = "flow"
    sigma_data: float = 1.0  # edm only: Predict1 0.5, Predict2 1.0
    use_fps: bool = False  # Predict1 turns the rate of frames into positions; Predict2.5 does not

    @property
    def path(self) -> Path:
        return RectifiedFlow() if self.family == "flow" else EDM(sigma_data=self.sigma_data)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return tuple(self.module.transformer_blocks)  # type: ignore[arg-type]

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        if self.family == "flow":
            raw, features = self._ask(x, x, t, t, cond, taps)
            answer = Prediction(x, t, self.path, raw, features)
        else:
            c = edm_preconditioning(t.clamp(min=1e-5), self.sigma_data)
            c_in, c_skip, c_out = (spread(value, x).to(x.dtype) for value in (c.c_in, c.c_skip, c.c_out))
            raw, features = self._ask(x, c_in * x, t, c.c_noise, cond, taps)
            answer = Prediction.of("x0", c_skip * x + c_out * raw, x, t, self.path, features)
        return keep_given(answer, cond.frames, cond.frame_mask)

    def new_cache(self, like: Tensor) -> Cache:
        return refuse_cache("CosmosTransformer3DModel")

    def _ask(
        self, x: Tensor, scaled: Tensor, t: Tensor, time: Tensor, cond: Condition, taps: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The raw output in x's type, and the tapped blocks' outputs as B C T H W."""
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        if cond.text is None:
            raise ValueError("Cosmos reads its prompt from cond.text (B, tokens, channels), and the batch has none")
        dtype = getattr(self.module, "compute_dtype", None) or next(self.module.parameters()).dtype
        num, _, frames, height, width = scaled.shape
        extra: dict[str, Any] = {}
        if config.in_channels > config.out_channels:
            mask = torch.zeros(num, frames, device=x.device) if cond.frame_mask is None else cond.frame_mask
            is_given = mask.bool()
            if cond.frames is not None:
                scaled = torch.where(is_given[:, None, :, None, None], self._shown(cond.frames.to(x)), scaled)
                shown_time = self._shown_time(time)
                time = torch.where(is_given, shown_time, time if time.ndim == 2 else time[:, None])
            extra["condition_mask"] = mask[:, None, :, None, None].expand(-1, 1, -1, height, width).to(dtype)
        if config.concat_padding_mask:
            _supply_resize()
            extra["padding_mask"] = torch.zeros(1, 1, height, width, dtype=dtype, device=x.device)
        if self.use_fps and cond.fps is not None:
            extra["fps"] = float(cond.fps[0])
        if time.ndim == 2:
            time = time.expand(num, frames)[:, None, :, None, None]
        with _tapped(self.blocks, taps) as seen:
            raw = self.module(
                hidden_states=scaled.to(dtype),
                timestep=time.float(),  # float32: bf16 would round 0.999 to 1
                encoder_hidden_states=cond.text.to(dtype),
                attention_mask=None if cond.text_mask is None else cond.text_mask.bool(),
                return_dict=False,
                **extra,
            )[0]
        patch_t, patch_h, patch_w = config.patch_size
        grid = (frames // patch_t, height // patch_h, width // patch_w)
        return raw.to(x.dtype), tuple(seen[i].unflatten(1, grid).permute(0, 4, 1, 2, 3) for i in taps)

    def _shown(self, frames: Tensor) -> Tensor:
        """Clean frames as the network wants to see them: EDM nets see everything at unit spread."""
        return frames if self.family == "flow" else frames / self.sigma_data

    def _shown_time(self, like: Tensor) -> Tensor:
        clean = CLEAN_TIME if self.family == "flow" else torch.tensor(CLEAN_TIME).log().item() / 4
        return torch.full((), clean, dtype=like.dtype, device=like.device)


@kind("cosmos", group="network")
@dataclass(frozen=True)
class CosmosSpec:
    """A CosmosTransformer3DModel: from a diffusers folder or hub id, or random of the size given."""

    pretrained: str | None = None  # folder with config.json and weights (its transformer/ subfolder is found), or a hub id
    family: Literal["flow", "edm"] = "flow"
    sigma_data: float = 1.0
    use_fps: bool = False
    latent_channels: int = 16
    num_heads: int = 16
    head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_dim: int = 1024  # of the embeddings inside; with text_projection_from, what they are projected to
    text_projection_from: int | None = None  # Predict2.5: 100352
    adaln_lora_dim: int = 256
    max_size: tuple[int, int, int] = (128, 240, 240)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)  # t, h, w; Predict2.5
    padding_mask: bool = True  # the channel that tells padded pixels
    learnable_positions: bool = False  # Predict1 True

    @property
    def path(self) -> Path:
        return RectifiedFlow() if self.family == "flow" else EDM(sigma_data=self.sigma_data)

    def build(self) -> Cosmos:
        from diffusers import CosmosTransformer3DModel

        if self.pretrained is not None:
            module = _pretrained(CosmosTransformer3DModel, self.pretrained)
        else:
            module = CosmosTransformer3DModel(
                in_channels=self.latent_channels + 1,  # + the mask of given frames
                out_channels=self.latent_channels,
                num_attention_heads=self.num_heads,
                attention_head_dim=self.head_dim,
                num_layers=self.num_layers,
                mlp_ratio=self.mlp_ratio,
                text_embed_dim=self.text_dim,
                adaln_lora_dim=self.adaln_lora_dim,
                max_size=self.max_size,
                patch_size=self.patch_size,
                rope_scale=self.rope_scale,
                concat_padding_mask=self.padding_mask,
                extra_pos_embed_type="learnable" if self.learnable_positions else None,
                use_crossattn_projection=self.text_projection_from is not None,
                crossattn_proj_in_channels=self.text_projection_from or 1024,
                encoder_hidden_states_channels=self.text_dim,
            )
        return Cosmos(module, self.family, self.sigma_data, self.use_fps)


def _pretrained(cls: Any, address: str) -> nn.Module:
    from pathlib import Path as FilePath

    folder = FilePath(address)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file():
        return cls.from_pretrained(str(folder), subfolder="transformer")
    return cls.from_pretrained(address)


@contextmanager
def _tapped(blocks: Sequence[nn.Module], taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within, the outputs of the blocks in `taps` are collected, by number."""
    seen: dict[int, Tensor] = {}

    def keep(i: int) -> Any:
        return lambda module, inputs, output: seen.__setitem__(i, output)

    handles = [blocks[i].register_forward_hook(keep(i)) for i in taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _supply_resize() -> None:
    """diffusers' Cosmos calls torchvision for one nearest-neighbour resize of the padding mask, and dies with a NameError
    where torchvision is absent. This supplies that one call, there and nowhere else."""
    from diffusers.models.transformers import transformer_cosmos

    if hasattr(transformer_cosmos, "transforms"):
        return

    def resize(mask: Tensor, size: list[int], interpolation: object) -> Tensor:
        return nn.functional.interpolate(mask, size=size, mode="nearest")

    functional = types.SimpleNamespace(resize=resize)
    modes = types.SimpleNamespace(NEAREST="nearest")
    sys.modules[transformer_cosmos.__name__].__dict__["transforms"] = types.SimpleNamespace(
        functional=functional, InterpolationMode=modes
    )
