"""A second time for Cosmos: r, where the jump of a flow map ends.

Each time has an embedding, and (1 - gate) of t's and gate of r's are used: AnyFlow, Gu et al. 2026, arXiv:2605.13724, gate .25.
The second embedding begins as a copy of the first, so that at r = t the network answers, bit for bit, as the one it is made
from. The weights of the second are those of the first below time_embed.end.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

FIRST, SECOND = "time_embed.", "time_embed.end."


class TwoTimes(nn.Module):
    """diffusers' CosmosEmbedding with a second one, `end`; its timestep is that of `both`."""

    def __init__(self, first: Any, gate: float):  # Any: CosmosEmbedding, whose stubs know nothing of its parts
        super().__init__()
        self.gate = gate
        self.time_proj, self.t_embedder, self.norm = first.time_proj, first.t_embedder, first.norm
        self.end = copy.deepcopy(first)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        waves = self.time_proj(timestep.real).type_as(hidden_states)
        starts = (self.t_embedder(waves), self.norm(waves))
        ends = self.end(hidden_states, timestep.imag)
        return tuple(start + self.gate * (end - start) for start, end in zip(starts, ends, strict=True))


def both(t: Tensor, r: Tensor) -> Tensor:
    """t and r as one tensor: diffusers' network hands its one timestep on to `time_embed`, where they part again."""
    return torch.complex(t, r)
