"""Frozen networks that take less memory answer as they did, and let gradients through."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.networks.frozen import Offloaded, to_8bit
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Networks, build, wholes
from fewstep.networks.tiny import Tiny, TinySpec
from fewstep.parallel import World, place

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


def test_eight_bits_without_torchao_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"trainer\.frozen=8bit needs torchao: pip install"):
        to_8bit([nn.Linear(2, 2)])


@pytest.mark.filterwarnings("ignore")  # torchao's
def test_eight_bits_are_near_and_adapters_on_them_learn_as_on_the_dequantised_weights() -> None:
    pytest.importorskip("torchao")
    nets: Any = build(Networks(DIT, Lora(rank=2)), ("student", "teacher"), 0)
    torch.manual_seed(1)
    for parameter in nets["teacher"].module.parameters():
        nn.init.normal_(parameter, std=0.2)
    (whole,) = wholes(nets)
    place(whole.module, tuple(whole.blocks), ALONE, mode="ddp", compute=torch.float32, trained=False, adapters=whole.adapters)
    x = torch.randn(2, 2, 2, 4, 4)
    exact = asked(nets["teacher"], x).velocity
    before = {n: m.weight.detach().clone() for n, m in whole.module.named_modules() if isinstance(m, nn.Linear)}
    count = to_8bit([whole.module])
    assert count == 2 + 2 + 5 * 2  # enter, leave, time, and five in each block; no adapter
    rounded = asked(nets["teacher"], x).velocity
    assert 1e-5 < float((rounded - exact).abs().max() / exact.abs().max()) < 0.1

    plain = copy.deepcopy(DIT.build())  # the same network with the weights that eight bits stand for
    for name, layer in whole.module.named_modules():
        if isinstance(layer, nn.Linear) and ".lora_" not in name:
            dense = layer.weight.dequantize() if hasattr(layer.weight, "dequantize") else layer.weight
            step = before[name].abs().amax(1, keepdim=True) / 127
            assert bool(((dense - before[name]).abs() <= 0.51 * step).all())
            plain.module.get_submodule(name.replace(".base_layer", "")).weight.data = dense.detach().clone()
            if layer.bias is not None:
                plain.module.get_submodule(name.replace(".base_layer", "")).bias.data = layer.bias.detach().clone()
    torch.testing.assert_close(asked(plain, x).velocity, rounded, rtol=1e-4, atol=1e-5)
    given = x.clone().requires_grad_()
    asked(nets["student"], given).x0.square().sum().backward()
    assert given.grad is not None and all(p.grad is not None for p in nets["student"].module.parameters())
