"""Roles: whose weights a student and a critic begin with."""

import pytest
import torch
from safetensors.torch import save_file

from fewstep.batch import Condition
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks, build, twin_of
from fewstep.networks.tiny import TinySpec

TINY = TinySpec(width=8, depth=2)
ROLES = ("student", "teacher", "critic")


def weights(net):
    return {name: value.clone() for name, value in net.module.state_dict().items()}


def equal(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_copy_of_the_teacher_is_equal_and_independent():
    nets = build(Networks(teacher=TINY), ROLES, seed=3)
    assert equal(nets["student"], nets["teacher"]) and equal(nets["critic"], nets["teacher"])
    before = weights(nets["teacher"])
    x, t = torch.ones(2, 2), torch.full((2,), 0.5)
    answer = nets["teacher"](x, t, Condition()).velocity
    with torch.no_grad():
        for parameter in nets["student"].module.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in weights(nets["teacher"]).items())
    assert equal(nets["critic"], nets["teacher"])
    assert torch.equal(nets["teacher"](x, t, Condition()).velocity, answer)
    assert not torch.equal(nets["student"](x, t, Condition()).velocity, answer)


def test_the_blocks_of_a_copy_are_its_own():
    """What is wrapped and checkpointed must be what is trained."""
    net = TINY.build()
    twin = twin_of(net)
    assert [id(block) for block in twin.blocks] == [id(block) for block in twin.module.blocks]
    assert not {id(block) for block in twin.blocks} & {id(block) for block in net.blocks}


def test_a_copy_of_a_frozen_teacher_can_be_trained():
    net = TINY.build()
    net.module.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in twin_of(net).module.parameters())
    assert not any(parameter.requires_grad for parameter in net.module.parameters())


def test_random_weights_depend_on_seed_and_role_only():
    config = Networks(teacher=MixtureSpec(), student=Full(TINY, "random"), critic=Full(TINY, "random"))
    first = build(config, ROLES, seed=1)
    torch.manual_seed(99)
    torch.randn(7)
    state = torch.get_rng_state()
    again = build(config, ("critic", "student"), seed=1)  # another order, another global state
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first["student"], again["student"]) and equal(first["critic"], again["critic"])
    assert not equal(first["student"], first["critic"])
    assert not equal(first["student"], build(config, ("student",), seed=2)["student"])


def test_weights_from_an_address(tmp_path):
    source = TINY.build()
    save_file(source.module.state_dict(), tmp_path / "w.safetensors")
    address = str(tmp_path / "w.safetensors")
    nets = build(Networks(teacher=TINY, teacher_init=address, student=Full(init=address), critic=Full()), ROLES, seed=1)
    assert equal(nets["student"], source) and equal(nets["teacher"], source) and equal(nets["critic"], source)
    own = build(Networks(student=Full(TINY, address)), ("student",), seed=1)
    assert equal(own["student"], source)
    with pytest.raises(ValueError, match=r"networks\.student\.init.*do not fit"):
        build(Networks(student=Full(TinySpec(width=16, depth=2), address)), ("student",), seed=1)


def test_what_is_missing_is_named_by_its_key():
    with pytest.raises(ValueError, match=r"networks\.teacher: this method asks a teacher"):
        build(Networks(student=Full(TINY, "random")), ROLES, seed=1)
    with pytest.raises(ValueError, match=r"networks\.student: has no network of its own"):
        build(Networks(), ("student",), seed=1)
    assert [key for key, _ in Full(TINY).problems()] == ["init"]
    assert not list(Full().problems()) and not list(Full(TINY, "random").problems())
