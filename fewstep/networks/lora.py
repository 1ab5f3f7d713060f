"""Roles that share one backbone: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) over one frozen network.

    W' = W + scale B A,      B (out, rank), A (rank, in),      scale = alpha / rank

Student and critic are adapters over the teacher's weights, so that one network is in memory where there were three. Which
adapter speaks is switched inside the role's call. A block that is recomputed in backward is recomputed when another role may
have spoken since: `Backbone.remember` gives the recomputation the role that its forward had.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Prediction
from fewstep.errors import UserError
from fewstep.networks.causal import Causal
from fewstep.networks.causal_attention import Causality
from fewstep.networks.contract import Network, Wrapper


@kind("lora", group="role")
@dataclass(frozen=True)
class Lora:
    """Adapters over the teacher's frozen weights, which stay in memory once."""

    rank: int = 32
    alpha: float | None = None  # the adapters count alpha / rank; None: rank, so that they count 1
    targets: tuple[str, ...] | None = None  # endings of names of Linear layers; None: the network's choice, else all in blocks
    train: tuple[str, ...] = ()  # endings of names of other layers, trained in full beside the adapters (norms, embeddings)
    init: str = "teacher"  # "teacher": begins as the teacher; or the address of adapters, or of a full student to extract them
    causal: Causality | None = None  # chunk-wise causal attention for this role alone; none: as the teacher is

    @property
    def network(self) -> None:
        """None: the network is the teacher's, always."""
        return

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.rank < 1:
            yield "rank", f"must be at least 1, not {self.rank}"
        if self.alpha is not None and self.alpha <= 0:
            yield "alpha", f"must be above 0, or none for the rank, not {self.alpha}"
        if self.targets is not None and not self.targets and not self.train:
            yield "targets", "is empty and so is train: not one weight of this role would be trained"
        if self.init == "random":
            yield "init", "cannot be random for adapters: they lie over the teacher's weights. teacher, or a weights address"


class Backbone:
    """One network whose own weights are frozen, and the adapters of the roles that share it."""

    def __init__(self, network: Network):
        self.network = network
        # The very list that every adapted layer looks at (peft's `_active_adapter`): one assignment switches all of them.
        self.active: list[str] = []
        self.adapters: dict[str, nn.Module] = {}

    def add(self, role: str, config: Lora) -> Shared:
        """Adapters of `role`, which change nothing yet; drawn from torch's global generator."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        module = self.network.module
        names = target_names(self.network, config.targets, f"networks.{role}.targets")
        own = _matching(module, config.train, f"networks.{role}.train") if config.train else []
        clash = [name for name in own if any(_below(name, target) or _below(target, name) for target in names)]
        if clash:
            raise UserError(f"networks.{role}.train: {clash[0]} has an adapter already; take it out of targets or of train")
        if names:
            # peft would tell us that the module has adapters already, which is what we want.
            module.__dict__.pop("peft_config", None)
            options = LoraConfig(r=config.rank, lora_alpha=config.scale * config.rank, target_modules=names)  # pyright: ignore[reportArgumentType]  # peft's stubs
            inject_adapter_in_model(options, module, role)
            module.__dict__.pop("peft_config", None)
        for name in own:
            _wrap(module, name, self.active).add(role)
        tree = nn.Module()
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                layer._active_adapter = self.active
                if role in layer.lora_A:
                    _graft(tree, f"{name}.lora_A", layer.lora_A[role])
                    _graft(tree, f"{name}.lora_B", layer.lora_B[role])
            elif isinstance(layer, _Switched) and role in layer.own:
                _graft(tree, name, layer.own[role])
        self.adapters[role] = tree
        network = self.network if config.causal is None else Causal.of(self.network, config.causal)
        return Shared(self, role, tree, network)

    def itself(self) -> Shared:
        """The network with no adapter: the teacher."""
        return Shared(self, None, self.network.module, self.network)

    @contextmanager
    def speaking(self, *roles: str) -> Iterator[None]:
        """Within, the network answers as this role; as itself, with none."""
        before = self.active[:]
        self.active[:] = roles
        try:
            yield
        finally:
            self.active[:] = before

    def remember(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a checkpointed block: what to enter for its forward, and for the recomputation of that forward."""
        return nullcontext(), self.speaking(*self.active)


@dataclass(frozen=True)
class Shared(Wrapper):
    """One role of a backbone; with role None the network itself, which the adapters do not touch."""

    backbone: Backbone
    role: str | None
    module: nn.Module  # the adapters and what else is this role's own, named as in the network; all of it, with role None
    network: Network  # that of the backbone, as this role calls it: causal or not

    def inside(self) -> Network:
        return self.network

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        with self.backbone.speaking(*([] if self.role is None else [self.role])):
            return self.network(x_t, t, cond, taps=taps, cache=cache)


