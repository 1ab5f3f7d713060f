"""Frozen networks that take less memory answer as they did, and let gradients through."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.batch import Condition
from fewstep.networks.frozen import Offloaded, round_frozen
from fewstep.networks.grid import Grid, on_grid
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Networks, build, wholes
from fewstep.networks.tiny import Tiny, TinySpec
from fewstep.parallel import World, place
from tests.networks.test_grid import nearest

ALONE = World(0, 1, torch.device("cpu"), None)
DIT = TinySpec("dit", channels=2, width=32, depth=2, num_heads=2)


def teacher(checkpointing: bool = False) -> Tiny:
    torch.manual_seed(0)
    net = DIT.build()
    for parameter in net.module.parameters():
        nn.init.normal_(parameter, std=0.2)
    place(net.module, net.blocks, ALONE, mode="ddp", compute=torch.float32, trained=False, checkpointing=checkpointing)
    return net


def asked(net: Any, x: Tensor) -> Any:
    return net(x, torch.tensor([0.3, 0.8], dtype=torch.float64), Condition(), taps=(0,))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_offloaded_network_answers_as_before_and_is_away_between_calls(checkpointing: bool) -> None:
    net = teacher(checkpointing)
    away = Offloaded(copy.deepcopy(teacher(checkpointing)), torch.device("cpu"))  # a copy on the same device stands for a GPU's
    home = {name: p.data_ptr() for name, p in away.module.named_parameters()}
    seen: list[bool] = []
    away.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(all(p.data_ptr() != home[n] for n, p in away.module.named_parameters()))
    )
    x = torch.randn(2, 2, 2, 4, 4)
    assert torch.equal(asked(away, x).velocity, asked(net, x).velocity)
    assert {name: p.data_ptr() for name, p in away.module.named_parameters()} == home and all(seen)

    gradients: list[Tensor] = []
    for one in (net, away):  # through the frozen network into its input, as a GAN on its features needs
        given = x.clone().requires_grad_()
        answer = asked(one, given)
        (answer.x0.square().sum() + answer.features[0].square().sum()).backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    with torch.no_grad():
        asked(away, x)
    assert {name: p.data_ptr() for name, p in away.module.named_parameters()} == home and all(seen)


def test_what_is_trained_is_not_offloaded() -> None:
    with pytest.raises(ValueError, match="trained cannot be kept"):
        Offloaded(DIT.build(), torch.device("cpu"))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grid", ["int8", "float8"])
def test_a_rounded_network_is_the_network_with_rounded_weights_also_below_adapters(grid: Grid, compute: torch.dtype) -> None:
    """Values, gradients to the input and tangents; and for backward it keeps no weight in the type of compute."""
    nets: Any = build(Networks(DIT, Lora(rank=2)), ("student", "teacher"), 0)
    torch.manual_seed(1)
    for parameter in nets["teacher"].module.parameters():
        nn.init.normal_(parameter, std=0.2)
    (whole,) = wholes(nets)
    place(whole.module, tuple(whole.blocks), ALONE, mode="ddp", compute=compute, trained=False, adapters=whole.adapters)
    plain: Any = build(Networks(DIT), ("teacher",), 0)["teacher"]
    place(plain.module, tuple(plain.blocks), ALONE, mode="ddp", compute=compute, trained=False)
    for name, parameter in whole.module.named_parameters():
        if ".lora_" not in name:
            plain.module.get_parameter(name.replace(".base_layer", "")).data = parameter.detach().clone()
    x = torch.randn(2, 2, 2, 4, 4)
    exact = asked(nets["teacher"], x).velocity.detach()
    assert round_frozen([whole.module], grid) == 2 + 2 + 5 * 2  # enter, leave, time, and five in each block; no adapter
    for layer in plain.module.modules():
        if isinstance(layer, nn.Linear):
            # bf16 would magnify what float64 and fp32 differ by; `on_grid` has its own test against float64
            layer.weight.data = (nearest if compute == torch.float32 else on_grid)(layer.weight, grid).to(compute)
    answers: list[Tensor] = []
    gradients: list[Tensor] = []
    tangents: list[Tensor] = []
    kept: list[int] = []
    for net in (plain, nets["teacher"]):
        given, own = x.clone().requires_grad_(), {p.untyped_storage().data_ptr() for p in net.module.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = asked(net, given)
        kept.append(sum(size for storage, size in saved.items() if storage not in own))
        answers.append(answer.velocity.detach())
        (answer.x0.square().sum() + answer.features[0].float().square().sum()).backward()
        assert given.grad is not None
        gradients.append(given.grad)
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            tangent = forward_ad.unpack_dual(asked(net, forward_ad.make_dual(x, torch.ones_like(x))).velocity).tangent
        assert tangent is not None
        tangents.append(tangent)
    assert 1e-4 < float((answers[1] - exact).abs().max() / exact.abs().max()) < 0.2
    for want, got in (answers, gradients, tangents):
        assert float((got - want).abs().max() / want.abs().max()) <= (1e-5 if compute == torch.float32 else 0)
    assert kept[1] == kept[0] > 0
    given = x.clone().requires_grad_()
    asked(nets["student"], given).x0.square().sum().backward()
    assert given.grad is not None and all(p.grad is not None for p in nets["student"].module.parameters())


@pytest.mark.slow
def test_a_rounded_layer_is_compiled_whole() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
    assert round_frozen([layers], "float8") == 2
    results: list[tuple[Tensor, Tensor]] = []
    for module in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_()
        answer = module(x)
        results.append((answer.detach(), *torch.autograd.grad(answer.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0])
