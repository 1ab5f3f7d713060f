"""A frozen network that takes less memory: kept on the CPU between its calls, or with weights of eight bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.diffusion import Cache, Prediction
from fewstep.errors import UserError
from fewstep.networks.contract import Network, Wrapper
from fewstep.networks.grid import Grid, codes_of, dense


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


class _Product(torch.autograd.Function):
    """x W^T + b of a rounded W. What is kept for backward are its codes, not the weight in the type of compute."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, dense(codes, scale, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # Any: torch's signature, in all of these
        ctx.save_for_backward(*inputs[1:3])
        ctx.save_for_forward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # of a base that takes anything
        codes, scale = ctx.saved_tensors
        return gradients[0] @ dense(codes, scale, gradients[0].dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        codes, scale = ctx.saved_tensors
        return nn.functional.linear(tangents[0], dense(codes, scale, tangents[0].dtype))


class RoundedLinear(nn.Linear):
    """A frozen Linear layer that holds codes of one byte and their scales in place of its weight."""

    codes: nn.Parameter
    scale: nn.Parameter
    dtype: torch.dtype

    @classmethod
    def take(cls, layer: nn.Linear, grid: Grid) -> None:
        """Changes `layer` in place: whoever refers to it, an adapter for instance, calls the rounded one."""
        weight = layer.weight.detach()
        del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, RoundedLinear)
        layer.codes, layer.scale = (nn.Parameter(part, requires_grad=False) for part in codes_of(weight, grid))
        layer.dtype = weight.dtype

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]  # networks look at its dtype
        return dense(self.codes, self.scale, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which knows no Function with a tangent, and finds by itself what to keep
            return nn.functional.linear(input, self.weight, self.bias)
        return _Product.apply(input, self.codes, self.scale, self.bias)  # pyright: ignore[reportReturnType]  # torch's stub


def round_frozen(modules: Iterable[nn.Module], grid: Grid) -> int:
    """Rounds the weights of frozen Linear layers in `modules`, in place; returns how many layers those are.

    Activations stay as they are. Gradients and tangents go through to the input.
    """
    layers = {id(layer): layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)}
    frozen = [layer for layer in layers.values() if not any(p.requires_grad for p in layer.parameters())]
    for layer in frozen:
        RoundedLinear.take(layer, grid)
    return len(frozen)
