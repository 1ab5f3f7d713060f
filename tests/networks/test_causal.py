"""Causal networks over the classes of diffusers: nothing of a later frame is seen, and a cache changes nothing.

The oracles: the upstream processors under a dense mask, the whole pass for a pass by chunks, exact zeros for perturbed frames.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import RectifiedFlow, Rng, StudentSampler, features
from fewstep.diffusion.by_chunk import ByChunk
from fewstep.errors import UserError
from fewstep.networks.causal import Causal, CausalSpec, KeyValueCache
from fewstep.networks.causal_attention import Causality
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT1_7B
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.tiny import TinySpec

WAN = WanSpec(
    num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, text_tokens=5, freq_dim=16, latent_channels=4,
    max_positions=64,
)  # fmt: skip
COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2.0, text_dim=16, adaln_lora_dim=8,
    max_size=(32, 8, 8), padding_mask=False,
)  # fmt: skip
FAMILIES = {"wan": WAN, "cosmos": COSMOS}
SIDE = 4


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(family: str, causality: Causality) -> Causal:
    torch.manual_seed(0)
    network = CausalSpec.over(FAMILIES[family], causality).build()
    assert isinstance(network, Causal)
    with torch.no_grad():
        for parameter in network.module.parameters():  # no layer is 0 or alike at first
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.inner.module.eval() and network


def clip(frames: int, seed: int = 1, rows: int = 1) -> Tensor:
    return draw(rows, 4, frames, SIDE, SIDE, seed=seed)


def text(rows: int = 1) -> Condition:
    return Condition(text=draw(rows, 5, 16, seed=9))


def levels(frames: int, rows: int = 1) -> Tensor:
    return torch.rand(rows, frames, generator=torch.Generator().manual_seed(5)).double().clamp(0.05, 0.95)


@torch.no_grad()
def by_chunk(network: Causal, x: Tensor, t: Tensor, cond: Condition, context: Tensor | None = None) -> Tensor:
    """The velocity of each chunk, computed with a cache that holds the chunks before it: `context`, else x itself at t."""
    cache, parts = network.new_cache(x), []
    for chunk in network.chunks(x.shape[2]):
        at = slice(chunk.start, chunk.stop)
        parts.append(network(x[:, :, at], t[:, at], cond.part(chunk), cache=cache).velocity)
        kept = (x, t) if context is None else (context, torch.zeros_like(t))
        network(kept[0][:, :, at], kept[1][:, at], cond.part(chunk), cache=cache.store())
    return torch.cat(parts, 2)


causalities = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 6)).map(
    lambda numbers: Causality(chunk=numbers[0], sink=numbers[1], span=numbers[0] + numbers[1] + numbers[2])
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(causality=causalities, frames=st.integers(1, 9), data=st.data())
def test_a_later_frame_changes_nothing_before_its_chunk(family: str, causality: Causality, frames: int, data: Any) -> None:
    network = build(family, causality)
    changed = data.draw(st.integers(0, frames - 1))
    x, t, cond = clip(frames), levels(frames), text()
    other = x.clone()
    other[:, :, changed] += draw(4, SIDE, SIDE, seed=3)
    chunk = next(chunk for chunk in network.chunks(frames) if changed in chunk)
    with torch.no_grad():
        for context in (None, clip(frames, seed=7)):
            seen = replace(cond, context=context)
            before, after = (network(y, t, seen).velocity for y in (x, other))
            assert torch.equal(before[:, :, : chunk.start], after[:, :, : chunk.start])
            assert not torch.equal(before[:, :, chunk.start : chunk.stop], after[:, :, chunk.start : chunk.stop])
            if context is not None:  # of x, only the chunk itself depends on it; of the context, only later chunks
                assert torch.equal(before[:, :, chunk.stop :], after[:, :, chunk.stop :])
                moved = replace(cond, context=torch.where((x == other), context, context + 1.0))
                answer = network(x, t, moved).velocity
                assert torch.equal(before[:, :, : chunk.stop], answer[:, :, : chunk.stop])
    before, after = (by_chunk(network, y, t, cond) for y in (x, other))
    assert torch.equal(before[:, :, : chunk.start], after[:, :, : chunk.start])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(causality=causalities, frames=st.integers(1, 11))
def test_a_pass_by_chunks_with_a_cache_is_the_whole_pass(family: str, causality: Causality, frames: int) -> None:
    """Also far beyond the span, where the oldest frames have left the cache and positions have been counted anew."""
    network = build(family, causality)
    x, t, cond, clean = clip(frames, rows=2), levels(frames, 2), text(2), clip(frames, seed=4, rows=2)
    with torch.no_grad():
        whole = network(x, t, cond).velocity
        taught = network(x, t, replace(cond, context=clean)).velocity
    torch.testing.assert_close(by_chunk(network, x, t, cond), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_chunk(network, x, t, cond, clean), taught, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_that_of_upstream_attention_under_the_block_mask(family: str) -> None:
    """Within the span positions are those of the clip, so that upstream's own layers with a dense mask say the same."""
    causality, frames = Causality(chunk=2, span=9), 7
    network, x, t, cond = build(family, causality), clip(7), levels(7), text()
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for group in causality.groups(frames):
        mask[group.queries.start : group.queries.stop, list(group.keys)] = True
    tokens = mask.repeat_interleave(SIDE * SIDE // 4, 0).repeat_interleave(SIDE * SIDE // 4, 1)
    with torch.no_grad():
        ours = network(x, t, cond).velocity
        for layer in network.attention.layers:
            upstream = layer.processor.before
            layer.set_processor(_Masked(upstream, tokens))
        theirs = network.inner(x, t, cond).velocity
        bidirectional = build(family, causality).inner(x, t, cond).velocity
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (bidirectional - theirs).abs().max() > 1e-3


class _Masked:
    def __init__(self, before: Any, mask: Tensor):
        self.before, self.mask = before, mask

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None, image_rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        rotary = image_rotary_emb if rotary_emb is None else rotary_emb
        return self.before(attn, hidden_states, encoder_hidden_states, self.mask, rotary)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_its_bidirectional_network_which_stays_what_it_was(family: str) -> None:
    torch.manual_seed(0)
    plain = FAMILIES[family].build()
    x, t, cond = clip(3), levels(3), text()
    with torch.no_grad():
        before = plain(x, t, cond).velocity
        network = Causal.of(plain, Causality(chunk=3, span=3))
        assert torch.equal(plain(x, t, cond).velocity, before)  # called without causality
        torch.testing.assert_close(network(x, t, cond).velocity, before, rtol=0, atol=1e-6)  # one chunk sees all of itself


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_stay_within_the_span_after_a_hundred_chunks_and_so_does_the_cache(family: str, monkeypatch: Any) -> None:
    causality = Causality(chunk=2, span=7, sink=1)
    network, seen, sizes = build(family, causality), [], []
    cache: Any = network.new_cache(clip(2))
    forward = network.attention.rope.forward
    monkeypatch.setattr(
        network.attention.rope, "forward", lambda x, *more, **kw: seen.append(x.shape[2]) or forward(x, *more, **kw)
    )
    with torch.no_grad():
        for number in range(100):
            x = clip(2, seed=number)
            network(x, torch.zeros(1, dtype=torch.float64), text(), cache=cache.store())
            sizes.append(cache.num_bytes)
    assert max(seen) == causality.span and cache.num_frames == 200
    assert len(set(sizes[3:])) == 1  # memory is flat once the window is full


def test_more_frames_in_a_call_than_the_network_has_positions() -> None:
    """A packed pass has twice the frames of the clip, and no clip is too long for a causal network."""
    short, long = (CausalSpec.over(replace(COSMOS, max_size=(frames, 8, 8)), Causality(2, 6)).build() for frames in (8, 32))
    short.module.load_state_dict(long.module.state_dict())
    x, t, cond = clip(12), levels(12), text()
    for seen in (cond, replace(cond, context=clip(12, seed=7))):
        with torch.no_grad():
            assert torch.equal(short(x, t, seen).velocity, long(x, t, seen).velocity)
    with pytest.raises(UserError, match=r"has positions for latents of"):
        replace(COSMOS, max_size=(8, 8, 8)).build()(x, t[:, 0], cond)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_of_a_text_are_computed_once_and_anew_for_another_text(family: str) -> None:
    network, cond, other = build(family, Causality(chunk=2, span=8)), text(), Condition(text=draw(1, 5, 16, seed=11))
    cache, x, t = network.new_cache(clip(2)), clip(2), levels(2)
    calls = []
    for layer in network.attention.cross:
        layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = network(x, t, cond, cache=cache).velocity
        assert torch.equal(network(x, t, cond, cache=cache).velocity, first) and len(calls) == len(network.attention.cross)
        assert not torch.equal(network(x, t, other, cache=cache).velocity, first)
        torch.testing.assert_close(network(x, t, cond).velocity, first, rtol=0, atol=1e-6)
    weight = network.attention.cross[0].to_k.weight
    network(x, t, cond, cache=cache).velocity.sum().backward()  # with gradients they are computed: to_k is trained
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_a_block_are_those_of_the_clip_without_its_context(family: str) -> None:
    network, x, t = build(family, Causality(chunk=2, span=8)), clip(4), levels(4)
    cond = replace(text(), context=clip(4, seed=3))
    with torch.no_grad():
        answer = network(x, t, cond, taps=(0, 1))
        only = features(network, x, t, cond, (0,))
    assert [part.shape[2] for part in answer.features] == [4, 4]
    torch.testing.assert_close(only[0], answer.features[0])


def test_frames_that_are_given_keep_their_place_in_chunks_and_in_the_cache() -> None:
    network, x, t, given_ = build("cosmos", Causality(chunk=2, span=8)), clip(6), levels(6), clip(6, seed=8)
    cond = replace(text(), frames=given_, frame_mask=torch.tensor([[1.0, 1, 1, 0, 0, 0]]))
    with torch.no_grad():
        whole = network(x, t, cond)
    torch.testing.assert_close(by_chunk(network, x, t, cond), whole.velocity, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.x0[:, :, :3], given_[:, :, :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_switch_a_chunk_sees_the_finished_frames_within_reach_under_the_new_condition(family: str) -> None:
    """Against one packed pass over those frames: early they are the whole clip, later the sink and the last frames."""
    network, noise, first, second = build(family, Causality(chunk=2, span=8, sink=2)), clip(16), text(), text()
    second = replace(second, text=draw(1, 5, 16, seed=11))
    sampler = StudentSampler((1.0,), RectifiedFlow(), by_chunk=ByChunk())

    def stream(*switches: tuple[int, Condition]) -> Tensor:
        return torch.cat(list(sampler.stream(network, noise, first, Rng(0, rows=[1]), switches=switches)), 2)

    plain, switched = stream(), stream((12, first), (5, second))  # of any order; 5 lies within the chunk 4, 5
    assert torch.equal(switched[:, :, :6], plain[:, :, :6])
    for start, kept, cond in ((6, [*range(6)], second), (12, [0, 1, 8, 9, 10, 11], first)):
        context = torch.cat([switched[:, :, kept], torch.zeros(1, 4, 2, SIDE, SIDE)], 2)
        x = torch.cat([context[:, :, :-2], noise[:, :, start : start + 2]], 2)
        with torch.no_grad():
            answer = network(x, torch.ones(1, dtype=torch.float64), replace(cond, context=context)).x0[:, :, -2:]
        torch.testing.assert_close(switched[:, :, start : start + 2], answer, rtol=0, atol=1e-5)
    torch.testing.assert_close(stream((6, first)), plain, rtol=0, atol=1e-5)  # nothing but the cache is new


def test_what_cannot_be_causal_is_refused_by_name() -> None:
    small = replace(PREDICT1_7B, num_heads=2, head_dim=16, num_layers=1, max_size=(8, 8, 8))
    for spec, reason in (
        (small, "learned positions"),
        (ExpertsSpec(WAN, WAN), "two experts"),
        (TinySpec("dit"), "cannot be causal"),
    ):
        with pytest.raises(UserError, match=reason):
            CausalSpec(spec).build()
    with pytest.raises(UserError, match="span of 80 frames needs that many positions"):
        CausalSpec(WAN, span=80).build()
    with pytest.raises(UserError, match="need that many at least"):
        Causal.of(WAN.build(), Causality(chunk=3, span=4, sink=2))
    network = build("wan", Causality(chunk=2, span=8))
    with pytest.raises(UserError, match="one chunk of 2 frames"):
        network(clip(3), levels(3), text(), cache=network.new_cache(clip(3)))
    plain = WAN.build()
    with pytest.raises(UserError, match="not causal"):
        plain.chunks(4)
    with pytest.raises(UserError, match="not causal"):
        plain.new_cache(clip(4))
    with pytest.raises(UserError, match="not causal"):
        plain(clip(4), levels(4), replace(text(), context=clip(4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_lost_its_causality_stops_the_call(family: str) -> None:
    network = build(family, Causality(chunk=2, span=8))
    layer = network.attention.layers[1]
    layer.set_processor(layer.processor.before)
    with pytest.raises(UserError, match="knows no causality"):
        network(clip(4), levels(4), text())


def test_chunks_of_any_length() -> None:
    causality = Causality(chunk=3)
    assert causality.chunks(9) == (range(3), range(3, 6), range(6, 9))
    assert causality.chunks(8) == (range(2), range(2, 5), range(5, 8))  # the first has the remainder, as in FastGen
    assert causality.chunks(2) == (range(2),)
    assert isinstance(build("wan", causality).new_cache(clip(3)), KeyValueCache)
