"""Roles that share one backbone: each answers as a network of its own would, in forward and in backward."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import build_recipe
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT1_7B
from fewstep.networks.families.unet import UnetSpec
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.lora import Backbone, Lora, Shared, as_diffusers, as_kohya, at_scale_one, extract, merged, target_names
from fewstep.networks.roles import Full, Networks, build, wholes
from fewstep.networks.tiny import TinySpec
from fewstep.parallel import World, place

ALONE = World(0, 1, torch.device("cpu"), None)
ROLES = ("student", "teacher", "critic")
DIT = TinySpec("dit", channels=2, width=12, depth=3, num_heads=2, text_dim=5)
COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=32, adaln_lora_dim=4, max_size=(8, 32, 32),
    padding_mask=False,
)  # fmt: skip


STUDENT, CRITIC = Lora(rank=3), Lora(rank=2, scale=2.0)


def shared(student: Lora = STUDENT, critic: Lora = CRITIC, teacher: Any = DIT, **more: Any) -> dict[str, Any]:
    """Three roles on one backbone in float64, adapters away from zero."""
    nets: dict[str, Any] = build(Networks(teacher, student, critic), ROLES, seed=1)
    nets["teacher"].module.double()
    generator = torch.Generator().manual_seed(5)
    for parameter in nets["teacher"].module.parameters():  # the DiT's modulation starts at 0, which would hide its gradients
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    for whole in wholes(nets):
        place(
            whole.module, tuple(whole.blocks), ALONE,
            mode="ddp", compute=torch.float64, trained=whole.trained, adapters=whole.adapters, remember=whole.remember, **more,
        )  # fmt: skip
    return nets


def inputs(text: int = 5, channels: int = 2) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(2, channels, 2, 4, 4), torch.tensor([0.3, 0.8], dtype=torch.float64), Condition(text=draw(2, 3, text))


def base_of(net: Shared) -> dict[str, Tensor]:
    """The teacher's own weights, under the names they had before there were adapters."""
    whole = net.backbone.network.module.state_dict()
    kept = {name: t for name, t in whole.items() if ".lora_" not in name and ".own." not in name}
    return {name.replace(".base_layer.", ".").replace(".original.", "."): t for name, t in kept.items()}


def plain(spec: Any, weights: dict[str, Tensor]) -> Any:
    net = spec.build()
    net.module.double().load_state_dict(weights)
    return net


# --- what a role answers ----------------------------------------------------------------------------------------------


def test_every_role_answers_as_a_plain_network_with_merged_weights() -> None:
    """The forward against W + scale B A written out, and a layer trained in full."""
    nets = shared(critic=Lora(rank=2, scale=2.0, targets=("qkv", "mlp.0"), train=("enter", "time.net.0")))
    x, t, cond = inputs()
    base = base_of(nets["teacher"])
    for role, scale in (("teacher", None), ("student", 1.0), ("critic", 2.0)):
        weights = base if scale is None else merged(base, nets[role].module.state_dict(), scale)
        want = plain(DIT, weights)(x, t, cond, taps=(1,))
        got = nets[role](x, t, cond, taps=(1,))
        torch.testing.assert_close(got.velocity, want.velocity, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.features[0], want.features[0], rtol=0, atol=1e-12)
    assert (nets["student"](x, t, cond).x0 - nets["teacher"](x, t, cond).x0).abs().max() > 0.1
    assert (nets["critic"](x, t, cond).x0 - nets["student"](x, t, cond).x0).abs().max() > 0.1


