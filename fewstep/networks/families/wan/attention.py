"""Self- and cross-attention of diffusers' Wan with a plan and a memory: see networks/causal_attention.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.networks.causal_attention import CrossAttention, attend_with_diffusers
from fewstep.networks.tokens import AttentionPlan, SelfAttention

# Any below: attention layers of diffusers, whose stubs know nothing of their own layers.


def rotate(x: Tensor, table: tuple[Tensor, ...], rows: slice) -> Tensor:
    """Pairs of neighbouring channels of x, B N H D, turned by the angles of these rows; as WanAttnProcessor does."""
    cos, sin = (part[:, rows] for part in table)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)


class WanSelfAttention(SelfAttention):
    def answer(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, plan: Any) -> Tensor | None:
        if not isinstance(plan, AttentionPlan):
            return None
        queries = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))
        keys = attn.norm_k(attn.to_k(x)).unflatten(2, (attn.heads, -1))
        values = attn.to_v(x).unflatten(2, (attn.heads, -1))
        answer = plan.attention(self.layer, queries, keys, values, attend_with_diffusers)
        return attn.to_out[1](attn.to_out[0](answer.flatten(2).type_as(queries)))


class WanCrossAttention(CrossAttention):
    def answer(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, plan: Any) -> Tensor | None:
        if self.memory is None or attn.add_k_proj is not None:  # the keys of a picture's features are computed at every call
            return None
        queries = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))

        def project() -> tuple[Tensor, Tensor]:
            keys = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))
            return keys, attn.to_v(text).unflatten(2, (attn.heads, -1))

        answer = attend_with_diffusers(queries, *self.text(project))
        return attn.to_out[1](attn.to_out[0](answer.flatten(2).type_as(queries)))
