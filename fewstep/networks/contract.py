"""What training needs of a network, besides being a Denoiser; and what a network's configuration must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Protocol

from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import OneOf
from fewstep.diffusion import Cache, Denoiser, Path, Prediction, RectifiedFlow
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


class NoDenoiser:
    """A network that a method trains or asks, but not to denoise: a tokenizer, and what looks at its clips."""

    name: ClassVar[str]

    @property
    def path(self) -> Path:
        return RectifiedFlow()  # for whoever asks every network; it has none of its own

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        raise UserError(f"{self.name} denoises nothing: it belongs to method=autoencode")

    def new_cache(self, like: Tensor) -> Cache:
        return refuse_cache(self.name)


AnyNetwork = Annotated[NetworkSpec, OneOf("network")]  # a field that holds the configuration of one network


def refuse_cache(name: str) -> Cache:
    raise UserError(f"{name} is not causal: every frame sees every other, so finished frames cannot be cached")
