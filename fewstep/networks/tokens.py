"""A clip whose tokens several processes share (parallel/context.py), on networks of diffusers: hooks, and no copy of a class.

From the first block to the last projection each process computes its own tokens. What a block receives for each token is cut to
its share. What an attention layer needs of the others travels in the place of the rotary embedding, through the arguments of
the blocks, as the plan of a causal network does: so a block that is recomputed in backward attends to what it attended to in
its forward. Cross-attention, to texts that every process has, stays as it is.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.parallel import Context

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values B N H D -> B N H D
Rotate = Callable[[Tensor, tuple[Tensor, ...], slice], Tensor]  # B N H D, the table, rows of the table -> B N H D


class AttentionPlan(ABC):
    """What a self-attention layer follows, if it receives one in the place of its rotary embedding."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of the whole clip."""

    @abstractmethod
    def attention(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attend: Attend) -> Tensor:
        """Self-attention, B N H D; queries and keys before rotation."""


class Processor(ABC):
    """A processor of diffusers in the place of another one, `before`, which answers where this one does not."""

    def __init__(self, before: Any):  # Any: no class of diffusers says what a processor is
        self.before = before

    @abstractmethod
    def answer(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, plan: Any) -> Tensor | None:
        """Attention of x by the plan, if that is one, or to the text. None: as before."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,  # Wan's name of it
        image_rotary_emb: Any = None,  # Cosmos'
    ) -> Tensor:
        plan = image_rotary_emb if rotary_emb is None else rotary_emb
        answer = self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, plan)
        if answer is None:
            answer = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, plan)
        return answer


class SelfAttention(Processor):
    """One that follows a plan in the place of its rotary embedding, if there is one."""

    def __init__(self, layer: int, before: Any):  # Any: the processor that it replaces
        super().__init__(before)
        self.layer = layer


def follow_plans(layers: Iterable[Any], processor: Callable[[int, Any], SelfAttention]) -> None:
    """Gives attention layers processors that can follow a plan. Any: diffusers' attention classes, which share no base."""
    for number, layer in enumerate(layers):
        if not isinstance(layer.processor, SelfAttention):
            layer.set_processor(processor(number, layer.processor))


@dataclass(frozen=True)
class Spread(AttentionPlan):
    """Attention of all tokens, for a share of the heads."""

    inside: tuple[Tensor, ...] | AttentionPlan  # the rotary embedding of all tokens, or the plan of a causal network
    context: Context
    rotate: Rotate

    @property
    def num_tokens(self) -> int:
        if isinstance(self.inside, AttentionPlan):
            return self.inside.num_tokens
        return self.inside[0].numel() // self.inside[0].shape[-1]

    def attention(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attend: Attend) -> Tensor:
        heads = queries.shape[2]
        q, k, v = self.context.by_heads(torch.stack((queries, keys, values)), self.num_tokens).unbind()
        if isinstance(self.inside, AttentionPlan):
            answer = self.inside.attention(layer, q, k, v, attend)
        else:
            q, k = (self.rotate(part, self.inside, slice(None)) for part in (q, k))
            answer = attend(q, k, v)
        return self.context.by_tokens(answer, heads)


def whole(output: Any, args: Iterable[Any]) -> Any:  # Any: what a block returns and receives
    """The output of a block that was called with `args`, for all tokens."""
    spread = next((part for part in args if isinstance(part, Spread)), None)
    return output if spread is None else spread.context.join(output, spread.num_tokens)


@dataclass
class Sharing:
    """The hooks by which the tokens of one network are shared."""

    context: Context
    rotate: Rotate
    _total: int = 0  # tokens of the call that is under way
    _own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])  # of it, by id: whole, own

    def blocks(self, blocks: Sequence[nn.Module], rotary: str, tokens: Sequence[str], beside: Sequence[str] = ()) -> None:
        """Blocks receive their share of the arguments `tokens`, and of those in `beside` that say something of each token."""
        for block in blocks:
            signature = inspect.signature(type(block).forward)

            def enter(block: nn.Module, args: Any, kwargs: Any, signature: inspect.Signature = signature) -> Any:
                call = signature.bind(block, *args, **kwargs)
                values = call.arguments
                if not isinstance(values[rotary], Spread):  # it is one where the block is recomputed
                    self._enter(values, rotary, tokens, beside)
                return call.args[1:], call.kwargs

            block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)

    def _enter(self, values: dict[str, Any], rotary: str, tokens: Sequence[str], beside: Sequence[str]) -> None:
        spread = Spread(values[rotary], self.context, self.rotate)
        total, values[rotary] = spread.num_tokens, spread
        first, *others = tokens
        if values[first].shape[1] == total:  # the first block of a call
            self._begin(total)
            values[first] = self.context.divide(values[first])
        for names, divide in ((others, self.context.divide), (beside, self.context.own)):
            for name in names:
                if values.get(name) is not None and values[name].ndim > 2:
                    values[name] = self._share(values[name], divide)

    def _begin(self, total: int) -> None:
        if total < self.context.size:
            raise UserError(
                f"parallel.context={self.context.size}: this clip has {total} tokens, fewer than the processes that share it"
            )
        self._total = total
        self._own.clear()

    def _share(self, x: Tensor, divide: Callable[[Tensor], Tensor]) -> Tensor:
        """The share of x; x itself where it is one already. Of what all blocks receive it is cut once."""
        if x.shape[1] != self._total:
            return x
        if id(x) not in self._own:
            self._own[id(x)] = x, divide(x)
        return self._own[id(x)][1]

    def enters(self, module: nn.Module) -> None:
        """`module`, which computes something of all tokens, computes it of a share."""
        module.register_forward_pre_hook(lambda module, args: (self.context.divide(args[0]), *args[1:]), prepend=True)

    def beside(self, module: nn.Module) -> None:
        """`module`, behind the blocks, receives tokens, and its share of what else is said of each token."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args[0], *(self._share(x, self.context.own) if x.ndim > 2 else x for x in args[1:])

        module.register_forward_pre_hook(enter, prepend=True)

    def leaves(self, module: nn.Module) -> None:
        """The output of `module`, the last that computes shares, is that of all tokens."""

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self._own.clear()
            return self.context.join(output, self._total)

        module.register_forward_hook(leave)


def refuse_heads(context: Context, heads: int) -> None:
    """Refuses more processes than heads."""
    if context.size > heads:
        raise UserError(
            f"parallel.context={context.size}: this network has {heads} heads, of which each process needs one at least"
        )
