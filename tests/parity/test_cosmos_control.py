"""Cosmos-Transfer against the upstream classes called by hand, as the upstream pipeline calls them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import ConfigError, check
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CLEAN_TIME, Cosmos, CosmosSpec
from fewstep.networks.roles import twin_of

SMALL = CosmosControlSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=4, mlp_ratio=2, text_dim=32, adaln_lora_dim=4, max_size=(8, 32, 32),
    num_control_blocks=2, hint_channels=8,
)  # fmt: skip
TOY = CosmosControlSpec(  # the size at which the toy teacher is trained
    latent_channels=16, num_heads=2, head_dim=16, num_layers=4, mlp_ratio=2, text_dim=32, adaln_lora_dim=8,
    max_size=(8, 16, 16), num_control_blocks=2, hint_channels=16, padding_mask=False,
)  # fmt: skip
SHAPE = (2, 4, 3, 8, 8)


def network(spec: CosmosSpec = SMALL, is_fresh: bool = False, **changes: Any) -> Cosmos:
    torch.manual_seed(0)
    made = replace(spec, **changes).build()
    if not is_fresh:  # a fresh branch says 0: here its last layers must say something
        for name, parameter in made.module.named_parameters():
            if parameter.abs().sum() == 0:
                torch.nn.init.normal_(parameter, std=0.3)
            assert parameter.abs().sum() > 0, name
    return made


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(shape: tuple[int, ...] = SHAPE, text_dim: int = 32, **more: Any) -> Condition:
    mask = torch.zeros(shape[0], shape[2])
    mask[0, 0] = 1
    names = ("edge", "depth", "seg")
    control = {name: draw(*shape, seed=10 + i) for i, name in enumerate(names)}
    return Condition(
        text=draw(shape[0], 7, text_dim, seed=2), frames=draw(*shape, seed=3), frame_mask=mask, control=control, **more
    )


def upstream_inputs(x: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
    """What the upstream pipeline hands to both of its networks."""
    assert cond.frames is not None and cond.frame_mask is not None
    indicator = cond.frame_mask[:, None, :, None, None]
    mask = indicator.expand(-1, 1, -1, *x.shape[-2:])
    return {
        "latents": mask * cond.frames + (1 - mask) * x,
        "timestep": indicator * CLEAN_TIME
        + (1 - indicator) * (t if t.ndim == 2 else t[:, None]).float()[:, None, :, None, None],
        "encoder_hidden_states": cond.text,
        "condition_mask": mask,
        "padding_mask": torch.zeros(1, 1, 64, 64),
    }


def by_hand(net: Cosmos, x: Tensor, t: Tensor, cond: Condition, scale: float = 1.0, control: str = "edge") -> Tensor:
    module: Any = net.module
    inputs = upstream_inputs(x, t, cond)
    blocks = module.branches[control](
        controls_latents=cond.control[control], conditioning_scale=scale, return_dict=False, **inputs
    )[0]
    hidden = inputs.pop("latents")
    return module.base(hidden_states=hidden, block_controlnet_hidden_states=blocks, return_dict=False, **inputs)[0]


def gradients_agree(ours: Tensor, theirs: Tensor, net: Cosmos) -> None:
    weights = [p for p in net.module.parameters() if p.requires_grad]
    first = torch.autograd.grad(ours.square().sum(), weights, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(theirs.square().sum(), weights, retain_graph=True, allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in first) > len(weights) // 2
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projected", [None, 48], ids=["text", "projected text"])
@pytest.mark.parametrize("train", ["all", "control"])
def test_transfer2_5_is_the_two_upstream_networks_called_as_their_pipeline_does(projected: int | None, train: str) -> None:
    net = network(text_projection_from=projected, train=train)
    x, cond, t = draw(*SHAPE), condition(text_dim=projected or 32), torch.tensor([0.7, 0.3], dtype=torch.float64)
    answer = net(x, t, cond)
    assert cond.frame_mask is not None and cond.frames is not None
    free = cond.frame_mask[:, None, :, None, None] == 0
    upstream = by_hand(net, x, t, cond)
    torch.testing.assert_close(answer.velocity * free, upstream * free, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0[0, :, 0], cond.frames[0, :, 0], rtol=0, atol=1e-5)
    gradients_agree(answer.velocity * free, upstream * free, net)


def test_transfer2_5_reads_a_time_for_every_frame_to_both_ends() -> None:
    net = network(text_projection_from=48)
    x, cond = draw(*SHAPE), condition(text_dim=48)
    t = torch.tensor([[0.5, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    answer, upstream = net(x, t, cond), by_hand(net, x, t, cond)
    assert cond.frame_mask is not None
    free, level = cond.frame_mask[:, None, :, None, None] == 0, t.float()[:, None, :, None, None]
    torch.testing.assert_close(answer.velocity * free, upstream * free, rtol=0, atol=2e-6)
    at_0, at_1 = (level == 0) & free, (level == 1) & free
    torch.testing.assert_close(answer.x0 * at_0, x * at_0, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.eps * at_1, x * at_1, rtol=0, atol=1e-6)
    gradients_agree(answer.velocity * free, upstream * free, net)


def test_the_toy_size_runs_without_a_padding_mask_in_the_base() -> None:
    net = network(TOY)
    shape = (2, 16, 5, 4, 4)
    x, cond, t = draw(*shape), condition(shape), torch.tensor([0.7, 1.0], dtype=torch.float64)
    answer = net(x, t, cond)
    assert cond.frame_mask is not None
    free = cond.frame_mask[:, None, :, None, None] == 0
    module: Any = net.module
    inputs = upstream_inputs(x, t, cond)
    blocks = module.branches["edge"](controls_latents=cond.control["edge"], return_dict=False, **inputs)[0]
    hidden = inputs.pop("latents")
    inputs.pop("padding_mask")
    upstream = module.base(hidden_states=hidden, block_controlnet_hidden_states=blocks, return_dict=False, **inputs)[0]
    torch.testing.assert_close(answer.velocity * free, upstream * free, rtol=0, atol=2e-6)
    gradients_agree(answer.velocity * free, upstream * free, net)


@pytest.mark.parametrize("spec", [SMALL, TOY], ids=["small", "toy"])
@pytest.mark.parametrize("style", ["transfer2_5", "transfer1"])
def test_a_fresh_branch_changes_nothing_until_it_is_trained(style: str, spec: CosmosControlSpec) -> None:
    net = network(spec, is_fresh=True, style=style)
    shape = (2, spec.latent_channels, 3, 8, 8)
    x, cond, t = draw(*shape), condition(shape), torch.tensor([0.7, 0.3], dtype=torch.float64)
    alone = Cosmos(net.base)
    torch.testing.assert_close(net(x, t, cond).velocity, alone(x, t, cond).velocity, rtol=0, atol=0)
    other = replace(cond, control={"edge": cond.control["depth"]})
    step(net, net(x, t, cond).velocity)
    step(net, net(x, t, cond).velocity)
    assert (net(x, t, cond).velocity - net(x, t, other).velocity).abs().max() > 1e-5


def step(net: Cosmos, output: Tensor) -> None:
    parameters = [p for p in net.module.parameters() if p.requires_grad]
    for p, g in zip(parameters, torch.autograd.grad(output.square().mean(), parameters, allow_unused=True), strict=True):
        if g is not None:
            p.data -= 0.05 * g.sign()


def test_a_fresh_branch_starts_as_the_blocks_it_feeds_and_their_embeddings() -> None:
    module: Any = network(is_fresh=True).module
    for i, block in enumerate(module.branches["edge"].control_blocks):
        for name, weight in module.base.transformer_blocks[2 * i].state_dict().items():
            torch.testing.assert_close(block.state_dict()[name], weight, rtol=0, atol=0)
    for own, other in (("patch_embed", "patch_embed_base"), ("time_embed", "time_embed")):
        for name, weight in getattr(module.base, own).state_dict().items():
            torch.testing.assert_close(getattr(module.branches["edge"], other).state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("style", ["transfer2_5", "transfer1"])
def test_several_controls_add_what_each_says_times_its_weight_which_sum_to_one_at_most(style: str) -> None:
    controls = ("edge", "depth")
    net = network(style=style, controls=controls, weights=(0.75, 1.25))
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.7, 0.3], dtype=torch.float64)
    module: Any = net.module
    inputs = upstream_inputs(x, t, cond)
    said = [
        module.branches[name](controls_latents=cond.control[name], conditioning_scale=w, return_dict=False, **inputs)[0]
        for name, w in zip(controls, (0.375, 0.625))
    ]
    sums: list[Any] = [a + b for a, b in zip(*said, strict=True)]
    sums += [None] * (module.base.config.num_layers - len(sums)) if style == "transfer1" else []
    hidden = inputs.pop("latents")
    upstream = module.base(hidden_states=hidden, block_controlnet_hidden_states=sums, return_dict=False, **inputs)[0]
    assert cond.frame_mask is not None
    free = cond.frame_mask[:, None, :, None, None] == 0
    torch.testing.assert_close(net(x, t, cond).velocity * free, upstream * free, rtol=0, atol=2e-6)
    small = network(style=style, controls=controls, weights=(0.25, 0.5))
    assert small.module.weights == {"edge": 0.25, "depth": 0.5}


@pytest.mark.parametrize("names", [("depth",), ("edge", "depth")])
def test_of_three_branches_those_run_that_the_batch_has_signals_for(names: tuple[str, ...]) -> None:
    weights = {"edge": 0.75, "depth": 1.25, "seg": 1.0}
    net = network(style="transfer1", controls=tuple(weights), weights=tuple(weights.values()))
    fewer = network(style="transfer1", controls=names, weights=tuple(weights[name] for name in names))
    state = net.module.state_dict()
    fewer.module.load_state_dict({name: state[name] for name in fewer.module.state_dict()})
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.7, 0.3], dtype=torch.float64)
    cond = replace(cond, control={name: cond.control[name] for name in names})
    answer = net(x, t, cond).velocity
    torch.testing.assert_close(answer, fewer(x, t, cond).velocity, rtol=0, atol=0)  # weights that sum to over 1 are shares
    answer.square().sum().backward()
    branches: Any = net.module.branches
    trained = {n.partition(".")[0] for n, parameter in branches.named_parameters() if parameter.grad is not None}
    assert trained == set(names)
    ours = net.with_control_weights({"edge": 0.25, "depth": 0.5, "seg": 3.0})(x, t, cond).velocity
    theirs = fewer.with_control_weights({"edge": 0.25, "depth": 0.5})(x, t, cond).velocity
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_one_time_for_all_frames_is_the_same_as_one_for_each_and_rows_do_not_mix() -> None:
    for style in ("transfer2_5", "transfer1"):
        net = network(style=style)
        x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.9, 0.2], dtype=torch.float64)
        plain = replace(cond, frames=None, frame_mask=None)
        whole = net(x, t, plain).velocity
        torch.testing.assert_close(net(x, t[:, None].expand(-1, 3), plain).velocity, whole, rtol=0, atol=2e-6)
        row = slice(1, 2)
        torch.testing.assert_close(net(x[row], t[row], plain.rows(row)).velocity, whole[row], rtol=0, atol=2e-6)


def test_training_the_control_leaves_the_base_and_its_repeated_parts_frozen_even_when_told_to_train() -> None:
    net = network(is_fresh=True, train="control")
    for told in (net, twin_of(net)):
        told.module.requires_grad_(True)  # what placing a trained role does
        trained = {name for name, p in told.module.named_parameters() if p.requires_grad}
        assert trained and not any(name.startswith("base.") for name in trained)
        assert not any("time_embed" in name or "patch_embed_base" in name for name in trained)
        told.module.requires_grad_(False)
        assert not any(p.requires_grad for p in told.module.parameters())


def test_transfer1_trains_its_own_embeddings_with_the_control() -> None:
    net = network(is_fresh=True, train="control", style="transfer1", family="edm", sigma_data=0.5, learnable_positions=True)
    trained = {name for name, p in net.module.named_parameters() if p.requires_grad}
    assert "branches.edge.time_embed.t_embedder.linear_1.weight" in trained
    assert "branches.edge.learnable_pos_embed.pos_emb_t" in trained


@pytest.mark.parametrize("style", ["transfer2_5", "transfer1"])
def test_checkpointed_blocks_give_the_same_gradients(style: str) -> None:
    from torch.distributed._composable import checkpoint as recompute

    net, again = (network(style=style) for _ in range(2))
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.9, 0.2], dtype=torch.float64)
    assert len(net.blocks) == 4 + 2
    for block in again.blocks:
        recompute(block)
    grads: list[Any] = []
    for one in (net, again):
        answer = one(x, t, cond).velocity
        grads.append(torch.autograd.grad(answer.square().sum(), list(one.module.parameters()), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bf16_weights_take_fp32_latents_and_exact_times() -> None:
    net = network()
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.999, 0.2], dtype=torch.float64)
    wanted = net(x, t, cond).velocity
    seen: list[Tensor] = []
    net.base.time_embed.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    net.module.to(torch.bfloat16)
    answer = net(x, t, cond)
    assert answer.velocity.dtype == torch.float32 and seen[0].dtype == torch.float32 and seen[0].max() == torch.tensor(0.999)
    torch.testing.assert_close(answer.velocity, wanted, rtol=0.1, atol=0.1)


def test_a_missing_or_misshapen_control_is_named() -> None:
    net = network()
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.9, 0.2])
    with pytest.raises(ValueError, match="led by the control 'edge', but the batch has depth"):
        net(x, t, replace(cond, control={"depth": cond.control["depth"]}))
    with pytest.raises(ValueError, match=r"control 'edge' has shape \(2, 4, 3, 4, 4\), but must have that of the latents"):
        net(x, t, replace(cond, control={"edge": cond.control["edge"][..., :4, :4]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"controls": ()}, "controls: is empty"),
        ({"controls": ("edge", "edge")}, "names a control twice"),
        ({"weights": (1.0, 2.0)}, "weights: has 2 entries for 1 controls"),
        ({"num_control_blocks": 3}, "cannot be spread evenly over 4"),
        ({"hint_channels": 3}, "must hold one control of 4 channels"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(replace(SMALL, **change))


def test_folders_written_by_diffusers_are_read_back(tmp_path: Any) -> None:
    net = network()
    module: Any = net.module
    module.base.save_pretrained(str(tmp_path / "transformer"))
    module.branches["edge"].save_pretrained(str(tmp_path / "controlnet"))
    again = replace(SMALL, pretrained=str(tmp_path), branches=(str(tmp_path),)).build()
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(again(x, t, cond).velocity, net(x, t, cond).velocity, rtol=0, atol=0)


def test_a_second_attention_to_a_picture_is_given_the_zeros_that_stand_for_none() -> None:
    net = network(image_context_dim=12, image_context_tokens=5)
    x, cond, t = draw(*SHAPE), condition(), torch.tensor([0.7, 0.3], dtype=torch.float64)
    module: Any = net.module
    inputs = upstream_inputs(x, t, cond)
    inputs["encoder_hidden_states"] = (cond.text, torch.zeros(2, 5, 12))
    blocks = module.branches["edge"](controls_latents=cond.control["edge"], return_dict=False, **inputs)[0]
    hidden = inputs.pop("latents")
    upstream = module.base(hidden_states=hidden, block_controlnet_hidden_states=blocks, return_dict=False, **inputs)[0]
    assert cond.frame_mask is not None
    free = cond.frame_mask[:, None, :, None, None] == 0
    torch.testing.assert_close(net(x, t, cond).velocity * free, upstream * free, rtol=0, atol=1e-6)
    masked = replace(cond, text_mask=torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2).bool())
    with pytest.raises(ValueError, match="takes no text mask"):
        net(x, t, masked)