def test_the_gradient_of_an_adapter_is_that_of_the_merged_weight() -> None:
    """dL/dA = scale B^T dL/dW, dL/dB = scale dL/dW A^T, from the gradients of a plain network."""
    nets = shared(critic=Lora(rank=2, scale=2.0, train=("enter",)))
    x, t, cond = inputs()
    state = {name: p.detach() for name, p in nets["critic"].module.state_dict().items()}
    want = plain(DIT, merged(base_of(nets["teacher"]), state, 2.0))
    want(x, t, cond).x0.square().sum().backward()
    nets["critic"](x, t, cond).x0.square().sum().backward()
    gradients = {name: p.grad for name, p in want.module.named_parameters()}
    seen = 0
    for name, parameter in nets["critic"].module.named_parameters():
        if name.endswith(".lora_A.weight"):
            whole = gradients[name.replace(".lora_A", "")]
            other = state[name.replace("lora_A", "lora_B")]
            torch.testing.assert_close(parameter.grad, 2 * other.T @ whole, rtol=1e-9, atol=1e-12)
            seen += 1
        elif name.endswith(".lora_B.weight"):
            whole = gradients[name.replace(".lora_B", "")]
            torch.testing.assert_close(
                parameter.grad, 2 * whole @ state[name.replace("lora_B", "lora_A")].T, rtol=1e-9, atol=1e-12
            )
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)
    assert seen == 8 * 3
    others = [p.grad for n, p in nets["teacher"].module.named_parameters() if ".critic." not in n]
    assert others and all(gradient is None for gradient in others)  # neither the base nor the student


def test_targets_have_ranks_and_scales_of_their_own_and_lie_in_the_first_blocks() -> None:
    """The mini-language of Cosmos-Predict1: merged by hand, W + scale B A with the rank and scale of each target."""
    config = Lora(rank=3, scale=0.5, targets=("qkv:2:0.6", "mlp.0", "blocks.1.qkv:4"), first_nblocks=2)
    nets = shared(critic=config)
    state = {name: p.detach() for name, p in nets["critic"].module.state_dict().items()}
    ranks = {name.removesuffix(".lora_A.weight"): len(p) for name, p in state.items() if name.endswith(".lora_A.weight")}
    assert ranks == {"blocks.0.qkv": 2, "blocks.0.mlp.0": 3, "blocks.1.qkv": 4, "blocks.1.mlp.0": 3}
    scales = {"blocks.0.qkv": 0.6, "blocks.0.mlp.0": 0.5, "blocks.1.qkv": 0.5, "blocks.1.mlp.0": 0.5}
    want = dict(base_of(nets["teacher"]))
    for name, scale in scales.items():
        want[f"{name}.weight"] = (
            want[f"{name}.weight"] + scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        )
    x, t, cond = inputs()
    torch.testing.assert_close(nets["critic"](x, t, cond).x0, plain(DIT, want)(x, t, cond).x0, rtol=0, atol=1e-12)
    again = merged(base_of(nets["teacher"]), state, config.scale_of)
    torch.testing.assert_close(again, want, rtol=0, atol=1e-15)
    alone = merged(base_of(nets["teacher"]), at_scale_one(state, config.scale_of))
    torch.testing.assert_close(alone, want, rtol=0, atol=1e-15)


def test_the_adapters_of_predict1_are_those_of_its_lora_example() -> None:
    """112 adapters and 6.65 million parameters on the 7B network, without its memory; A drawn with spread 1 / rank."""
    recipe = build_recipe("video2world_7b_lora_example_cosmos_nemo_assets")
    config: Any = replace(recipe.networks.student, init="teacher")
    with torch.device("meta"):
        backbone = Backbone(PREDICT1_7B.build())
        role = backbone.add("student", config)
    parameters = dict(role.module.named_parameters())
    assert len(parameters) == 2 * 112
    assert sum(p.numel() for p in parameters.values()) == 6_651_904
    small: Any = build(Networks(COSMOS, replace(config, rank=4)), ("student",), seed=1)["student"]
    downs = torch.cat([p.detach().flatten() for n, p in small.module.named_parameters() if "lora_A" in n])
    assert float(downs.std(correction=0)) == pytest.approx(1 / 4, rel=0.1)
    assert all(not bool(p.any()) for n, p in small.module.named_parameters() if "lora_B" in n)


def test_adapters_change_nothing_at_first() -> None:
    plain_net = build(Networks(DIT), ("teacher",), seed=1)["teacher"]
    nets: Any = build(Networks(DIT, Lora(rank=4), Lora(rank=2)), ROLES, seed=1)
    x, t, cond = inputs()
    want = plain_net(x.float(), t, cond).velocity
    assert all(torch.equal(nets[role](x.float(), t, cond).velocity, want) for role in ROLES)


