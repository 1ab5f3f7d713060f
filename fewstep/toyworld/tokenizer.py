"""A video tokenizer that can be trained: diffusers' own class, with what the losses of autoencode.py need.

Only tokenizers of the toy world are trained here; real ones are opened as they are (networks/encoders/codecs.py). The noise on
the latents during training makes a latent space in which small errors of a denoiser stay small errors of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.networks.files.folders import load


class _Reconstruct(nn.Module):
    """Encoder and decoder in one forward, so that what shards or compiles a module sees one call."""

    def __init__(self, vae: Any, trains: Literal["all", "decoder"]):  # Any: diffusers types its models loosely
        super().__init__()
        self.vae, self.trains = vae, trains

    def requires_grad_(self, requires_grad: bool = True) -> _Reconstruct:
        """As for any module; with trains=decoder only the decoder's weights require gradients."""
        super().requires_grad_(requires_grad)
        if self.trains == "decoder":
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        return self

    def forward(self, pixels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains == "all"):
            latents = self.vae.encode(pixels).latent_dist.mode()
        return self.vae.decode(latents if noise is None else latents + noise).sample, latents


@dataclass(frozen=True)
class Tokenizer:
    module: nn.Module

    def latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        config: Any = self.module.vae.config  # pyright: ignore[reportAttributeAccessIssue]  # an attribute of a module
        num, _, frames, height, width = pixels.shape
        across = config.spatial_compression_ratio
        along = (frames - 1) // config.temporal_compression_ratio + 1
        return num, config.latent_channels, along, height // across, width // across

    def reconstruct(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (B 3 T H W in -1..1) after the round trip with `noise` added on the way, and the latents without it."""
        return self.module(pixels, noise)


@dataclass(frozen=True)
class TokenizerSpec:
    """A tiny AutoencoderKLCosmos: pixels in Haar wavelets, causal in time, 8 x 8 pixels and 4 frames to a latent."""

    pretrained: str | None = None  # a diffusers folder to go on from; its sizes count, not those below
    trains: Literal["all", "decoder"] = "all"  # decoder: the latents stay what they are, and models on them stay valid
    channels: tuple[int, ...] = (48, 64, 96)
    latent_channels: int = 16
    num_layers: int = 1
    resolution: int = 32

    def build(self) -> Tokenizer:
        from diffusers import AutoencoderKLCosmos

        torch.set_flush_denormal(True)  # dead units make denormal numbers, which cost a CPU a hundred times as much
        if self.pretrained is not None:
            return Tokenizer(_Reconstruct(load(AutoencoderKLCosmos, self.pretrained), self.trains))
        vae = AutoencoderKLCosmos(
            latent_channels=self.latent_channels,
            encoder_block_out_channels=self.channels,
            decode_block_out_channels=self.channels,
            attention_resolutions=(),
            resolution=self.resolution,
            num_layers=self.num_layers,
            patch_size=4,
            patch_type="haar",
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        )
        return Tokenizer(_Reconstruct(vae, self.trains))
