"""The derivative of a network along a direction of its inputs: what consistency models and flow maps are trained with.

    jvp          forward-mode differentiation: exact to rounding, at about twice the cost of a call and without its graph
    difference   two calls, one on each side: works on every network and kernel; its error is of the order step^2

The choice is a setting, and nothing replaces it without a word. Attention has a forward mode in torch's plain kernel only,
which `jvp` selects. A kernel of another package that loses a tangent gives wrong numbers and no error: `disagreement` compares
the choice with differences on a real input, and the training loop does so before its first iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.config import OneOf, kind
from fewstep.diffusion.path import spread
from fewstep.errors import UserError

Function = Callable[..., Tensor]  # of the inputs one by one: a state, then times (B,)
Room = tuple[Tensor, Tensor]  # how far (B,) h may go down and up before an input leaves where the function is defined


class Derivative(Protocol):
    is_exact: ClassVar[bool]  # but for rounding

    def along(self, function: Function, inputs: Sequence[Tensor], direction: Sequence[Tensor], room: Room | None) -> Tensor:
        """d/dh function(inputs + h direction) at h = 0, without a graph; room: None: h may go anywhere."""
        ...


AnyDerivative = Annotated[Derivative, OneOf("derivative")]  # a field that holds one of them


@kind("jvp", group="derivative")
@dataclass(frozen=True)
class Jvp:
    """Forward mode, through torch's math attention kernel."""

    is_exact: ClassVar[bool] = True

    def along(
        self, function: Function, inputs: Sequence[Tensor], direction: Sequence[Tensor], room: Room | None = None
    ) -> Tensor:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = [_dual(value, change) for value, change in zip(inputs, direction, strict=True)]
            try:
                tangent = _tangent(function(*duals))
            except NotImplementedError as error:  # of a kernel, or of a function with a gradient of its own
                raise _without_tangent(str(error).splitlines()[0].rstrip(".")) from error
        if tangent is None:
            raise _without_tangent("it does not depend on its inputs")
        return tangent


@kind("difference", group="derivative")
@dataclass(frozen=True)
class Difference:
    """(f(x + h d) - f(x - h d)) / 2h; one-sided where an input would leave its range."""

    is_exact: ClassVar[bool] = False

    step: float = 1e-2  # h; float32 loses about 1e-7 / h, a smooth network h^2. AnyFlow and FastGen on Wan: 5e-3

    def along(
        self, function: Function, inputs: Sequence[Tensor], direction: Sequence[Tensor], room: Room | None = None
    ) -> Tensor:
        num = len(inputs[0])
        step = torch.full((num,), self.step, dtype=torch.float64, device=inputs[0].device)
        below, above = (step, step) if room is None else (torch.minimum(step, part.to(step)) for part in room)
        with torch.no_grad():
            ahead = function(*_moved(inputs, direction, above))
            behind = function(*_moved(inputs, direction, -below))
        return (ahead - behind) / spread((above + below).to(ahead.dtype), ahead)

    def problems(self) -> list[tuple[str, str]]:
        return [] if 0 < self.step <= 0.1 else [("step", f"must lie between 0 and 0.1, not {self.step}")]


def _without_tangent(why: str) -> UserError:
    return UserError(
        f"derivative=jvp: the network has no forward-mode tangent: {why}. Choose derivative=difference, or another kernel"
    )


def _dual(value: Tensor, change: Tensor) -> Tensor:
    return forward_ad.make_dual(value, change)  # pyright: ignore[reportUnknownMemberType]  # torch's stub is vague


def _tangent(value: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(value).tangent  # pyright: ignore[reportUnknownMemberType]  # torch's stub is vague


def _moved(inputs: Sequence[Tensor], direction: Sequence[Tensor], by: Tensor) -> list[Tensor]:
    return [value + spread(by.to(change.dtype), change) * change for value, change in zip(inputs, direction, strict=True)]


# Steps of the differences that a derivative is compared with: long ones for bf16 and smooth networks, short ones for Wan, whose
# fastest wave in t is sin 1000 t.
STEPS = (7e-2, 2.3e-2, 7e-3, 2.3e-3, 7e-4, 2.3e-4, 7e-5)
TOLERANCE = {"fp32": 0.2, "bf16": 0.5}  # of `disagreement`, by precision; a right one has up to .04 (a tiny AnyFlow) and .2


def disagreement(
    derivative: Derivative,
    function: Function,
    inputs: Sequence[Tensor],
    direction: Sequence[Tensor],
    room: tuple[Tensor, Tensor] | None = None,
) -> float:
    """The relative difference between `derivative` and differences, at those steps where they agree best.

    It is computed from differences a and b of two steps, sqrt(<d - a, d - b> / <a, b>): their rounding errors are independent
    and cancel, so that bf16 can be checked, too. Costs one call of `derivative` and two network calls for each of `STEPS`.
    """
    exact = derivative.along(function, inputs, direction, room).double()
    near = [Difference(step=step).along(function, inputs, direction, room).double() for step in STEPS]
    errors = list[float]()
    for a, b in pairwise(near):
        size = float((a * b).sum())
        errors.append(abs(float(((exact - a) * (exact - b)).sum())) / size if size > 0 else float("inf"))
    return min(errors) ** 0.5


@dataclass(frozen=True)
class Agreement:
    """How far a derivative is from differences."""

    derivative: Derivative
    error: float  # `disagreement`
