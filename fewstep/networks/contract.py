"""What training needs of a network, besides being a Denoiser; and what a network's configuration must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from torch import Tensor, nn

from fewstep.config import OneOf
from fewstep.diffusion import Cache, Denoiser
from fewstep.errors import UserError


class Network(Denoiser, Protocol):
    @property
    def module(self) -> nn.Module:
        """What is sharded, optimised and saved. The Denoiser around it is none of these: times and x_t stay exact there.

        A class within that wants some weights in fp32 whatever the rest computes in lists parts of their names in
        `_keep_in_fp32_modules`, as diffusers' classes do; parallel/shard.py keeps them.
        """
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated unit: checkpointed, compiled, wrapped."""
        ...

    def new_cache(self, like: Tensor) -> Cache:
        """An empty cache for a causal roll-out of latents like `like`; networks that are not causal refuse and say why."""
        ...


class NetworkSpec(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="network")."""

    def build(self) -> Network:
        """The network with the weights this configuration names, or random ones; the same for the same global seed."""
        ...


AnyNetwork = Annotated[NetworkSpec, OneOf("network")]  # a field that holds the configuration of one network


def refuse_cache(name: str) -> Cache:
    raise UserError(f"{name} is not causal: every frame sees every other, so finished frames cannot be cached")