def test_there_is_one_base_in_memory() -> None:
    nets = shared()
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for net in nets.values() for p in net.module.parameters()
    }
    base = sum(t.nbytes for t in base_of(nets["teacher"]).values())
    own = {role: sum(p.nbytes for p in nets[role].module.parameters()) for role in ("student", "critic")}
    assert sum(storages.values()) == base + sum(own.values())
    assert len(wholes(nets)) == 1


# --- the trap: recomputation in backward --------------------------------------------------------------------------------


def interleaved(nets: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of one backward through student, teacher and critic, called in turns, each with a graph."""
    x, t, cond = inputs()
    first = nets["student"](x, t, cond).x0
    teacher = nets["teacher"](first, t, cond, taps=(2,))
    critic = nets["critic"](first, t, cond)
    second = nets["student"](critic.x0 + teacher.x0, t, cond)
    with torch.no_grad():
        nets["teacher"](x, t, cond)  # the last to speak is neither of those that are recomputed
    (second.x0.square().sum() + teacher.features[0].square().sum() + critic.velocity.square().sum()).backward()
    found = {f"{role}.{n}": p.grad for role in ("student", "critic") for n, p in nets[role].module.named_parameters()}
    assert all(gradient is not None and bool(gradient.abs().max() > 0) for gradient in found.values())
    return found  # type: ignore[return-value]


def test_a_recomputed_block_sees_the_adapter_of_its_forward() -> None:
    student = Lora(rank=3, train=("enter",))
    want = interleaved(shared(student))
    got = interleaved(shared(student, checkpointing=True))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-14)


def test_without_remembering_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees the trap: with plain checkpointing the gradients are those of another role."""
    from contextlib import nullcontext

    want = interleaved(shared())
    monkeypatch.setattr(Backbone, "remember", lambda self: (nullcontext(), nullcontext()))
    try:
        got = interleaved(shared(checkpointing=True))
    except (RuntimeError, AssertionError):  # other tensors were saved than are recomputed, or an adapter got no gradient
        return
    assert any(not torch.allclose(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor has many
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_switch_too(checkpointing: bool) -> None:
    torch._dynamo.reset()
    want = interleaved(shared())
    got = interleaved(shared(compiled=True, checkpointing=checkpointing))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-10)


def test_a_call_that_fails_leaves_no_adapter_behind() -> None:
    nets = shared()
    x, t, cond = inputs()
    want = nets["teacher"].backbone.network(x, t, cond).velocity
    with pytest.raises(ValueError, match="tap 9"):
        nets["student"](x, t, cond, taps=(9,))
    assert torch.equal(nets["teacher"].backbone.network(x, t, cond).velocity, want)


def test_no_graph_is_kept_of_a_frozen_base_whose_input_needs_none() -> None:
    nets, saved = shared(), []
    x, t, cond = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        assert not nets["teacher"](x, t, cond).velocity.requires_grad
        assert not saved
        nets["critic"](x, t, cond)
        assert saved


# --- on the real class --------------------------------------------------------------------------------------------------


def test_cosmos_adapters_are_read_by_diffusers_itself(tmp_path: Path) -> None:
    """Parity: our role against upstream's load_lora_adapter on the same base, from the file we write."""
    nets: Any = build(Networks(COSMOS, Lora(rank=4, scale=2.0), Lora(rank=2)), ROLES, seed=2)
    for name, parameter in nets["student"].module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    upstream: Any = COSMOS.build().module
    upstream.load_state_dict(base_of(nets["teacher"]))
    tensors = as_diffusers(nets["student"].module.state_dict(), scale=2.0)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    before = copy.deepcopy(upstream)
    upstream.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    x, t, cond = inputs(text=32, channels=4)
    x, cond = x.float(), replace(cond, text=cond.text.float())  # type: ignore[union-attr]
    from fewstep.networks.families.cosmos.network import Cosmos

    want = nets["student"](x, t, cond).velocity
    torch.testing.assert_close(Cosmos(upstream)(x, t, cond).velocity, want, rtol=0, atol=2e-6)
    assert (Cosmos(before)(x, t, cond).velocity - want).abs().max() > 1e-2
    merged_net = COSMOS.build()
    merged_net.module.load_state_dict(merged(base_of(nets["teacher"]), nets["student"].module.state_dict(), 2.0))
    torch.testing.assert_close(merged_net(x, t, cond).velocity, want, rtol=0, atol=2e-6)


def test_cosmos_says_itself_where_adapters_lie() -> None:
    names = target_names(COSMOS.build(), Lora(), "")
    assert len(names) == 2 * 10 and not any("norm" in name for name in names)
    assert len(target_names(DIT.build(), Lora(), "")) == 3 * 8


def test_kohya_names_carry_their_alpha() -> None:
    nets = shared()
    state = nets["critic"].module.state_dict()
    tensors = as_kohya(state, scale=2.0)
    assert float(tensors["lora_unet_blocks_0_qkv.alpha"]) == 4.0
    down, up = tensors["lora_unet_blocks_0_qkv.lora_down.weight"], tensors["lora_unet_blocks_0_qkv.lora_up.weight"]
    low_rank = as_diffusers(state, 2.0, "")
    torch.testing.assert_close(
        up @ down * (4.0 / down.shape[0]), low_rank["blocks.0.qkv.lora_B.weight"] @ low_rank["blocks.0.qkv.lora_A.weight"]
    )


# --- extraction ---------------------------------------------------------------------------------------------------------


def test_extraction_is_exact_when_the_rank_suffices_and_else_leaves_the_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = {"a.weight": draw(9, 7), "a.bias": draw(9), "b.weight": draw(5, 8)}
    full = {"a.weight": base["a.weight"] + draw(9, 3) @ draw(3, 7), "a.bias": base["a.bias"] + 1, "b.weight": draw(5, 8)}
    exact = extract(base, full, ["a"], rank=3)
    assert exact.error["a"] < 1e-12 and exact.share < 1e-12
    assert exact.left_out == ("a.bias", "b.weight")
    torch.testing.assert_close(merged(base, exact.adapters)["a.weight"], full["a.weight"], rtol=0, atol=1e-6)

    for rank in (2, 4):
        found = extract(base, full, ["b"], rank=rank)
        tail = torch.linalg.svdvals(full["b.weight"] - base["b.weight"])[rank:]
        assert found.error["b"] == pytest.approx(float(tail.norm()), rel=1e-9)
        rest = full["b.weight"] - merged(base, found.adapters)["b.weight"]
        assert float(rest.norm()) == pytest.approx(float(tail.norm()), rel=1e-5)
    errors = [extract(base, full, ["a", "b"], rank).share for rank in range(1, 9)]
    assert all(a >= b for a, b in pairwise(errors)) and errors[-1] < 1e-12
    assert extract(base, full, ["b"], 9).adapters["b.lora_A.weight"].shape == (9, 8)  # more than there can be: zeros


def test_a_role_begins_with_what_is_extracted_from_a_full_student(tmp_path: Path) -> None:
    base: Any = build(Networks(DIT), ("teacher",), seed=1)["teacher"]
    student = copy.deepcopy(base)
    for name, parameter in student.module.named_parameters():
        if name.startswith("blocks.") and name.endswith("weight"):
            parameter.data += torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]) * 0.1
    save_file(student.module.state_dict(), tmp_path / "full.safetensors")
    x, t, cond = inputs()
    want = student(x.float(), t, cond).velocity
    nets: Any = build(Networks(DIT, Lora(rank=2, scale=3.0, init=str(tmp_path / "full.safetensors"))), ("student",), seed=1)
    torch.testing.assert_close(nets["student"](x.float(), t, cond).velocity, want, rtol=1e-4, atol=1e-4)

    student.module.enter.bias.data += 1
    save_file(student.module.state_dict(), tmp_path / "full.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors differ.*enter\.bias"):
        build(Networks(DIT, Lora(rank=2, init=str(tmp_path / "full.safetensors"))), ("student",), seed=1)
    lora = Lora(rank=2, train=("enter",), init=str(tmp_path / "full.safetensors"))
    nets = build(Networks(DIT, lora), ("student",), seed=1)
    torch.testing.assert_close(
        nets["student"](x.float(), t, cond).velocity, student(x.float(), t, cond).velocity, rtol=1e-4, atol=1e-4
    )
    save_file(nets["student"].module.state_dict(), tmp_path / "adapters.safetensors")
    again: Any = build(Networks(DIT, replace(lora, init=str(tmp_path / "adapters.safetensors"))), ("student",), seed=7)
    for name, tensor in again["student"].module.state_dict().items():
        assert torch.equal(tensor, nets["student"].module.state_dict()[name])


