"""Roles that share one backbone: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) over one frozen network.

    W' = W + scale B A,      B (out, rank), A (rank, in)

peft writes the scale as alpha / rank; Cosmos-Predict1 writes it as here.

Student and critic are adapters over the teacher's weights, so that one network is in memory where there were three. Which
adapter speaks is switched inside the role's call. A block that is recomputed in backward is recomputed when another role may
have spoken since: `Backbone.remember` gives the recomputation the role that its forward had.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Prediction
from fewstep.errors import UserError
from fewstep.networks.causal import Causal
from fewstep.networks.causal_attention import Causality
from fewstep.networks.contract import Network, Wrapper
from fewstep.networks.grid import Grid


@kind("lora", group="role")
@dataclass(frozen=True)
class Lora:
    """Adapters over the teacher's frozen weights, which stay in memory once."""

    rank: int = 32
    scale: float = 1.0  # factor of B A; alpha / rank of peft, `scale` of Cosmos-Predict1
    # Endings of names of Linear layers: NAME, NAME:RANK or NAME:RANK:SCALE. None: the network's choice, else all in blocks
    targets: tuple[str, ...] | None = None
    first_nblocks: int | None = None  # adapters in the first blocks only, this number of them; None: in all
    down: Literal["uniform", "normal"] = "uniform"  # how A begins: peft's default, or N(0, 1 / rank^2) as Cosmos-Predict1
    train: tuple[str, ...] = ()  # endings of names of other layers, trained in full beside the adapters (norms, embeddings)
    init: str = "teacher"  # "teacher": begins as the teacher; or the address of adapters, or of a full student to extract them
    causal: Causality | None = None  # chunk-wise causal attention for this role alone; none: as the teacher is
    rounding: Grid | None = None  # none, always: for students with weights of their own (full)

    @property
    def network(self) -> None:
        """None: the network is the teacher's, always."""
        return

    def rank_of(self, layer: str) -> int:
        """The rank of the adapter of the layer with this name."""
        target = self._target_of(layer)
        return self.rank if target is None or target.rank is None else target.rank

    def scale_of(self, layer: str) -> float:
        """The scale of the adapter of the layer with this name."""
        target = self._target_of(layer)
        return self.scale if target is None or target.scale is None else target.scale

    def _target_of(self, layer: str) -> Target | None:
        """The most exact of `targets` that names the layer."""
        fitting = [target for target in map(Target.of, self.targets or ()) if _ends_in(layer, target.ending)]
        return max(fitting, key=lambda target: len(target.ending), default=None)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.rank < 1:
            yield "rank", f"must be at least 1, not {self.rank}"
        if self.scale <= 0:
            yield "scale", f"must be above 0, not {self.scale}"
        if self.first_nblocks is not None and self.first_nblocks < 1:
            yield "first_nblocks", f"must be at least 1, or none for all blocks, not {self.first_nblocks}"
        for text in self.targets or ():
            if Target.of(text).is_wrong:
                yield (
                    "targets",
                    f"'{text}' is none of NAME, NAME:RANK and NAME:RANK:SCALE with a rank of at least 1 and a scale above 0",
                )
        if self.targets is not None and not self.targets and not self.train:
            yield "targets", "is empty and so is train: not one weight of this role would be trained"
        if self.rounding is not None:
            yield "rounding", "is for a student with weights of its own (full): those of adapters are sums with the teacher's"
        if self.init == "random":
            yield "init", "cannot be random for adapters: they lie over the teacher's weights. teacher, or a weights address"


@dataclass(frozen=True)
class Target:
    """One entry of `targets`: to_q, to_q:8 or to_q:8:0.6."""

    ending: str
    rank: int | None = None  # None: that of the role
    scale: float | None = None
    is_wrong: bool = False

    @classmethod
    def of(cls, text: str) -> Target:
        ending, *numbers = text.split(":")
        try:
            rank = int(numbers[0]) if numbers else None
            scale = float(numbers[1]) if len(numbers) > 1 else None
        except ValueError:
            return cls(ending, is_wrong=True)
        is_wrong = not ending or len(numbers) > 2 or (rank is not None and rank < 1) or (scale is not None and not scale > 0)
        return cls(ending, rank, scale, is_wrong)


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
        names = target_names(self.network, config, f"networks.{role}")
        own = _matching(module, config.train, f"networks.{role}.train") if config.train else []
        clash = [name for name in own if any(_below(name, target) or _below(target, name) for target in names)]
        if clash:
            raise UserError(f"networks.{role}.train: {clash[0]} has an adapter already; take it out of targets or of train")
        groups: dict[tuple[int, float], list[str]] = {}
        for name in names:
            groups.setdefault((config.rank_of(name), config.scale_of(name)), []).append(name)
        for (rank, scale), layers in groups.items():
            # peft would tell us that the module has adapters already, which is what we want.
            module.__dict__.pop("peft_config", None)
            down: Any = "gaussian" if config.down == "normal" else True
            options = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=layers, init_lora_weights=down)  # pyright: ignore[reportArgumentType]  # peft's stubs
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
    own: nn.Module  # the adapters and what else is this role's own, named as in the network; all of it, with role None
    inner: Network  # that of the backbone, as this role calls it: causal or not

    @property
    def module(self) -> nn.Module:
        return self.own

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        with self.backbone.speaking(*([] if self.role is None else [self.role])):
            return self.inner(x_t, t, cond, taps=taps, cache=cache)


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


