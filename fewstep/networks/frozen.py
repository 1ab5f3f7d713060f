"""A frozen network that takes less memory: kept on the CPU between its calls, or with weights of eight bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.diffusion import Cache, Prediction
from fewstep.errors import UserError
from fewstep.networks.contract import Network, Wrapper


@dataclass(frozen=True)
class Offloaded(Wrapper):
    """A frozen network whose weights lie on the CPU, and on `device` while it is called.

    After a call that leaves a graph they stay until the next call: backward needs them, and a block that is recomputed in
    backward reads them anew. Its weights are copied at every call, which pays where a call takes longer than that.
    """

    inner: Network
    device: torch.device
    _home: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False)
    _here: list[bool] = field(default_factory=lambda: [False], repr=False)  # are the weights on the device?

    def __post_init__(self) -> None:
        for parameter in self.inner.module.parameters():
            if parameter.requires_grad:
                raise UserError("a network that is trained cannot be kept on the CPU between its calls")
            home = parameter.data.cpu()
            self._home[parameter] = home.pin_memory() if self.device.type == "cuda" else home
            parameter.data = self._home[parameter]

    def inside(self) -> Network:
        return self.inner

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        if not self._here[0]:
            for parameter, home in self._home.items():
                parameter.data = home.to(self.device, non_blocking=True, copy=True)
        self._here[0] = True
        answer = self.inner(x_t, t, cond, taps=taps, cache=cache)
        if not answer.velocity.requires_grad and not any(feature.requires_grad for feature in answer.features):
            for parameter, home in self._home.items():
                parameter.data = home
            self._here[0] = False
        return answer

    def at_home(self) -> list[Tensor]:
        """What lies on the CPU."""
        return list(self._home.values())


def to_8bit(modules: Iterable[nn.Module]) -> int:
    """Rounds the weights of frozen Linear layers in `modules` to eight bits, in place; returns how many layers those are.

    One scale for each row of a weight, activations as they are (torchao). Gradients go through to the input, not to the weight.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError(
            "trainer.frozen=8bit needs torchao: pip install 'fewstep[eight-bit]', or set trainer.frozen=compute"
        ) from error
    count = 0

    def is_frozen(layer: nn.Module, name: str) -> bool:
        nonlocal count
        is_match = isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters())
        count += is_match
        return is_match

    for module in modules:
        quantize_(module, Int8WeightOnlyConfig(version=2), filter_fn=is_frozen)
    return count
