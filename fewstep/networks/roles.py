"""Roles: which network plays student, teacher, critic, and where its weights come from."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import nn

from fewstep.config import OneOf, kind
from fewstep.errors import UserError
from fewstep.networks.causal import Causal, CausalSpec
from fewstep.networks.causal_attention import Causality
from fewstep.networks.contract import AnyNetwork, Network
from fewstep.networks.files.folders import Configurations, noting, unread
from fewstep.networks.grid import Grid
from fewstep.networks.heads import AnyHead
from fewstep.networks.lora import Backbone, Lora, Shared, as_adapters
from fewstep.networks.weights.addresses import load_into, read
from fewstep.networks.weights.folders import refuse_contradictions
from fewstep.parallel import Context

FROZEN = ("teacher",)  # roles that no turn trains


class Role(Protocol):
    @property
    def network(self) -> AnyNetwork | None: ...

    @property
    def init(self) -> str: ...

    @property
    def causal(self) -> Causality | None: ...


AnyRole = Annotated[Role, OneOf("role")]


@kind("full", group="role")
@dataclass(frozen=True)
class Full:
    """A network of its own, all weights trained."""

    network: AnyNetwork | None = None  # None: the teacher's
    # "teacher": a copy of its weights; "random"; or a weights address (networks/weights). Two experts each get those of one
    init: str = "teacher"
    causal: Causality | None = None  # chunk-wise causal attention over the same weights; none: as the network is
    rounding: Grid | None = (
        None  # of a student: its Linear layers compute with weights of this grid, and float ones are trained
    )

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.network is not None and self.init == "teacher" and not self.network.starts_as_teacher:
            yield "init", "is 'teacher', but this role has a network of its own: give a weights address, or init=random"
        if self.causal is not None and isinstance(self.network, CausalSpec):
            yield "causal", "is set, but this role's network is causal already (kind causal): leave one of them out"


@dataclass(frozen=True)
class Networks:
    teacher: AnyNetwork | None = None
    student: AnyRole = Full()
    critic: AnyRole = Full()
    teacher_init: str | None = None  # weights address for the teacher; None: what its configuration builds
    head: AnyHead | None = None  # the discriminator of methods with a GAN

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("student", "critic"):
            role = getattr(self, name)
            if role.causal is not None and role.network is None and isinstance(self.teacher, CausalSpec):
                yield f"{name}.causal", "is set, but this role has the network of the teacher, which is causal already"
        if self.rounding_of("critic") is not None:
            yield (
                "critic.rounding",
                "is for the student, which is sampled with rounded weights; a critic is not used afterwards",
            )

    def rounding_of(self, role: str) -> Grid | None:
        """The grid of the weights that `role` computes with; None: they are as they are trained."""
        own = getattr(self, role, None)
        return own.rounding if isinstance(own, Full) else None

    def spec_of(self, role: str) -> AnyNetwork | None:
        """What builds a network by itself for the weights of `role`; adapters are merged into it."""
        if role == "teacher":
            return self.teacher
        own: Role = getattr(self, role)
        spec = own.network or self.teacher
        return spec if spec is None or own.causal is None else CausalSpec.over(spec, own.causal)

    def refuse_contradictions(self) -> None:
        """Raises ConfigError where a network is configured otherwise than the folder of its weights says."""
        own = (("student", self.student.network), ("critic", self.critic.network))
        refuse_contradictions([("networks.teacher", self.teacher), *((f"networks.{role}.network", spec) for role, spec in own)])


def build(
    config: Networks,
    roles: Iterable[str],
    seed: int,
    resumes: bool = False,
    noted: Configurations | None = None,
    *,
    divided: bool = False,
) -> dict[str, Network]:
    """The networks of `roles`, on the CPU, with their weights.

    resumes: a checkpoint will fill the trained roles, so that the weights they started from are not read (`init`).
    noted: the configurations of their models, added to here; of a run that resumes, they stand for the folders.
    divided: FSDP will copy each process's share of the weights before they change. Until then they stay mapped from their
    files, and roles that begin alike refer to the same ones: no process of a machine holds a network whole.
    """
    is_read = divided and config.teacher_init is not None
    teacher = None if config.teacher is None else _network(config.teacher, "teacher", seed, empty=is_read)
    if teacher is not None and config.teacher_init:
        weights = read(config.teacher_init, teacher.module)
        load_into(teacher.module, weights, config.teacher_init, replaces=divided)
    nets: dict[str, Network] = {}
    roles = tuple(roles)
    adapted = [role for role in roles if isinstance(getattr(config, role), Lora)]
    for role in roles:
        if role in adapted:
            continue  # after the others: a full role is a copy of the teacher as it was
        if role == "teacher":
            if teacher is None:
                raise UserError("networks.teacher: this method asks a teacher, but none is configured")
            nets[role] = teacher
        elif role == "head":
            if config.head is None:
                raise UserError("networks.head: this method trains a discriminator, but none is configured")
            nets[role] = _network(config.head, role, seed)  # no Denoiser, but with a module to place, train and save
        else:
            with noting({} if noted is None else noted, resumes):
                nets[role] = _role(getattr(config, role), config, teacher, role, seed, resumes, divided)
    if adapted:
        if teacher is None:
            raise UserError(f"networks.{adapted[0]}: adapters lie over the teacher's weights, and there is no teacher")
        nets |= _adapted({role: getattr(config, role) for role in adapted}, teacher, seed, resumes)
        if "teacher" in nets:
            shared = nets[adapted[0]]
            assert isinstance(shared, Shared)
            nets["teacher"] = shared.backbone.itself()
    return {role: nets[role] for role in roles}


def _adapted(configs: Mapping[str, Lora], teacher: Network, seed: int, resumes: bool) -> dict[str, Network]:
    """The roles that are adapters over `teacher`, whose module is changed in place to hold them."""
    base = {name: tensor.detach() for name, tensor in teacher.module.state_dict().items()}
    backbone = Backbone(teacher)
    nets: dict[str, Network] = {}
    for role, config in configs.items():
        with drawing(role, seed):
            nets[role] = backbone.add(role, config)
        if config.init != "teacher" and not resumes:
            source = f"{config.init} (networks.{role}.init)"
            load_into(nets[role].module, as_adapters(read(config.init), base, nets[role].module, config, source), source)
    return nets


@dataclass(frozen=True)
class Whole:
    """What is placed at once: the network of one role, or the one that several roles share."""

    module: nn.Module
    blocks: Iterable[nn.Module]
    trained: bool
    adapters: tuple[nn.Module, ...] = ()  # parts of a frozen module that are trained
    remember: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]] | None = None
    waits: bool = True  # every micro-batch reaches the same weights, so that only the last one must sum over replicas
    share_tokens: Callable[[Context], None] | None = None  # see the contract of networks; None: it has no tokens of its own
    roles: frozenset[str] = frozenset()  # that it serves


def wholes(nets: Mapping[str, Network]) -> list[Whole]:
    """Every module of these roles once."""
    result: list[Whole] = []
    backbones: set[int] = set()
    sharing = frozenset(role for role, network in nets.items() if isinstance(network, Shared))
    for role, network in nets.items():
        if not isinstance(network, Shared):
            if role == "head":  # which reads features of all tokens
                result.append(Whole(network.module, network.blocks, True, roles=frozenset({role})))
                continue
            waits = network.traits.boundary is None  # of two experts a micro-batch may ask one
            own, trained = frozenset({role}), role not in FROZEN
            result.append(Whole(network.module, network.blocks, trained, (), None, waits, network.share_tokens, own))
        elif id(network.backbone) not in backbones:
            backbones.add(id(network.backbone))
            backbone, inner = network.backbone, network.backbone.network
            adapters = tuple(backbone.adapters.values())
            waits = inner.traits.boundary is None
            share = inner.share_tokens
            result.append(Whole(inner.module, inner.blocks, False, adapters, backbone.remember, waits, share, sharing))
    return result


def _role(role: Role, config: Networks, teacher: Network | None, name: str, seed: int, resumes: bool, divided: bool) -> Network:
    network = _weighted_role(role, config, teacher, name, seed, resumes, divided)
    return network if role.causal is None else Causal.of(network, role.causal)


def _weighted_role(
    role: Role, config: Networks, teacher: Network | None, name: str, seed: int, resumes: bool, divided: bool
) -> Network:
    if role.network is None and teacher is None:
        raise UserError(f"networks.{name}: has no network of its own, and there is no teacher to take after")
    if role.network is None and role.init == "teacher":
        assert teacher is not None
        return twin_of(teacher, refers=divided)
    is_read = role.init != "random" and not resumes
    network = _network(role.network or config.teacher, name, seed, empty=divided and is_read)
    if not is_read:
        return network
    if role.init != "teacher":
        weights = read(role.init, network.module)
    elif teacher is None:
        raise UserError(f"networks.{name}.init: is teacher, and there is none: give a weights address, or random")
    else:
        weights = teacher.module.state_dict()
    load_into(network.module, network.own_weights(weights), f"{role.init} (networks.{name}.init)", replaces=divided)
    return network


def twin_of(network: Network, *, refers: bool = False) -> Network:
    """A second network with weights of its own, equal to those of `network`; refers: its weights are the same memory."""
    memo: dict[int, Any] = {}
    if refers:
        memo = {id(parameter): nn.Parameter(parameter.data) for parameter in network.module.parameters()}
    twin = copy.deepcopy(network, memo)
    for parameter in twin.module.parameters():
        parameter.requires_grad_(True)
    return twin


def _network(spec: Any, role: str, seed: int, empty: bool = False) -> Network:  # Any: whatever the user registered as "network"
    """empty: its parameters have shapes and no numbers, because they will be replaced; its buffers are as they are."""
    with drawing(role, seed), _without_numbers() if empty else nullcontext():
        return spec.build()


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Within, parameters of new modules, and of those of diffusers that would read them, are on torch's meta device."""
    from accelerate import init_empty_weights

    with unread(), init_empty_weights(include_buffers=False):
        yield


@contextmanager
def drawing(role: str, seed: int) -> Iterator[None]:
    """Within, torch's global generator draws what belongs to this role, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + zlib.crc32(role.encode()))
        yield