class _Switched(nn.Module):
    """A layer of which some roles have a copy of their own."""

    def __init__(self, original: nn.Module, active: list[str]):
        super().__init__()
        self.original, self.own, self.active = original, nn.ModuleDict(), active

    def add(self, role: str) -> None:
        import copy

        self.own[role] = copy.deepcopy(self.original)

    @property
    def speaking(self) -> nn.Module:
        return self.own[self.active[0]] if self.active and self.active[0] in self.own else self.original

    @property
    def weight(self) -> Any:  # Any: whatever the layer calls its weight; networks look at its dtype
        return self.speaking.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.speaking(*args, **kwargs)


# --- which layers -----------------------------------------------------------------------------------------------------


def target_names(network: Network, targets: Sequence[str] | None, key: str) -> list[str]:
    """The Linear layers that get an adapter, in the order of the network."""
    module = network.module
    linear = [name for name, layer in module.named_modules() if _is_linear(layer)]
    if targets is None:
        targets = network.traits.lora_targets
    if targets is not None:
        found = _matching(module, targets, key) if targets else []
        wrong = [name for name in found if name not in linear]
        if wrong:
            raise UserError(f"{key}: {wrong[0]} is no Linear layer: adapters are for those; put it into train instead")
        return found
    inside = {id(layer) for block in network.blocks for layer in block.modules()}
    found = [name for name in linear if id(module.get_submodule(name)) in inside]
    if not found:
        raise UserError(
            f"{key}: this network has no Linear layer in its blocks, so there is nothing to adapt. An analytic teacher has no "
            "weights at all: give the role a network of its own (full)"
        )
    return found


def _is_linear(layer: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(layer.base_layer if isinstance(layer, LoraLayer) else layer, nn.Linear)


def _matching(module: nn.Module, endings: Sequence[str], key: str) -> list[str]:
    """Names of layers equal to one of `endings` or ending in it; adapters that lie there already are no layers."""
    names = [n for n, _ in module.named_modules() if n and not re.search(r"\.(base_layer|lora_\w+|original|own)(\.|$)", n)]
    found: list[str] = []
    for ending in endings:
        some = [name for name in names if name == ending or name.endswith("." + ending)]
        if not some:
            import difflib

            last = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            near = difflib.get_close_matches(ending.rsplit(".", 1)[-1], last, 3, 0.4) or last[:8]
            raise UserError(f"{key}: no layer of this network is called '{ending}' or ends in it; there are {', '.join(near)}")
        found += [name for name in some if name not in found]
    return [name for name in names if name in set(found)]


def _below(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".")


def _wrap(module: nn.Module, name: str, active: list[str]) -> _Switched:
    layer = module.get_submodule(name)
    if isinstance(layer, _Switched):
        return layer
    switched = _Switched(layer, active)
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, switched)
    return switched


def _graft(tree: nn.Module, name: str, leaf: nn.Module) -> None:
    """Puts the very module `leaf` at `name`: FSDP exchanges the parameters inside it, and both trees must see that."""
    *path, last = name.split(".")
    for part in path:
        child = tree._modules.get(part)
        if child is None:
            child = nn.Module()
            tree.add_module(part, child)
        tree = child
    tree.add_module(last, leaf)


# --- adapters as tensors ----------------------------------------------------------------------------------------------

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Extracted:
    """Adapters that stand for the difference of two sets of weights, and what they leave out."""

    adapters: dict[str, Tensor]  # at scale 1
    error: dict[str, float]  # of each layer: Frobenius norm of what the rank was too small for
    share: float  # of the whole difference of all targets, by norm, that was left out
    left_out: tuple[str, ...]  # tensors that differ and are no weights of targets


