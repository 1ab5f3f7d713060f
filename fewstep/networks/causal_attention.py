"""Chunk-wise causal attention: which frames a chunk attends to, at which positions, and the attention itself.

A clip is cut into chunks of a few latent frames. A chunk attends to itself, to the sink (the first frames of the clip) and to
the frames before it, as far as the span reaches. Every chunk counts positions anew, from 0 for the first frame that it attends
to: no position ever leaves 0 .. span - 1, however long the clip is. For that, keys are rotated when they are read, and a cache
holds them before rotation.

Attention is computed for one chunk after the other on the keys that it attends to, without a mask: on every device and with
every kernel the result is that of attention under the block mask (`Causality.mask`), and nothing is computed that a mask would
hide.

What an attention layer has to know travels in the place of the rotary embedding, through the arguments of every block. So a
block that is recomputed in backward attends to what it attended to in its forward, whatever the cache holds by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks.tokens import Attend, AttentionPlan, Processor, Rotate, SelfAttention, follow_plans

KeysValues = tuple[Tensor, Tensor]  # B F P H D each: frames, tokens of a frame, heads, channels; keys before rotation


@dataclass(frozen=True)
class Causality:
    """How a clip is cut into chunks, and how far a chunk sees. All numbers count latent frames."""

    chunk: int = 3  # frames generated at once. Self-Forcing and FastGen 3
    span: int = 21  # frames within reach of a chunk, its own and the sink among them; the clips of training: Wan 21, Cosmos 24
    sink: int = 0  # first frames of the clip, which stay within reach for ever

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.chunk < 1:
            yield "chunk", f"must be at least 1 latent frame, not {self.chunk}"
        if self.sink < 0:
            yield "sink", f"must be at least 0, not {self.sink}"
        if self.span < self.chunk + self.sink:
            yield (
                "span",
                f"is {self.span}, but a chunk of {self.chunk} and a sink of {self.sink} frames need that many at least",
            )

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        """The chunks of a clip. Of a length that is no multiple of the chunk, the first one has the remainder, as in FastGen;
        a clip shorter than a chunk is one chunk."""
        first = num_frames % self.chunk or min(self.chunk, num_frames)
        starts = [0, *range(first, num_frames, self.chunk)]
        return tuple(range(start, end) for start, end in zip(starts, [*starts[1:], num_frames], strict=True))

    def before(self, start: int) -> list[int]:
        """The frames before `start` that a chunk beginning there attends to."""
        oldest = max(0, start - (self.span - self.chunk - self.sink))
        return [*range(min(self.sink, oldest)), *range(oldest, start)]

    def groups(self, num_frames: int) -> tuple[Group, ...]:
        """Attention within a clip: every chunk attends to itself and to those before it."""
        return tuple(Group(chunk, (*self.before(chunk.start), *chunk)) for chunk in self.chunks(num_frames))

    def packed_groups(self, num_frames: int) -> tuple[Group, ...]:
        """Attention within [context | clip], each of `num_frames`: a chunk of the clip attends to the chunks before it in the
        context, and to itself. The context is a clip of its own."""
        clip = tuple(
            Group(
                range(num_frames + chunk.start, num_frames + chunk.stop),
                (*self.before(chunk.start), *(num_frames + frame for frame in chunk)),
            )
            for chunk in self.chunks(num_frames)
        )
        return (*self.groups(num_frames), *clip)


@dataclass(frozen=True)
class Group:
    """Frames that attend to the same keys. The keys are in the order of time, and the last of them are the queries' own."""

    queries: range  # frames of the call
    keys: tuple[int, ...]  # frames of what is cached and of the call, one after the other


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a family: a table for positions in time 0 .. n - 1, and its application to queries or keys."""

    table: tuple[Tensor, ...]
    apply: Rotate

    def __call__(self, x: Tensor, first: int, last: int) -> Tensor:
        """x, B F P H D, at the positions `first` .. `last` - 1, as B N H D."""
        tokens = x.shape[2]
        return self.apply(x.flatten(1, 2), self.table, slice(first * tokens, last * tokens))


@dataclass
class Plan(AttentionPlan):
    """What the self-attention layers of one call need; it takes the place of the rotary embedding."""

    groups: tuple[Group, ...]
    past: Sequence[KeysValues] | None  # of each layer: what is cached
    new: dict[int, KeysValues] | None  # where the layers put the keys and values of this call; None: nowhere
    num_frames: int  # of the call
    rotation: Rotation | None = None  # set where the network computes its rotary embedding
    tokens_per_frame: int = 0  # likewise
    layers: set[int] = field(default_factory=set[int])  # those that have read the plan

    @property
    def num_tokens(self) -> int:
        return self.num_frames * self.tokens_per_frame

    def attention(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, attend: Attend) -> Tensor:
        """Causal self-attention, B N H D; queries and keys before rotation."""
        assert self.rotation is not None
        self.layers.add(layer)
        q, k, v = (part.unflatten(1, (self.num_frames, -1)) for part in (queries, keys, values))
        if self.new is not None:
            self.new[layer] = (k.detach(), v.detach())
        if self.past is not None:
            k = torch.cat([self.past[layer][0].to(k.dtype), k], 1)
            v = torch.cat([self.past[layer][1].to(v.dtype), v], 1)
        parts: list[Tensor] = []
        for group in self.groups:
            num, own = len(group.keys), len(group.queries)
            here = q[:, group.queries.start : group.queries.stop]
            at = _index(group.keys, k.device)
            rotated = self.rotation(here, num - own, num), self.rotation(k[:, at], 0, num)
            parts.append(attend(*rotated, v[:, at].flatten(1, 2)))
        return torch.cat(parts, 1)

    def __iter__(self) -> Iterator[Tensor]:
        raise UserError(
            "a self-attention layer of this causal network has a processor that knows no causality (set_attn_processor or an "
            "attention backend of diffusers has replaced it): it would attend to later frames"
        )


def _index(frames: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """A view where the frames follow one another."""
    if frames == tuple(range(frames[0], frames[-1] + 1)):
        return slice(frames[0], frames[-1] + 1)
    return torch.tensor(frames, device=device)


@dataclass(frozen=True)
class Sites:
    """Where the attention of a network takes place: what a family says of itself so that it can be causal."""

    rope: nn.Module  # computes the rotary embedding from a tensor B C T H W
    layers: Sequence[Any]  # self-attention, in order; Any: diffusers' attention classes, which share no base
    cross: Sequence[Any]  # cross-attention, in order
    own_processor: Callable[[int, Any], SelfAttention]  # number of the layer, its processor
    cross_processor: Callable[[Any], CrossAttention] | None  # None: its keys cannot be kept
    rotate: Rotate
    max_positions: int  # in time

    def install(self) -> None:
        """Gives every layer its processor; without a plan they compute what they computed before."""
        follow_plans(self.layers, self.own_processor)
        if self.cross_processor is None:
            return
        for layer in self.cross:
            if not isinstance(layer.processor, CrossAttention):
                layer.set_processor(self.cross_processor(layer.processor))


@dataclass(frozen=True)
class Planned:
    """Takes the place of a rotary embedding's forward during a call: hands out the plan, with a table of the positions that
    the longest of its groups needs, however many frames the call has."""

    plan: Plan
    table_of: Callable[..., tuple[Tensor, ...]]
    rotate: Callable[[Tensor, tuple[Tensor, ...], slice], Tensor]

    def __call__(self, clip: Tensor, *args: Any, **kwargs: Any) -> Plan:
        longest = max(len(group.keys) for group in self.plan.groups)
        table = self.table_of(clip.new_empty(1, 1, longest, *clip.shape[3:]), *args, **kwargs)
        self.plan.rotation = Rotation(table, self.rotate)
        self.plan.tokens_per_frame = table[0].numel() // table[0].shape[-1] // longest
        return self.plan


def counts_anew(rope: nn.Module) -> bool:
    """Whether a plan takes the place of this rotary embedding: positions do not follow the length of the clip."""
    return isinstance(vars(rope).get("forward"), Planned)


class CrossAttention(Processor):
    """A processor of diffusers that keeps the keys and values of the text in `memory`, if it has one."""

    def __init__(self, before: Any):
        super().__init__(before)
        self.memory: dict[int, KeysValues] | None = None

    def text(self, project: Callable[[], KeysValues]) -> KeysValues:
        """Keys and values of the text, computed at the first call with this memory."""
        if self.memory is None:
            return project()
        if id(self) not in self.memory:
            self.memory[id(self)] = project()
        return self.memory[id(self)]


def attend_with_diffusers(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by the backend that diffusers is set to; `mask` is one of text tokens."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    answer = dispatch_attention_fn(queries, keys, values, attn_mask=mask, dropout_p=0.0, is_causal=False)
    assert isinstance(answer, Tensor)
    return answer
