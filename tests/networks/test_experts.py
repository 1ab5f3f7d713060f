"""Experts by noise level: who answers, whose weights learn, and what a copy shares."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.batch import Condition
from fewstep.networks.families.wan.experts import Experts, ExpertsSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.roles import Full, Networks, build, twin_of
from fewstep.networks.tiny import TinySpec

WAN = WanSpec(
    num_heads=2,
    head_dim=12,
    num_layers=2,
    ffn_dim=16,
    text_dim=8,
    text_tokens=5,
    freq_dim=16,
    latent_channels=4,
    max_positions=16,
)
T = torch.tensor([0.95, 0.2, 0.9], dtype=torch.float64)


def network() -> Experts:
    torch.manual_seed(0)
    return ExpertsSpec(WAN, WAN, 0.9).build()


def inputs() -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 2, 4, 4, generator=generator), Condition(text=torch.randn(3, 5, 8, generator=generator))


def test_each_row_is_answered_by_the_expert_of_its_noise_level() -> None:
    net, (x, cond) = network(), inputs()
    answer = net(x, T, cond, taps=(1,))
    high, low = net.high(x, T, cond, taps=(1,)), net.low(x, T, cond, taps=(1,))
    for row, expert in enumerate((high, low, high)):  # the boundary itself belongs to the high one
        torch.testing.assert_close(answer.velocity[row], expert.velocity[row], rtol=0, atol=1e-6)
        torch.testing.assert_close(answer.features[0][row], expert.features[0][row], rtol=0, atol=1e-6)


def test_the_noisiest_free_frame_decides() -> None:
    net, (x, cond) = network(), inputs()
    t = torch.tensor([[0.95, 0.1], [0.95, 0.1], [0.5, 0.6]], dtype=torch.float64)
    given = replace(cond, frames=x, frame_mask=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert net.is_high(t, given).tolist() == [True, False, False]
    assert net.is_high(t, cond).tolist() == [True, True, False]
    torch.testing.assert_close(net(x, t, given).velocity[1], net.low(x, t, given).velocity[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("t, learns", [(T[[0, 2]], "transformer."), (T[[1]], "transformer_2.")])
def test_only_the_expert_that_answered_learns(t: Tensor, learns: str) -> None:
    net, (x, cond) = network(), inputs()
    net(x[: len(t)], t, cond.rows(slice(0, len(t)))).x0.square().sum().backward()
    taught = {name.split(".")[0] + "." for name, parameter in net.module.named_parameters() if parameter.grad is not None}
    assert taught == {learns}


def test_gradients_of_mixed_rows_are_those_of_the_rows_alone() -> None:
    net, (x, cond) = network(), inputs()
    weights = list(net.module.parameters())
    together = torch.autograd.grad(net(x, T, cond).x0.square().sum(), weights)
    high = net.high(x[[0, 2]], T[[0, 2]], cond.rows(torch.tensor([0, 2]))).x0.square().sum()
    apart = torch.autograd.grad(high + net.low(x[[1]], T[[1]], cond.rows(torch.tensor([1]))).x0.square().sum(), weights)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_copy_shares_no_weight_and_answers_with_its_own() -> None:
    net, (x, cond) = network(), inputs()
    twin = twin_of(net)
    before = net(x, T, cond).velocity
    torch.testing.assert_close(twin(x, T, cond).velocity, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    assert float(twin(x, T, cond).velocity.detach().abs().max()) == 0.0
    torch.testing.assert_close(net(x, T, cond).velocity, before, rtol=0, atol=0)


def test_both_experts_are_saved_under_the_names_of_diffusers() -> None:
    names = network().module.state_dict()
    assert {name.split(".")[0] for name in names} == {"transformer", "transformer_2"}
    assert len(names) == 2 * len(WAN.build().module.state_dict())


def test_experts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree in path and number of blocks"):
        ExpertsSpec(WAN, TinySpec("dit", channels=4)).build()


def test_a_phased_student_begins_as_its_teacher_twice(tmp_path: Path) -> None:
    """From the teacher itself, from the address of one network, and from that of two: at the start it answers as they do."""
    teacher, (x, cond) = replace(WAN, num_layers=1), inputs()
    pair = ExpertsSpec(teacher, teacher, 0.9)
    nets = build(Networks(teacher=teacher, student=Full(pair)), ("student", "teacher"), seed=1)
    student = nets["student"]
    assert isinstance(student, Experts)
    torch.testing.assert_close(student(x, T, cond).velocity, nets["teacher"](x, T, cond).velocity, rtol=0, atol=1e-6)
    kept = {name: tensor.clone() for name, tensor in nets["teacher"].module.state_dict().items()}
    with torch.no_grad():
        for parameter in student.high.module.parameters():
            parameter.add_(1.0)  # the other expert and the teacher have weights of their own
    for others in (student.low.module, nets["teacher"].module):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in others.state_dict().items())

    for held, module in (("one", nets["teacher"].module), ("two", student.module)):
        address = str(tmp_path / f"{held}.safetensors")
        save_file(module.state_dict(), address)
        found = build(Networks(teacher=teacher, student=Full(pair, address)), ("student",), seed=2)["student"]
        wanted = nets["teacher"] if held == "one" else student
        torch.testing.assert_close(found(x, T, cond).velocity, wanted(x, T, cond).velocity, rtol=0, atol=1e-6)


def test_experts_that_the_teacher_does_not_fit_are_refused_by_their_key() -> None:
    with pytest.raises(ValueError, match=r"teacher \(networks\.student\.init\)' do not fit the network"):
        build(Networks(teacher=replace(WAN, num_layers=1), student=Full(ExpertsSpec(WAN, WAN, 0.9))), ("student", "teacher"), 1)
    with pytest.raises(ValueError, match=r"networks\.student\.init: is teacher, and there is none"):
        build(Networks(student=Full(ExpertsSpec(WAN, WAN, 0.9))), ("student",), 1)
