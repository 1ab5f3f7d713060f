"""The Cosmos adapter against the upstream class called by hand: same weights, equal answers and gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.networks.families.cosmos.network import CLEAN_TIME, Cosmos, CosmosSpec

SMALL = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=3, mlp_ratio=2, text_dim=32, adaln_lora_dim=4, max_size=(8, 32, 32),
    padding_mask=False,
)  # fmt: skip
SHAPE = (2, 4, 3, 8, 8)


def network(**changes: Any) -> Cosmos:
    torch.manual_seed(0)
    return replace(SMALL, **changes).build()


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    return draw(*SHAPE), draw(*SHAPE), Condition(text=draw(2, 7, 32), frames=draw(*SHAPE), frame_mask=mask)


def test_the_flow_family_is_the_upstream_velocity_with_given_frames_clean_and_at_their_own_time() -> None:
    net = network()
    x, _, cond = inputs()
    assert cond.frames is not None and cond.frame_mask is not None
    t = torch.tensor([0.7, 0.3], dtype=torch.float64)
    answer = net(x, t, cond)
    shown = x.clone()
    shown[0, :, 0] = cond.frames[0, :, 0]
    time = torch.tensor([[CLEAN_TIME, 0.7, 0.7], [0.3, 0.3, 0.3]])[:, None, :, None, None]
    channel = torch.zeros(2, 1, 3, 8, 8)
    channel[0, :, 0] = 1
    upstream = net.module(shown, time, cond.text, condition_mask=channel, return_dict=False)[0]
    free = cond.frame_mask[:, None, :, None, None] == 0
    torch.testing.assert_close(answer.velocity * free, upstream * free, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0[0, :, 0], cond.frames[0, :, 0], rtol=0, atol=1e-5)

    weights = list(net.module.parameters())
    ours = torch.autograd.grad((answer.velocity * free).square().sum(), weights)
    theirs = torch.autograd.grad((upstream * free).square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_frame_may_carry_its_own_time_and_both_ends_are_finite() -> None:
    net = network()
    x, _, cond = inputs()
    plain = Condition(text=cond.text)
    t = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    upstream = net.module(
        x, t.float()[:, None, :, None, None], cond.text, condition_mask=torch.zeros(2, 1, 3, 8, 8), return_dict=False
    )[0]
    answer = net(x, t, plain)
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0, x - t.float()[:, None, :, None, None] * upstream, rtol=0, atol=1e-5)


def test_one_time_for_all_frames_is_the_same_as_one_for_each() -> None:
    net = network()
    x, _, cond = inputs()
    plain, t = Condition(text=cond.text), torch.tensor([0.9, 0.2], dtype=torch.float64)
    each = net(x, t[:, None].expand(-1, 3), plain)
    torch.testing.assert_close(net(x, t, plain).velocity, each.velocity, rtol=0, atol=1e-6)


def test_the_edm_family_is_preconditioned_as_karras_writes_it() -> None:
    net = network(family="edm", sigma_data=0.5, learnable_positions=True, use_fps=True)
    x, _, cond = inputs()
    sigma = torch.tensor([80.0, 0.02], dtype=torch.float64)
    x = x * torch.sqrt(sigma**2 + 0.25).float()[:, None, None, None, None]
    answer = net(x, sigma, Condition(text=cond.text, fps=torch.tensor([24.0, 24.0])))
    for row, s in enumerate(sigma.tolist()):
        total = math.sqrt(s**2 + 0.25)
        raw = net.module(
            x[row : row + 1] / total,
            torch.tensor([math.log(s) / 4]),
            cond.text[row : row + 1] if cond.text is not None else None,
            fps=24.0,
            condition_mask=torch.zeros(1, 1, 3, 8, 8),
            return_dict=False,
        )[0]
        wanted = 0.25 / total**2 * x[row] + s * 0.5 / total * raw[0]
        # x0 is read back from a velocity of size x / sigma: float32 keeps about 1e-6 of the state's size.
        torch.testing.assert_close(answer.x0[row], wanted, rtol=0, atol=2e-6 * float(x[row].abs().max()) + 1e-6)


EDM_1: dict[str, Any] = {
    "family": "edm", "sigma_data": 0.5, "use_fps": True, "clean_time": None, "learnable_positions": True, "padding_mask": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "predict1 text": {**EDM_1, "frame_mask": False},
    "predict1": EDM_1,
    "predict2 text": {"frame_mask": False, "rope_scale": (1.0, 4.0, 4.0), "padding_mask": True},
    "predict2": {"use_fps": True, "padding_mask": True},
    "predict2.5": {"text_projection_from": 24, "padding_mask": True},
    "predict2.5 14B": {"text_projection_from": 24, "padding_mask": True, "clean_time": None},
}


def x0_by_hand(net: Cosmos, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The class of diffusers called for each row as the pipelines call it, with a time for every frame."""
    told: list[Tensor] = []
    for row in range(len(x)):
        sigma = (t[row].expand(3) if t.ndim == 2 else t[row : row + 1].expand(3)).double()
        mask = torch.zeros(3) if cond.frame_mask is None else cond.frame_mask[row]
        is_given = mask.bool()[:, None, None]
        level = sigma.float()[:, None, None]
        if net.family == "edm":
            total = (sigma**2 + 0.25).sqrt().float()[:, None, None]
            shown, time = x[row] / total, sigma.clamp(min=1e-5).log() / 4
        else:
            shown, time = x[row], sigma
        if cond.frames is not None:
            scale = 0.5 if net.family == "edm" else 1.0
            shown = torch.where(is_given, cond.frames[row] / scale, shown)
            if net.clean_time is not None and net.family == "flow":
                time = torch.where(mask.bool(), net.clean_time, time)
        more: dict[str, Any] = {"padding_mask": torch.zeros(1, 1, 8, 8)}
        if net.module.config.in_channels == 5:  # type: ignore[union-attr]
            more["condition_mask"] = mask[None, None, :, None, None].expand(1, 1, 3, 8, 8)
        if net.use_fps:
            more["fps"] = 12.0
        assert cond.text is not None
        raw = net.module(
            shown[None], time.float()[None, None, :, None, None], cond.text[row : row + 1], return_dict=False, **more
        )[0][0]
        if net.family == "edm":
            told.append(0.25 / total**2 * x[row] + level * 0.5 / total * raw)
        else:
            told.append(x[row] - level * raw)
    return torch.stack(told)


