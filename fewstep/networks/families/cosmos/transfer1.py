"""The control branch of Cosmos-Transfer1 7B, on the parts of diffusers' Cosmos transformer. diffusers itself has none.

It is the base's first blocks once more, with embeddings of their own. The latents enter it as they enter the base; the control
passes a small MLP down to 16 channels and up again, is added after the first block, and every block's output goes through a
linear layer of its own to the base's block of the same number. Both last layers are 0 at first, so that a fresh branch changes
nothing. Order of operations and dimensions as published with the weights (arXiv:2503.14492); what they are called there is in
keys.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.cosmos.keys import HINT_WIDTHS


class Transfer1Branch(nn.Module):
    """Made from its base, whose first `num_blocks` blocks it copies."""

    _keep_in_fp32_modules = ("learnable_pos_embed",)  # as its base's class: parallel/shard.py

    def __init__(self, base: Any, num_blocks: int, hint_channels: int):
        super().__init__()
        config = base.config
        width = config.num_attention_heads * config.attention_head_dim
        self.hint_channels, self.patch_size, self.has_padding = hint_channels, config.patch_size, config.concat_padding_mask
        self.patch_embed = copy.deepcopy(base.patch_embed)
        self.patch_embed_hint = type(base.patch_embed)(
            hint_channels + int(self.has_padding), width, config.patch_size, bias=False
        )
        self.rope = copy.deepcopy(base.rope)  # no weights
        self.learnable_pos_embed = copy.deepcopy(base.learnable_pos_embed)
        self.time_embed = copy.deepcopy(base.time_embed)
        layers: list[nn.Module] = []
        for before, after in zip((width, *HINT_WIDTHS), HINT_WIDTHS):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.hint = nn.Sequential(*layers, _zeros(nn.Linear(HINT_WIDTHS[-1], width)))
        self.control_blocks = nn.ModuleList(copy.deepcopy(block) for block in base.transformer_blocks[:num_blocks])
        self.after = nn.ModuleList(_zeros(nn.Linear(width, width)) for _ in range(num_blocks))

    def forward(
        self,
        controls_latents: Tensor,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition_mask: Tensor | None = None,
        conditioning_scale: float = 1.0,
        padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        fps: float | None = None,
        return_dict: bool = False,
    ) -> tuple[list[Tensor]]:
        """What is to be added to the base's first blocks; called as diffusers' CosmosControlNetModel is."""
        num, _, frames, height, width = latents.shape
        missing = self.hint_channels - controls_latents.shape[1]
        hint = torch.cat([controls_latents, latents.new_zeros(num, missing, frames, height, width)], 1)
        x = latents if condition_mask is None else torch.cat([latents, condition_mask], 1)
        if self.has_padding:
            assert padding_mask is not None
            size = padding_mask if padding_mask.shape[-2:] == (height, width) else _resized(padding_mask, height, width)
            channel = size.unsqueeze(2).expand(num, 1, frames, -1, -1).to(x)
            x, hint = torch.cat([x, channel], 1), torch.cat([hint, channel], 1)

        rotary = self.rope(x, fps=fps)
        positions = None if self.learnable_pos_embed is None else self.learnable_pos_embed(x)
        h = self.patch_embed(x).flatten(1, 3)
        guide = self.hint(self.patch_embed_hint(hint).flatten(1, 3))
        per_token, embedded = self._times(h, timestep, (frames, height, width))
        mask = None if attention_mask is None else attention_mask[:, None, None]
        residuals: list[Tensor] = []
        for i, (block, after) in enumerate(zip(self.control_blocks, self.after, strict=True)):
            h = block(h, encoder_hidden_states, embedded, per_token, rotary, positions, mask)
            h = h + guide if i == 0 else h
            residuals.append(after(h) * conditioning_scale)
        return (residuals,)

    def _times(self, h: Tensor, timestep: Tensor, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The two embeddings of the time: one per row, or one per token where every frame has its own (B 1 T 1 1)."""
        both: tuple[Tensor, Tensor] = self.time_embed(h, timestep.flatten())
        if timestep.ndim == 1:
            return both
        grid = [full // patch for full, patch in zip(size, self.patch_size)]
        spread = [e.unflatten(0, (-1, grid[0])).repeat_interleave(grid[1] * grid[2], 1) for e in both]
        return spread[0], spread[1]


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _resized(mask: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(mask.float(), size=(height, width), mode="nearest")
