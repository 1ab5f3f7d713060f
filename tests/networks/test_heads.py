"""Discriminator heads: on the features of any network, row by row, the same under gradient checkpointing, and able to tell."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._composable import checkpoint as recompute
from torch.nn import functional

from fewstep.batch import Batch, Condition
from fewstep.config import choices
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, Gan, Nets, StudentSample, Turn
from fewstep.networks.heads import AttentionSpec, Conv2dSpec, Conv3dSpec, MultiscaleSpec, QuerySpec, SpatioTemporalSpec
from fewstep.networks.roles import Networks, build
from fewstep.networks.tiny import TinySpec

F64 = torch.float64
SPECS = [
    Conv3dSpec(hidden=8),
    Conv2dSpec(hidden=8),
    AttentionSpec(hidden=8, num_heads=2),
    SpatioTemporalSpec(hidden=8),
    MultiscaleSpec(hidden=8),
    QuerySpec(hidden=8, num_heads=2),
]
NAMES = [spec.kind for spec in SPECS]
GRIDLESS = [spec for spec in SPECS if spec.kind in ("attention", "query", "multiscale")]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def built(spec, taps=(0, 2), channels=6, **more):
    torch.manual_seed(0)
    head = replace(spec, taps=taps, channels=channels, **more).build()
    head.module.double()
    return head


def features(rows=3, seed=0):
    return [normal(rows, 6, 4, 6, 5, seed=seed), normal(rows, 6, 3, 4, 4, seed=seed + 1)]


def test_every_kind_is_tested_here():
    assert set(NAMES) == set(choices("head"))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_row_does_not_see_the_other_rows(spec):
    head, seen = built(spec), features()
    logits = head(seen)
    assert len(logits) == 3 and logits.ndim == 2 and logits.std(0).min() > 0
    for row in range(3):
        torch.testing.assert_close(head([f[row : row + 1] for f in seen]), logits[row : row + 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_every_block_and_place_is_looked_at_and_every_weight_used(spec):
    head, seen = built(spec), [f.requires_grad_() for f in features()]
    (head(seen) ** 2).sum().backward()
    for feature in seen:
        reached = feature.grad.abs().sum(1)
        # a stride of 2 with an odd number of frames leaves the last one out, as it does upstream
        assert bool((reached[:, : feature.shape[2] // 2 * 2] > 0).all())
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.module.parameters())


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_first_frames_can_be_left_out(spec):
    head = built(spec, first_frame=1)
    seen, other = features(), features()
    for feature in other:
        feature[:, :, 0] += 100
    assert torch.equal(head(seen), head(other))
    torch.testing.assert_close(head(seen), built(spec)([f[:, :, 1:] for f in seen]))
    with pytest.raises(ValueError, match="first_frame is 9"):
        built(spec, first_frame=9)(seen)


@pytest.mark.parametrize("spec", GRIDLESS, ids=lambda spec: spec.kind)
def test_points_and_tokens(spec):
    head = built(spec)
    assert len(head([normal(5, 6), normal(5, 6, seed=1)])) == 5
    tokens = [normal(2, 7, 6), normal(2, 9, 6, seed=1)]
    shuffled = [f[:, torch.randperm(f.shape[1])] for f in tokens]
    torch.testing.assert_close(head(tokens), head(shuffled))  # without a grid there is no order


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_an_image_is_a_video_of_one_frame(spec):
    more = {"kernel": (1, 4, 4)} if spec.kind == "conv3d" else {}
    head, image = built(spec, taps=(0,), **more), normal(2, 6, 8, 8)
    torch.testing.assert_close(head([image]), head([image[:, :, None]]))


def test_conv3d_is_transfer1s_head():
    """cosmos.md 1.4, by functional calls: k (2,4,4), stride 2, pad (0,1,1), GroupNorm 8, LeakyReLU, 1x1x1, mean."""
    head = built(Conv3dSpec(hidden=16))
    weights, seen = dict(head.module.named_parameters()), features()
    logits = []
    for i, feature in enumerate(seen):
        w = {name: weights[f"heads.{i}.{name}"] for name in ("enter.weight", "enter.bias", "norm.weight", "norm.bias")}
        h = functional.conv3d(feature, w["enter.weight"], w["enter.bias"], stride=2, padding=(0, 1, 1))
        h = functional.group_norm(h, 8, w["norm.weight"], w["norm.bias"])
        h = torch.where(h > 0, h, 0.2 * h)
        h = torch.einsum("bcthw,c->bthw", h, weights[f"heads.{i}.leave.weight"].flatten()) + weights[f"heads.{i}.leave.bias"]
        logits.append(h.mean((1, 2, 3)))
    torch.testing.assert_close(head(seen), torch.stack(logits, 1), rtol=1e-9, atol=1e-12)


def test_attention_is_torchs():
    spec = AttentionSpec(hidden=8, num_heads=2)
    head, (seen, _) = built(spec, taps=(0,)), features()
    block = head.module.heads[0]
    other = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(block.qkv.weight)
        other.in_proj_bias.copy_(block.qkv.bias)
        other.out_proj.weight.copy_(torch.eye(8))
        other.out_proj.bias.zero_()
    h = block.enter(seen.flatten(2).transpose(1, 2))
    h = h + other(h, h, h)[0]
    want = block.leave(functional.silu(block.norm(h)).mean(1))
    torch.testing.assert_close(head([seen]), want, rtol=1e-9, atol=1e-12)


def test_wrong_widths_and_numbers_are_named():
    head = built(Conv3dSpec(hidden=8))
    with pytest.raises(ValueError, match=r"channels is 6, but .* 7 channels"):
        head([normal(1, 7, 4, 4, 4), normal(1, 7, 4, 4, 4)])
    with pytest.raises(ValueError, match="reads 2 blocks"):
        head([normal(1, 6, 4, 4, 4)])
    with pytest.raises(ValueError, match=r"kernel \(2, 4, 4\) does not fit"):
        head([normal(1, 6, 1, 4, 4), normal(1, 6, 4, 4, 4)])
    with pytest.raises(ValueError, match="needs features on a grid"):
        head([normal(1, 6), normal(1, 6)])
    assert [key for key, _ in Conv3dSpec(taps=()).problems()] == ["taps"]
    with pytest.raises(ValueError, match=r"networks\.head"):
        build(Networks(teacher=TinySpec()), ("teacher", "head"), 0)


def test_a_bf16_head_gives_float32_logits():
    torch.manual_seed(0)
    head = Conv2dSpec(taps=(0,), channels=6, hidden=8).build()
    head.module.bfloat16()
    assert head([normal(2, 6, 3, 4, 4).float()]).dtype == torch.float32


def test_the_same_seed_is_the_same_head():
    config = Networks(teacher=TinySpec(), head=QuerySpec(taps=(0,), channels=128, hidden=8))
    one, two, other = (
        dict(build(config, ("head",), seed)["head"].module.named_parameters())["leave.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_head_learns_to_tell_two_sets_apart(spec):
    """Noise, and noise that is alike in neighbouring places: one number per place is the same in law, two are not."""
    torch.manual_seed(0)
    head = replace(spec, taps=(0,), channels=6, hidden=16).build()
    optimizer, gan = torch.optim.Adam(head.module.parameters(), 5e-3), Gan()

    def draw(seed, shift):
        x = normal(32, 6, 4, 4, 4, seed=seed).float()
        return x + shift * x.roll(1, 1)  # channels go together

    for step in range(60):
        optimizer.zero_grad()
        gan.head_loss(head([draw(2 * step, 0.0)]), head([draw(2 * step + 1, 1.0)])).backward()
        optimizer.step()
    assert float((head([draw(1001, 1.0)]).mean(1) > head([draw(1000, 0.0)]).mean(1)).float().mean()) > 0.9


# --- with the networks they sit on ------------------------------------------------------------------------------------


def networks(checkpointed, spec):
    found = {}
    for seed, role in enumerate(("student", "teacher", "critic")):
        torch.manual_seed(seed)
        found[role] = TinySpec("dit", channels=3, width=6, depth=3, num_heads=2, text_dim=4).build()
        found[role].module.double()
        for parameter in found[role].module.parameters():  # blocks start as the identity; wake them
            torch.nn.init.normal_(parameter, std=0.3)
        if checkpointed:
            for block in found[role].blocks:
                recompute(block)
    found["head"] = built(spec)
    return found


@pytest.mark.parametrize("trunk", ["teacher", "critic"])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_gradients_are_the_same_under_checkpointing(spec, trunk):
    """Both turns, R1 and guidance on: the blocks' second run must see what the first saw."""
    gan = Gan(weight=0.5, features=trunk, r1_weight=0.3)
    method = DMD2(student=StudentSample((1.0, 0.6), exit_step="last"), gan=gan, guidance=3.0)
    cond, negative = (Condition(text=normal(2, 5, 4, seed=seed)) for seed in (8, 9))
    batch = Batch(x0=normal(2, 3, 4, 4, 4, seed=5), cond=cond, negative=negative)
    for turn in (Turn("student", ("student",)), Turn("critic", ("critic", "head"))):
        found = []
        for checkpointed in (False, True):
            roles = networks(checkpointed, spec)
            for role, net in roles.items():
                net.module.requires_grad_(role in turn.trains)
            for terms in method.losses(turn, Nets(roles), batch, Rng(1, 0, range(2))):
                terms.total.backward()
            found.append({(r, n): p.grad for r, net in roles.items() for n, p in net.module.named_parameters()})
        for key, grad in found[0].items():
            assert (grad is None) == (found[1][key] is None) and (grad is None or key[0] in turn.trains), key
            if grad is not None:
                torch.testing.assert_close(found[1][key], grad, rtol=1e-10, atol=1e-14)
        assert {role for (role, _), grad in found[0].items() if grad is not None} == set(turn.trains)