def extract(base: Mapping[str, Tensor], full: Mapping[str, Tensor], targets: Iterable[str], rank: int) -> Extracted:
    """The adapters of `rank` nearest to full - base: the singular value decomposition (Eckart and Young 1936).

    With rank at least that of the difference they are exact; otherwise the error of a layer is the norm of its smaller
    singular values. Both factors get the root of the singular values, so that they learn at one pace when trained on.
    """
    if base.keys() != full.keys():
        odd = sorted(base.keys() ^ full.keys())
        raise UserError(
            f"a LoRA is extracted from weights of the same network; these differ in {odd[0]} and {len(odd) - 1} more"
        )
    adapters: dict[str, Tensor] = {}
    error: dict[str, float] = {}
    left, whole = 0.0, 0.0
    weights = {f"{name}.weight": name for name in targets}
    for weight, name in weights.items():
        difference = full[weight].double() - base[weight].double()
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        keep = min(rank, len(s))
        root = s[:keep].sqrt()
        down, up = difference.new_zeros(rank, difference.shape[1]), difference.new_zeros(difference.shape[0], rank)
        down[:keep], up[:, :keep] = root[:, None] * v[:keep], u[:, :keep] * root
        adapters[name + DOWN], adapters[name + UP] = down.float(), up.float()
        error[name] = float(s[keep:].norm())
        left, whole = left + error[name] ** 2, whole + float(s.norm()) ** 2
    others = tuple(name for name in base if name not in weights and not torch.equal(full[name], base[name]))
    return Extracted(adapters, error, (left / whole) ** 0.5 if whole else 0.0, others)


def as_adapters(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], module: nn.Module, config: Lora, source: str
) -> dict[str, Tensor]:
    """`weights` as they are where they are adapters; extracted from them where they are those of a whole network."""
    if any(name.endswith(DOWN) for name in weights) or weights.keys() != base.keys():
        return dict(weights)  # loading is strict, and says what does not fit
    own = module.state_dict()
    found = extract(base, weights, adapted_layers(own), config.rank)
    adapters = {name: tensor / config.scale if name.endswith(UP) else tensor for name, tensor in found.adapters.items()}
    lost = [name for name in found.left_out if name not in own]
    if lost:
        warnings.warn(
            f"{source}: {len(lost)} tensors differ from the teacher's and are no weights of adapted layers ({lost[0]}, ...); "
            "they are taken from the teacher. Name their layers in `train` to keep them",
            stacklevel=2,
        )
    return adapters | {name: weights[name] for name in own if name in weights}


def adapted_layers(adapters: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that `adapters` adapt."""
    return [name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)]


def own_layers(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors among `adapters` that replace one of the network instead of adding to it."""
    return {name: tensor for name, tensor in adapters.items() if not name.endswith((DOWN, UP))}


def merged(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """The weights of a plain network that answers as the role does, in the types of `base`; summed in float32 or better."""
    out = dict(base)
    for name in adapted_layers(adapters):
        if f"{name}.weight" not in base:
            raise UserError(f"the adapters are for another network: it has no layer '{name}'")
        weight = base[f"{name}.weight"]
        exact = torch.promote_types(weight.dtype, torch.float32)
        low_rank = adapters[name + UP].to(exact) @ adapters[name + DOWN].to(exact)
        out[f"{name}.weight"] = (weight.to(exact) + scale * low_rank).to(weight.dtype)
    for name, tensor in own_layers(adapters).items():
        if name not in base:
            raise UserError(f"the adapters are for another network: it has no tensor '{name}'")
        out[name] = tensor.to(base[name].dtype)
    return out


def as_diffusers(adapters: Mapping[str, Tensor], scale: float = 1.0, prefix: str = "transformer") -> dict[str, Tensor]:
    """What diffusers' load_lora_weights and load_lora_adapter read; with prefix "base_model.model", peft.

    The scale is multiplied into B: then every reader gets it right, whether it knows of an alpha or not.
    """
    _refuse_own(adapters, "a diffusers or peft LoRA file")
    dot = f"{prefix}." if prefix else ""
    return {dot + name: (scale * t if name.endswith(UP) else t).contiguous() for name, t in adapters.items()}


def as_kohya(adapters: Mapping[str, Tensor], scale: float = 1.0, prefix: str = "lora_unet") -> dict[str, Tensor]:
    """The same in kohya's names, which ComfyUI and others read: dots become underscores, alpha is a tensor of its own."""
    _refuse_own(adapters, "a kohya LoRA file")
    out: dict[str, Tensor] = {}
    for name in adapted_layers(adapters):
        flat = f"{prefix}_{name.replace('.', '_')}"
        down, up = adapters[name + DOWN], adapters[name + UP]
        out[f"{flat}.lora_down.weight"], out[f"{flat}.lora_up.weight"] = down.contiguous(), up.contiguous()
        out[f"{flat}.alpha"] = torch.tensor(scale * down.shape[0], dtype=torch.float32)
    return out


def _refuse_own(adapters: Mapping[str, Tensor], where: str) -> None:
    own = list(own_layers(adapters))
    if own:
        raise UserError(
            f"{where} holds low-rank adapters only, and this role trained {len(own)} tensors in full besides ({own[0]}, ...): "
            "export it merged"
        )
