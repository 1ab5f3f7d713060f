"""Roles: which network plays student, teacher, critic, and where its weights come from."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch

from fewstep.config import OneOf, kind
from fewstep.networks.contract import AnyNetwork, Network
from fewstep.networks.weights import load_into, read


class Role(Protocol):
    @property
    def network(self) -> AnyNetwork | None: ...

    @property
    def init(self) -> str: ...


AnyRole = Annotated[Role, OneOf("role")]


@kind("full", group="role")
@dataclass(frozen=True)
class Full:
    """A network of its own, all weights trained."""

    network: AnyNetwork | None = None  # None: the teacher's
    init: str = "teacher"  # "teacher": a copy of its weights; "random"; or a weights address (networks/weights.py)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.network is not None and self.init == "teacher":
            yield "init", "is 'teacher', but this role has a network of its own: give a weights address, or init=random"


@dataclass(frozen=True)
class Networks:
    teacher: AnyNetwork | None = None
    student: AnyRole = Full()
    critic: AnyRole = Full()
    teacher_init: str | None = None  # weights address for the teacher; None: what its configuration builds


def build(config: Networks, roles: Iterable[str], seed: int) -> dict[str, Network]:
    """The networks of `roles`, on the CPU, with their weights."""
    teacher = None if config.teacher is None else _built(config.teacher, "teacher", seed)
    if teacher is not None and config.teacher_init:
        load_into(teacher.module, read(config.teacher_init), config.teacher_init)
    nets: dict[str, Network] = {}
    for role in roles:
        if role == "teacher":
            if teacher is None:
                raise ValueError("networks.teacher: this method asks a teacher, but none is configured")
            nets[role] = teacher
        else:
            nets[role] = _role(getattr(config, role), config, teacher, role, seed)
    return nets


def _role(role: Role, config: Networks, teacher: Network | None, name: str, seed: int) -> Network:
    if role.network is None and teacher is None:
        raise ValueError(f"networks.{name}: has no network of its own, and there is no teacher to take after")
    if role.init == "teacher":
        assert teacher is not None
        return twin_of(teacher)
    network = _built(role.network or config.teacher, name, seed)
    if role.init != "random":
        load_into(network.module, read(role.init), f"{role.init} (networks.{name}.init)")
    return network


def twin_of(network: Network) -> Network:
    """A second network with weights of its own, equal to those of `network`."""
    twin = copy.deepcopy(network)
    for parameter in twin.module.parameters():
        parameter.requires_grad_(True)
    return twin


def _built(spec: Any, role: str, seed: int) -> Network:  # Any: whatever the user registered in group "network"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + zlib.crc32(role.encode()))
        return spec.build()
