"""Decoding chunk after chunk with the autoencoder's own cache: the frames are those of the whole clip, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.encoders.codecs import Autoencoder


class StreamingDecoder:
    """Latents of successive chunks -> their pixels, B 3 T H W in -1..1; the first latent frame is one frame, each other four.

    The autoencoder of Wan decodes one latent frame at a time and keeps what its convolutions need of earlier ones
    (diffusers' AutoencoderKLWan._decode). This holds that cache between calls. Others are refused.
    """

    def __init__(self, codec: Autoencoder):
        from diffusers import AutoencoderKLWan

        if not isinstance(codec.module, AutoencoderKLWan):
            raise UserError(
                f"{type(codec.module).__name__} decodes whole clips: it keeps nothing between chunks, and cannot stream. "
                "AutoencoderKLWan (Wan, Cosmos-Predict2 and 2.5) can"
            )
        if codec.tile is not None:
            raise UserError("a codec in tiles decodes whole clips, and cannot stream: leave --tile out")
        self.codec = codec
        self.module: Any = codec.module  # Any: what diffusers keeps of its decoder is no part of its types
        self.cache: list[Any] = [None] * self.module._cached_conv_counts["decoder"]
        self.num_latents = 0

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        module, weight = self.module, next(self.module.parameters())
        mean, std = (value.to(latents.device) for value in (self.codec.mean, self.codec.std))
        x = module.post_quant_conv((latents.float() * std + mean).to(weight.device, weight.dtype))
        parts: list[Tensor] = []
        for frame in x.split(1, 2):
            first = {"first_chunk": True} if self.num_latents == 0 else {}
            parts.append(module.decoder(frame, feat_cache=self.cache, feat_idx=[0], **first))
            self.num_latents += 1
        pixels = torch.cat(parts, 2)
        if module.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=module.config.patch_size)
        return pixels.clamp(-1.0, 1.0).float()