# --- wrong use ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"networks\.student\.targets: this network has no Linear layer"):
        build(Networks(MixtureSpec(), Lora()), ("student",), seed=1)
    with pytest.raises(ValueError, match=r"networks\.student\.targets: no layer .* 'qkw'.* there are qkv"):
        build(Networks(DIT, Lora(targets=("qkw",))), ("student",), seed=1)
    with pytest.raises(ValueError, match=r"networks\.critic\.targets: blocks\.0\.norm is no Linear"):
        build(Networks(DIT, critic=Lora(targets=("norm",))), ("critic",), seed=1)
    with pytest.raises(ValueError, match=r"networks\.student\.train: .* has an adapter already"):
        build(Networks(DIT, Lora(train=("qkv",))), ("student",), seed=1)
    with pytest.raises(ValueError, match=r"networks\.student: adapters lie over the teacher's weights"):
        build(Networks(student=Lora()), ("student",), seed=1)
    with pytest.raises(ValueError, match="export it merged"):
        as_diffusers(build(Networks(DIT, Lora(train=("enter",))), ("student",), seed=1)["student"].module.state_dict())
    keys = {
        key
        for bad in (
            Lora(rank=0),
            Lora(scale=-1.0),
            Lora(targets=("to_q:0",)),
            Lora(first_nblocks=0),
            Lora(init="random"),
            Lora(targets=()),
        )
        for key, _ in bad.problems()
    }
    assert keys == {"rank", "scale", "init", "targets", "first_nblocks"}


