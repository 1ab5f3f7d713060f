"""A causal network: another network, in which the frames of a chunk attend to no later ones.

    network=causal network.network=wan ..         a network of its own, with its own weights
    networks.student.causal.chunk=3               a role's network, causal: begins with the teacher's bidirectional weights

One call computes a whole clip; with `cond.context` every chunk attends to chunks of the context instead of noisy ones (teacher
forcing); with a cache it computes one chunk, which attends to the finished chunks in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, FeaturesOnly, Path, Prediction
from fewstep.errors import UserError
from fewstep.networks.causal_attention import Causality, CrossAttention, Group, KeysValues, Plan, Planned, Sites
from fewstep.networks.contract import AnyNetwork, Distillation, Network, NetworkSpec, Traits, Wrapper


@dataclass
class KeyValueCache:
    """Keys and values of finished frames, as far as the next chunk reaches: before rotation, without gradients."""

    causality: Causality
    num_frames: int = 0  # finished, those that are out of reach among them
    layers: tuple[KeysValues, ...] = ()  # B F P H D of each layer
    text: Tensor | None = None  # that `memory` was computed from
    memory: dict[int, KeysValues] = field(default_factory=dict[int, KeysValues])  # keys and values of the text

    def store(self) -> Cache:
        return _Store(self)

    def append(self, layers: Sequence[KeysValues]) -> None:
        """Appends a finished chunk and drops what the next chunk does not reach."""
        own = layers[0][0].shape[1]
        have = self.layers[0][0].shape[1] if self.layers else 0
        within_reach = self.causality.before(self.num_frames + own)
        # What is held are the frames before(num_frames); those that stay within reach are among them.
        frames = [*self.causality.before(self.num_frames), *range(self.num_frames, self.num_frames + own)]
        assert len(frames) == have + own, (frames, have, own)
        places = {frame: place for place, frame in enumerate(frames)}
        keep = torch.tensor([places[frame] for frame in within_reach], dtype=torch.long, device=layers[0][0].device)
        past = self.layers or tuple((k[:, :0], v[:, :0]) for k, v in layers)
        pairs = zip(past, layers, strict=True)
        self.layers = tuple((torch.cat([a, c], 1)[:, keep], torch.cat([b, d], 1)[:, keep]) for (a, b), (c, d) in pairs)
        self.num_frames += own

    @property
    def num_bytes(self) -> int:
        """Size of what is held."""
        return sum(part.numel() * part.element_size() for layer in (*self.layers, *self.memory.values()) for part in layer)


@dataclass(frozen=True)
class _Store:
    """The cache, for the call on a finished chunk."""

    cache: KeyValueCache

    def store(self) -> Cache:
        return self


@dataclass(frozen=True)
class Causal(Wrapper):
    inner: Network
    causality: Causality
    attention: Sites = field(repr=False)

    @classmethod
    def of(cls, network: Network, causality: Causality) -> Causal:
        """`network`, causal; its module is changed so that it can be called both ways. Refuses what cannot be causal."""
        problems = [f"{key} {text}" for key, text in causality.problems()]
        if problems:
            raise UserError(f"causal: {'; '.join(problems)}")
        sites = network.sites()
        if causality.span > sites.max_positions:
            raise UserError(
                f"causal: a span of {causality.span} frames needs that many positions in time, and this network has "
                f"{sites.max_positions}"
            )
        sites.install()
        return cls(network, causality, sites)

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, is_causal=True, pipeline_settings=None)

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        return self.causality.chunks(num_frames)

    def before(self, start: int) -> Sequence[int]:
        return self.causality.before(start)

    def new_cache(self, like: Tensor) -> Cache:
        return KeyValueCache(self.causality)

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.inner.own_weights(weights)

    def in_original_names(self) -> dict[str, Tensor]:
        return self.inner.in_original_names()

    def parts(self) -> dict[str, Any]:
        raise UserError("--format diffusers: pipelines of diffusers would call this causal network without its causality")

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        if x_t.ndim != 5:
            raise UserError(f"a causal network works on clips, B C T H W, but was given {tuple(x_t.shape)}")
        frames = x_t.shape[2]
        if cache is not None:
            return self._with_cache(cache, x_t, t, cond, taps)
        if cond.context is not None:
            return self._packed(cond.context, x_t, t, cond, taps)
        return self._call(Plan(self.causality.groups(frames), None, None, frames), x_t, t, cond, taps)

    def _packed(self, context: Tensor, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> Prediction:
        num, frames = x_t.shape[0], x_t.shape[2]
        if context.shape != x_t.shape:
            raise UserError(f"cond.context has shape {tuple(context.shape)}, but must have that of x_t, {tuple(x_t.shape)}")
        zero = torch.zeros((), dtype=t.dtype, device=t.device)
        times = zero if cond.context_t is None else cond.context_t.to(t)
        both = [times.expand(num)[:, None].expand(-1, frames), (t if t.ndim == 2 else t[:, None]).expand(num, frames)]
        plan = Plan(self.causality.packed_groups(frames), None, None, 2 * frames)
        answer = self._call(plan, torch.cat([context.to(x_t), x_t], 2), torch.cat(both, 1), cond.twice(), taps)
        features = tuple(feature[:, :, frames:] for feature in answer.features)
        return Prediction(answer.x_t[:, :, frames:], t, self.path, answer.velocity[:, :, frames:], features)

    def _with_cache(self, cache: Cache, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> Prediction:
        assert isinstance(cache, (KeyValueCache, _Store)), cache
        past, frames = cache.cache if isinstance(cache, _Store) else cache, x_t.shape[2]
        if frames > self.causality.chunk:
            raise UserError(f"a call with a cache computes one chunk of {self.causality.chunk} frames at most, not {frames}")
        if cond.context is not None:
            raise UserError("a call with a cache attends to what is in the cache; cond.context is for whole clips")
        have = past.layers[0][0].shape[1] if past.layers else 0
        new: dict[int, KeysValues] | None = {} if isinstance(cache, _Store) else None
        plan = Plan((Group(range(frames), tuple(range(have + frames))),), past.layers or None, new, frames)
        with self._memory(past, cond):
            answer = self._call(plan, x_t, t, cond, taps)
        if new is not None:
            past.append([new[number] for number in range(len(self.attention.layers))])
        return answer

    def _call(self, plan: Plan, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> Prediction:
        with self._rotated_by(plan):
            answer = self.inner(x_t, t, cond, taps=taps)
        num_layers = max(taps) + 1 if taps and isinstance(taps, FeaturesOnly) else len(self.attention.layers)
        assert plan.layers == set(range(num_layers)), f"only the layers {sorted(plan.layers)} were causal"
        return answer

    @contextmanager
    def _rotated_by(self, plan: Plan) -> Iterator[None]:
        """Within, the network hands `plan` to its layers in the place of its rotary embedding."""
        rope = self.attention.rope
        own = vars(rope).get("forward")
        rope.forward = Planned(plan, rope.forward, self.attention.rotate)  # pyright: ignore[reportAttributeAccessIssue]  # a method
        try:
            yield
        finally:
            del rope.forward
            if own is not None:
                rope.forward = own

    @contextmanager
    def _memory(self, cache: KeyValueCache, cond: Condition) -> Iterator[None]:
        """Within, keys and values of the text are taken from the cache, unless gradients are to reach them."""
        if torch.is_grad_enabled() or cond.text is None:
            yield
            return
        if cache.text is not cond.text:
            cache.text, cache.memory = cond.text, {}
        layers = [layer.processor for layer in self.attention.cross if isinstance(layer.processor, CrossAttention)]
        for layer in layers:
            layer.memory = cache.memory
        try:
            yield
        finally:
            for layer in layers:
                layer.memory = None


@kind("causal", group="network")
@dataclass(frozen=True)
class CausalSpec(NetworkSpec):
    """Another network, causal by chunks: streams clips of any length."""

    network: AnyNetwork
    chunk: int = 3  # latent frames generated at once
    span: int = 21  # latent frames within reach of a chunk: the length it is trained on
    sink: int = 0  # first latent frames of the clip, which stay within reach

    is_causal: ClassVar[bool] = True

    @classmethod
    def over(cls, network: AnyNetwork, causality: Causality) -> CausalSpec:
        return cls(network, causality.chunk, causality.span, causality.sink)

    @property
    def causality(self) -> Causality:
        return Causality(self.chunk, self.span, self.sink)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self.causality.problems()

    @property
    def starts_as_teacher(self) -> bool:
        return True

    @property
    def path(self) -> Path | None:
        return getattr(self.network, "path", None)  # a field of some configurations, and a property of others

    @property
    def distillation(self) -> Distillation:
        return self.network.distillation

    @property
    def source(self) -> str | None:
        return self.network.source

    @property
    def shares_tokens(self) -> bool:
        return self.network.shares_tokens

    def build(self) -> Network:
        return Causal.of(self.network.build(), self.causality)

    def in_folder(self, folder: str) -> NetworkSpec:
        return replace(self, network=self.network.in_folder(folder))

    def export_format(self) -> tuple[str, str]:
        return "safetensors", "pipelines of diffusers would call a causal network without its causality"

    def by_part(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return self.network.by_part(tensors)