def target_names(network: Network, config: Lora, key: str) -> list[str]:
    """The Linear layers that get an adapter, in the order of the network. `key` is the role's, for messages."""
    module = network.module
    blocks = _first_blocks(network, config, key)
    inside = {id(layer) for block in blocks for layer in block.modules()}
    linear = {name: layer for name, layer in module.named_modules() if _is_linear(layer)}
    targets = network.traits.lora_targets if config.targets is None else [Target.of(text).ending for text in config.targets]
    if targets is None:
        names = [name for name, layer in linear.items() if id(layer) in inside]
        if not names:
            raise UserError(
                f"{key}.targets: this network has no Linear layer in its blocks, so there is nothing to adapt. An analytic "
                "teacher has no weights at all: give the role a network of its own (full)"
            )
        return names
    names = _matching(module, targets, f"{key}.targets") if targets else []
    wrong = [name for name in names if name not in linear]
    if wrong:
        raise UserError(f"{key}.targets: {wrong[0]} is no Linear layer: adapters are for those; put it into train instead")
    if config.first_nblocks is None:
        return names
    names_inside = [name for name in names if id(linear[name]) in inside]
    if names and not names_inside:
        raise UserError(f"{key}.first_nblocks: not one of the targets lies in the first {config.first_nblocks} blocks")
    return names_inside


def _first_blocks(network: Network, config: Lora, key: str) -> Sequence[nn.Module]:
    num = config.first_nblocks
    if num is not None and num > len(network.blocks):
        raise UserError(f"{key}.first_nblocks: is {num}, but this network has {len(network.blocks)} blocks")
    return network.blocks[:num]


def _is_linear(layer: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(layer.base_layer if isinstance(layer, LoraLayer) else layer, nn.Linear)


def _matching(module: nn.Module, endings: Sequence[str], key: str) -> list[str]:
    """Names of layers equal to one of `endings` or ending in it; adapters that lie there already are no layers."""
    names = [n for n, _ in module.named_modules() if n and not re.search(r"\.(base_layer|lora_\w+|original|own)(\.|$)", n)]
    matches: list[str] = []
    for ending in endings:
        some = [name for name in names if _ends_in(name, ending)]
        if not some:
            import difflib

            last = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            near = difflib.get_close_matches(ending.rsplit(".", 1)[-1], last, 3, 0.4) or last[:8]
            raise UserError(f"{key}: no layer of this network is called '{ending}' or ends in it; there are {', '.join(near)}")
        matches += [name for name in some if name not in matches]
    return [name for name in names if name in set(matches)]


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


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


Of = Callable[[str], float]  # of a layer, by its name


def extract(
    base: Mapping[str, Tensor], full: Mapping[str, Tensor], targets: Iterable[str], rank: int | Callable[[str], int]
) -> Extracted:
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
    rest, whole = 0.0, 0.0
    weights = {f"{name}.weight": name for name in targets}
    for weight, name in weights.items():
        difference = full[weight].double() - base[weight].double()
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        width = rank if isinstance(rank, int) else rank(name)
        keep = min(width, len(s))
        root = s[:keep].sqrt()
        down, up = difference.new_zeros(width, difference.shape[1]), difference.new_zeros(difference.shape[0], width)
        down[:keep], up[:, :keep] = root[:, None] * v[:keep], u[:, :keep] * root
        adapters[name + DOWN], adapters[name + UP] = down.float(), up.float()
        error[name] = float(s[keep:].norm())
        rest, whole = rest + error[name] ** 2, whole + float(s.norm()) ** 2
    others = tuple(name for name in base if name not in weights and not torch.equal(full[name], base[name]))
    return Extracted(adapters, error, (rest / whole) ** 0.5 if whole else 0.0, others)


def as_adapters(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], module: nn.Module, config: Lora, source: str
) -> dict[str, Tensor]:
    """`weights` as they are where they are adapters; extracted from them where they are those of a whole network."""
    if any(name.endswith(DOWN) for name in weights) or weights.keys() != base.keys():
        return dict(weights)  # loading is strict, and says what does not fit
    own = module.state_dict()
    extraction = extract(base, weights, adapted_layers(own), config.rank_of)
    adapters = dict(extraction.adapters)
    for layer in adapted_layers(own):
        adapters[layer + UP] = adapters[layer + UP] / config.scale_of(layer)
    extra = [name for name in extraction.left_out if name not in own]
    if extra:
        warnings.warn(
            f"{source}: {len(extra)} tensors differ from the teacher's and are no weights of adapted layers ({extra[0]}, ...); "
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


def merged(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float | Of = 1.0) -> dict[str, Tensor]:
    """The weights of a plain network that answers as the role does, in the types of `base`; summed in float32 or better."""
    out = dict(base)
    for name in adapted_layers(adapters):
        if f"{name}.weight" not in base:
            raise UserError(f"the adapters are for another network: it has no layer '{name}'")
        weight = base[f"{name}.weight"]
        exact = torch.promote_types(weight.dtype, torch.float32)
        low_rank = adapters[name + UP].to(exact) @ adapters[name + DOWN].to(exact)
        out[f"{name}.weight"] = (weight.to(exact) + (scale(name) if callable(scale) else scale) * low_rank).to(weight.dtype)
    for name, tensor in own_layers(adapters).items():
        if name not in base:
            raise UserError(f"the adapters are for another network: it has no tensor '{name}'")
        out[name] = tensor.to(base[name].dtype)
    return out


def at_scale_one(adapters: Mapping[str, Tensor], scale: Of) -> dict[str, Tensor]:
    """The same adapters with the scale of each multiplied into B."""
    return {n: scale(n.removesuffix(UP)) * tensor if n.endswith(UP) else tensor for n, tensor in adapters.items()}


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