@pytest.mark.parametrize("each", [False, True], ids=["one time", "a time for each frame"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_and_learns_as_the_class_called_by_hand_to_both_ends(family: str, each: bool) -> None:
    net = network(**FAMILIES[family])
    end = net.path.t_max
    t = torch.tensor([[0.0, 0.4, end], [end, end, 0.0]] if each else [end, 0.0], dtype=torch.float64)
    level = (t if each else t[:, None]).float()[:, None, :, None, None]
    x, _, given = inputs()
    if net.family == "edm":
        x = x * (level**2 + 0.25).sqrt()
    width = 24 if "2.5" in family else 32
    has_frames = "text" not in family
    cond = replace(given, text=given.text[..., :width], fps=torch.tensor([12.0, 12.0]))  # type: ignore[index]
    cond = cond if has_frames else replace(cond, frames=None, frame_mask=None)
    answer, wanted = net(x, t, cond), x0_by_hand(net, x, t, cond)
    free = torch.ones(2, 1, 3, 1, 1) if cond.frame_mask is None else cond.frame_mask[:, None, :, None, None] == 0
    # x0 is read back from a velocity of size x / t: float32 keeps about 1e-6 of the state's size.
    torch.testing.assert_close(answer.x0 * free, wanted * free, rtol=0, atol=2e-6 * float(x.abs().max()) + 2e-6)
    at_0 = (level == 0) & (free > 0)
    torch.testing.assert_close(answer.x0 * at_0, x * at_0, rtol=0, atol=1e-5)
    if net.family == "flow":
        at_1 = (level == 1) & (free > 0)
        torch.testing.assert_close(answer.eps * at_1, x * at_1, rtol=0, atol=1e-5)

    weights = list(net.module.parameters())
    ours = torch.autograd.grad((answer.x0 * free).square().sum(), weights)
    theirs = torch.autograd.grad((wanted * free).square().sum(), weights)
    assert sum(float(g.norm()) > 0 for g in ours) > len(weights) // 2
    for (name, _), a, b in zip(net.module.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6, name


def test_taps_are_the_blocks_own_outputs() -> None:
    net = network()
    x, _, cond = inputs()
    kept: list[Tensor] = []
    handle = net.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output))
    answer = net(x, torch.tensor([0.5, 0.5], dtype=torch.float64), Condition(text=cond.text), taps=(1, 2))
    handle.remove()
    assert [tuple(f.shape) for f in answer.features] == [(2, 32, 3, 4, 4)] * 2
    torch.testing.assert_close(answer.features[0].permute(0, 2, 3, 4, 1).flatten(1, 3), kept[0], rtol=0, atol=0)


def test_the_padding_mask_works_without_torchvision() -> None:
    """The mask of a whole picture is zeros: its channel changes nothing but the shape of the first weights."""
    net = network(padding_mask=True)
    x, _, cond = inputs()
    bare = network(padding_mask=False)
    weights = net.module.state_dict()
    name = "patch_embed.proj.weight"
    # The patch is folded channel-last ("c r m n" with c first), so the padding channel is the last patch-sized group.
    weights[name] = weights[name].unflatten(1, (6, -1))[:, :5].flatten(1)
    bare.module.load_state_dict(weights)
    t, plain = torch.tensor([0.5, 0.8], dtype=torch.float64), Condition(text=cond.text)
    torch.testing.assert_close(net(x, t, plain).velocity, bare(x, t, plain).velocity, rtol=0, atol=1e-6)


def test_a_prompt_is_needed_and_said_so() -> None:
    x, _, _ = inputs()
    with pytest.raises(ValueError, match=r"reads its prompt from cond\.text"):
        network()(x, torch.tensor([0.5, 0.5]), Condition())


def test_a_folder_written_by_diffusers_is_read_back(tmp_path: object) -> None:
    net = network()
    net.module.save_pretrained(str(tmp_path))
    again = CosmosSpec(pretrained=str(tmp_path)).build()
    x, _, cond = inputs()
    t = torch.tensor([0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(again(x, t, cond).velocity, net(x, t, cond).velocity, rtol=0, atol=0)
