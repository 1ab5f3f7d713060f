"""The tokens of a clip, shared by several processes: Ulysses (Jacobs et al. 2023, arXiv:2309.14509).

Every process holds a share of the tokens, in order. For attention two exchanges of all with all turn that into all tokens of a
share of the heads, and back. Shares differ by one at most, so that any number of tokens, and of heads, can be shared.

Before the tokens are divided and after they are joined all processes compute the same: latents, noise, losses, features. There
a gradient is the whole one, equal on all processes, whatever a method computes of it. In between, a gradient is that of the own
share times the number of processes: so the mean over all processes, which data parallelism takes anyway, is the whole gradient
of every weight, wherever it was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The processes that share the tokens of a clip, as this one sees them."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None  # None: nothing is sent, for plans on tensors without contents

    def shares(self, total: int) -> list[int]:
        """How many of `total` tokens or heads each process has."""
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's share of what each token has for itself."""
        shares = self.shares(x.shape[dim])
        # A copy, because a view would keep the shares of the others in memory.
        return x.narrow(dim, sum(shares[: self.rank]), shares[self.rank]).clone(memory_format=torch.contiguous_format)

    def divide(self, x: Tensor) -> Tensor:
        """This process's share of the tokens, B N .., of what all have computed alike."""
        return _Divide.apply(x, self)  # pyright: ignore[reportReturnType]  # torch's stub of Function.apply is vague

    def join(self, x: Tensor, total: int) -> Tensor:
        """All tokens, B N .., of the shares."""
        return _Join.apply(x, self, total)  # pyright: ignore[reportReturnType]  # torch's stub of Function.apply is vague

    def by_heads(self, x: Tensor, tokens: int) -> Tensor:
        """All tokens of a share of the heads; x: a share of the tokens, .. N H D."""
        return self._exchanged(x, (x.ndim - 2, self.shares(x.shape[-2])), (x.ndim - 3, self.shares(tokens)))

    def by_tokens(self, x: Tensor, heads: int) -> Tensor:
        """All heads of a share of the tokens; x: all tokens of a share of the heads, .. N H D."""
        return self._exchanged(x, (x.ndim - 3, self.shares(x.shape[-3])), (x.ndim - 2, self.shares(heads)))

    def _exchanged(self, x: Tensor, divided: Cut, joined: Cut) -> Tensor:
        return _Exchange.apply(x, self, divided, joined)  # pyright: ignore[reportReturnType]  # torch's stub of Function.apply is vague


Cut = tuple[int, list[int]]  # a dimension, and the share that each process has of it


def _send(pieces: list[Tensor], shapes: list[tuple[int, ...]], context: Context) -> list[Tensor]:
    """Sends a piece to each process; returns what each sends to this one, of these shapes."""
    message = torch.cat([piece.reshape(-1) for piece in pieces])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = message.new_empty(sum(sizes))
    if context.group is not None:
        dist.all_to_all_single(received, message, sizes, [piece.numel() for piece in pieces], group=context.group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class _Exchange(torch.autograd.Function):
    """Divides a dimension among the processes, and joins what they send along another one."""

    @staticmethod
    def forward(x: Tensor, context: Context, divided: Cut, joined: Cut) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # of a base that takes anything
        shape = list(x.shape)
        shape[divided[0]] = divided[1][context.rank]
        shapes = [tuple(num if dim == joined[0] else size for dim, size in enumerate(shape)) for num in joined[1]]
        pieces = list(x.split(divided[1], divided[0]))
        return torch.cat(_send(pieces, shapes, context), joined[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # Any: torch's signature, in all of these
        ctx.how = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # of a base that takes anything
        context, divided, joined = ctx.how
        return _Exchange.apply(gradients[0], context, joined, divided), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Exchange.apply(tangents[0], *ctx.how)


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, context: Context) -> Tensor:
        return context.own(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.context, ctx.total = inputs[1], inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # of a base that takes anything
        return ctx.context.join(gradients[0], ctx.total) / ctx.context.size, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.context.divide(tangents[0])


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, context: Context, total: int) -> Tensor:
        shapes = [(x.shape[0], num, *x.shape[2:]) for num in context.shares(total)]
        return torch.cat(_send([x] * context.size, shapes, context), 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.context, ctx.total = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # of a base that takes anything
        return ctx.context.divide(gradients[0]) * ctx.context.size, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.context.join(tangents[0], ctx.total)
