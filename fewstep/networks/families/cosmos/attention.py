"""Self- and cross-attention of diffusers' Cosmos with a plan and a memory: see networks/causal_attention.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.networks.causal_attention import CrossAttention, attend_with_diffusers
from fewstep.networks.tokens import AttentionPlan, SelfAttention

# Any below: attention layers of diffusers, whose stubs know nothing of their own layers.


def rotate(x: Tensor, table: tuple[Tensor, ...], rows: slice) -> Tensor:
    """The two halves of the channels of x, B N H D, turned by the angles of these rows; as CosmosAttnProcessor2_0 does."""
    from diffusers.models.embeddings import apply_rotary_emb

    own = (table[0][rows], table[1][rows])
    answer: Any = apply_rotary_emb(x, own, use_real=True, use_real_unbind_dim=-2, sequence_dim=1)  # pyright: ignore[reportArgumentType]  # its hint forgets that a tuple holds two
    return answer


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


class CosmosSelfAttention(SelfAttention):
    def answer(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, plan: Any) -> Tensor | None:
        if not isinstance(plan, AttentionPlan):
            return None
        queries = attn.norm_q(_heads(attn, attn.to_q(x)))
        keys = attn.norm_k(_heads(attn, attn.to_k(x)))
        values = _heads(attn, attn.to_v(x))
        answer = plan.attention(self.layer, queries, keys, values, attend_with_diffusers)
        return attn.to_out[1](attn.to_out[0](answer.flatten(2).type_as(queries)))


class CosmosCrossAttention(CrossAttention):
    def answer(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, plan: Any) -> Tensor | None:
        if self.memory is None:
            return None
        queries = attn.norm_q(_heads(attn, attn.to_q(x)))

        def project() -> tuple[Tensor, Tensor]:
            keys = attn.norm_k(_heads(attn, attn.to_k(text)))
            return keys, _heads(attn, attn.to_v(text))

        answer = attend_with_diffusers(queries, *self.text(project), mask)
        return attn.to_out[1](attn.to_out[0](answer.flatten(2).type_as(queries)))