def test_a_full_role_beside_adapters_is_a_copy_of_the_teacher_alone() -> None:
    nets: Any = build(Networks(DIT, Full(), Lora(rank=2)), ("student", "critic", "teacher"), seed=1)
    assert list(nets) == ["student", "critic", "teacher"]
    assert not any("lora" in name for name, _ in nets["student"].module.named_parameters())
    assert len(wholes(nets)) == 2


def test_adapters_are_told_apart_by_the_module_of_diffusers_they_lie_in() -> None:
    controlled = CosmosControlSpec()
    names = {
        "base.transformer_blocks.0.attn1.to_q": (controlled, "transformer", "transformer_blocks.0.attn1.to_q"),
        "branches.edge.control_blocks.0.attn1.to_q": (controlled, "controlnet", "control_blocks.0.attn1.to_q"),
        "transformer.blocks.0.attn1.to_q": (ExpertsSpec(), "transformer", "blocks.0.attn1.to_q"),
        "transformer_2.blocks.0.attn1.to_q": (ExpertsSpec(), "transformer_2", "blocks.0.attn1.to_q"),
        "transformer_blocks.1.attn1.to_q": (CosmosSpec(), "transformer", "transformer_blocks.1.attn1.to_q"),
        "blocks.0.attn1.to_q": (WanSpec(), "transformer", "blocks.0.attn1.to_q"),
        "mid_block.attentions.0.to_q": (UnetSpec(), "unet", "mid_block.attentions.0.to_q"),
    }
    for name, (spec, part, inside) in names.items():
        tensor = torch.randn(2, 3)
        assert spec.by_part({f"{name}.lora_A.weight": tensor}) == {part: {f"{inside}.lora_A.weight": tensor}}
    two = controlled.by_part({f"branches.{control}.x.lora_A.weight": torch.zeros(1) for control in ("edge", "depth")})
    assert set(two) == {"controlnet_edge", "controlnet_depth"}
