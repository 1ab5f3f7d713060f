"""Cosmos-Transfer: a Cosmos transformer conditioned on control videos, one branch of blocks for each.

    Transfer2.5   branch blocks feed base blocks 0, n, 2n, ..; the real diffusers class, `CosmosControlNetModel`
    Transfer1     a copy of the first three blocks feeds the first three; not in diffusers (transfer1.py)

The control video is encoded like the video itself, and its latents travel in cond.control[NAME], in the units of x0. The
branches of the controls in cond.control run, and no others: one network can be trained on batches of one control each. What
several branches put out is added, each times its weight; weights that sum to more than 1 are scaled down to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fewstep.config import kind
from fewstep.networks.families.cosmos.keys import SHARED
from fewstep.networks.families.cosmos.network import Cosmos, CosmosSpec, framed, supply_resize
from fewstep.networks.families.cosmos.predict import PREDICT
from fewstep.networks.families.cosmos.transfer1 import Transfer1Branch
from fewstep.networks.files.folders import from_folder
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.untrusted.text import read_json


class Controlled(nn.Module):
    """A base and its branches as one module, called as the base is, with `controls` besides."""

    def __init__(self, base: Any, branches: Mapping[str, nn.Module], weights: Mapping[str, float], freezes_base: bool):
        super().__init__()
        self.base, self.branches = base, nn.ModuleDict(branches)
        self.weights = dict(weights)
        self.freezes_base = freezes_base
        self.requires_grad_(True)

    @property
    def patch_embed(self) -> nn.Module:
        return self.base.patch_embed

    def requires_grad_(self, requires_grad: bool = True) -> Controlled:
        """As for any module; but where the base stays frozen, training means its branches."""
        super().requires_grad_(requires_grad)
        if self.freezes_base:
            self.base.requires_grad_(False)
            for branch in self.branches.values():
                for name in () if isinstance(branch, Transfer1Branch) else SHARED.values():
                    part = getattr(branch, name)
                    if part is not None:
                        part.requires_grad_(False)
        return self

    def forward(
        self,
        controls: Mapping[str, Tensor],
        control_weights: Mapping[str, float] | None = None,
        return_dict: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor]:
        """The base's output, its blocks corrected by the branches' outputs for `controls` (by name, B C T H W)."""
        config = self.base.config
        weights = {name: (self.weights if control_weights is None else control_weights)[name] for name in controls}
        total = max(1.0, sum(weights.values()))
        residuals: list[Tensor | None] = [None] * len(range(0, config.num_layers, config.controlnet_block_every_n))
        shared = {name: value for name, value in inputs.items() if name != "hidden_states"}
        for name, weight in weights.items():
            corrections = self.branches[name](
                controls_latents=controls[name].to(inputs["hidden_states"].dtype),
                latents=inputs["hidden_states"],
                conditioning_scale=weight / total,
                return_dict=False,
                **shared,
            )[0]
            for i, residual in enumerate(corrections):
                before = residuals[i]
                residuals[i] = residual if before is None else before + residual
        return self.base(block_controlnet_hidden_states=residuals, return_dict=False, **inputs)


@kind("cosmos_control", group="network")
@dataclass(frozen=True)
class CosmosControlSpec(CosmosSpec):
    """A CosmosTransformer3DModel with control branches; `pretrained` is the base's."""

    diffusers_class: ClassVar[str] = "CosmosTransformer3DModel"  # with branches beside it or not
    in_force: ClassVar[tuple[str, ...]] = (
        *CosmosSpec.in_force, "style", "controls", "weights", "branches", "train", "num_layers", "num_control_blocks",
        "hint_channels",
    )  # fmt: skip

    style: Literal["transfer2_5", "transfer1"] = "transfer2_5"
    controls: tuple[str, ...] = ("edge",)  # one branch each: names in cond.control
    weights: tuple[float, ...] | None = None  # of the branches; None: 1 each. Scaled down where those that run sum to over 1
    branches: tuple[str, ...] | None = None  # diffusers folders or hub ids, one per control; None: fresh ones
    num_control_blocks: int = 4  # of each branch; Transfer1 3
    hint_channels: int = 128  # of a branch's input: eight controls of 16 channels could be stacked; the rest stays 0
    train: Literal["all", "control"] = "all"  # distillation trains all; a control is taught to a frozen base

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.end_gate is not None:
            yield "end_gate", "is not there for a network with control branches: leave it out"
        if not self.controls:
            yield "controls", "is empty; a network without controls is the kind 'cosmos'"
        if len(set(self.controls)) < len(self.controls):
            yield "controls", "names a control twice"
        for name, values in (("weights", self.weights), ("branches", self.branches)):
            if values is not None and len(values) != len(self.controls):
                yield name, f"has {len(values)} entries for {len(self.controls)} controls"
        if self.branches is not None and self.style == "transfer1":
            yield "branches", "diffusers has no Transfer1 branch to read; give the weights as teacher_init or init"
        if self.hint_channels < self.latent_channels:
            yield "hint_channels", f"must hold one control of {self.latent_channels} channels"
        if self.style == "transfer2_5" and len(range(0, self.num_layers, self._every())) != self.num_control_blocks:
            yield "num_control_blocks", f"{self.num_control_blocks} blocks cannot be spread evenly over {self.num_layers}"
        if self.style == "transfer1" and self.num_control_blocks > self.num_layers:
            yield "num_control_blocks", f"is more than the base has ({self.num_layers})"

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> CosmosSpec:
        """The network with the control branches beside it, or without where there are none."""
        config, pipeline, address = folder.denoiser, folder.pipeline, folder.address
        if _is_first(folder):
            return CosmosSpec(pretrained=address, clean_time=None, frame_noise=0.001, **cls.facts(folder))
        branches = _branches(folder, controls)
        if branches:
            branch = read_json(next(iter(branches.values())) / "config.json", "Copy that folder again", _Branch)
            return cls(
                pretrained=address,
                latent_channels=config["out_channels"],
                num_layers=config["num_layers"],
                num_control_blocks=branch.n_controlnet_blocks,
                hint_channels=branch.in_channels - 2,  # beside the masks of given frames and of padding
                controls=tuple(branches),
                branches=tuple(map(str, branches.values())),
            )
        published = None if pipeline else _published(config)
        if published is not None:
            return replace(published, pretrained=address)
        return CosmosSpec(pretrained=address, **cls.facts(folder))

    @classmethod
    def facts(cls, folder: PipelineFolder) -> Mapping[str, Any]:
        if _is_first(folder):
            return {"family": "edm", "sigma_data": 0.5, "use_fps": True}
        if folder.pipeline:
            return {"family": "flow", "use_fps": folder.pipeline == "Cosmos2VideoToWorldPipeline"}
        published = _published(folder.denoiser)
        return {} if published is None else {"family": published.family, "use_fps": published.use_fps}

    @property
    def control_branches(self) -> tuple[str, ...]:
        return self.controls

    def in_folder(self, folder: str) -> CosmosControlSpec:
        return replace(self, pretrained=folder, branches=(folder,))

    def export_format(self) -> tuple[str, str]:
        num = len(self.controls)
        if self.style == "transfer1":
            why = "diffusers has no class for the control branch of Cosmos-Transfer1, and so no pipeline for this student"
            return ("pt-original" if num == 1 else "safetensors"), why
        if num > 1:
            return "pt-original", f"diffusers' pipeline of Transfer2.5 has one control branch, and this network has {num}"
        return "diffusers", ""

    def by_part(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        branches = {name.split(".")[1] for name in tensors if name.startswith("branches.")}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, inside = name.partition(".")
            part = "transformer"
            if first == "branches":
                branch, _, inside = inside.partition(".")
                part = "controlnet" if len(branches) == 1 else f"controlnet_{branch}"
            parts.setdefault(part, {})[inside] = tensor
        return parts

    def build(self) -> Cosmos:
        base: Any = self.transformer(controlnet_block_every_n=self._every())
        branches = {name: self._branch(base, i) for i, name in enumerate(self.controls)}
        weights = dict(zip(self.controls, self.weights or [1.0] * len(self.controls)))
        module = Controlled(base, branches, weights, freezes_base=self.train == "control")
        options: dict[str, Any] = {"controls": self.controls, "frame_noise": self.frame_noise}
        return Cosmos(framed(module), self.family, self.sigma_data, self.use_fps, self.clean_time, **options)

    def _every(self) -> int:
        """Every how many blocks of the base one is corrected."""
        return 1 if self.style == "transfer1" else -(-self.num_layers // self.num_control_blocks)

    def _branch(self, base: Any, number: int) -> nn.Module:
        if self.style == "transfer1":
            return Transfer1Branch(base, self.num_control_blocks, self.hint_channels)
        from diffusers import CosmosControlNetModel

        supply_resize()
        if self.branches is not None:
            return _tied(from_folder(CosmosControlNetModel, self.branches[number], "controlnet"), base)
        config = base.config
        branch = CosmosControlNetModel(
            n_controlnet_blocks=self.num_control_blocks,
            in_channels=self.hint_channels + 2,  # + the mask of given frames + that of padding, which is always there
            latent_channels=config.in_channels + 1,
            model_channels=config.num_attention_heads * config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            mlp_ratio=config.mlp_ratio,
            text_embed_dim=config.text_embed_dim,
            adaln_lora_dim=config.adaln_lora_dim,
            patch_size=config.patch_size,
            max_size=config.max_size,
            rope_scale=config.rope_scale,
            extra_pos_embed_type=config.extra_pos_embed_type,
            img_context_dim_in=config.img_context_dim_in,
            img_context_dim_out=config.img_context_dim_out,
            use_crossattn_projection=config.use_crossattn_projection,
            crossattn_proj_in_channels=config.crossattn_proj_in_channels,
            encoder_hidden_states_channels=config.encoder_hidden_states_channels,
        )
        return _fresh(branch, base)


@dataclass(frozen=True)
class _Branch:
    """What is read of the config.json of a control branch."""

    n_controlnet_blocks: int
    in_channels: int


def _branches(folder: PipelineFolder, controls: Sequence[str]) -> dict[str, Path]:
    """The control branches beside a transformer, by name: controlnet_NAME, or controlnet for the one that the user names.

    Where the folder's index names other parts only, the pipeline is whole without them: only those in `controls` come along.
    """
    place = folder.path
    branches = {path.name.removeprefix("controlnet_"): path for path in sorted(place.glob("controlnet_*")) if path.is_dir()}
    if not branches and (place / "controlnet").is_dir():
        branches = {controls[0] if controls else "control": place / "controlnet"}
    if not folder.index or any(part.startswith("controlnet") for part in folder.index):
        return branches
    return {name: path for name, path in branches.items() if name in controls}


def _is_first(folder: PipelineFolder) -> bool:
    """Whether it is a network of Cosmos 1."""
    is_first = folder.pipeline in ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
    return is_first or folder.denoiser.get("extra_pos_embed_type") == "learnable"


def _published(config: Mapping[str, Any]) -> CosmosSpec | None:
    """The published network of the dimensions in this config.json, beside which no pipeline says how the network is called."""

    def facts(spec: CosmosSpec) -> tuple[Any, ...]:
        projects = spec.text_projection_from is not None
        return spec.num_heads, spec.num_layers, list(spec.rope_scale), spec.frame_mask, projects

    has_mask = config.get("in_channels", 0) > config.get("out_channels", 0)
    sizes = (config.get(name) for name in ("num_attention_heads", "num_layers", "rope_scale"))
    target = (*sizes, has_mask, bool(config.get("use_crossattn_projection")))
    return next((spec for spec in PREDICT.values() if facts(spec) == target), None)


def _fresh(branch: Any, base: Any) -> nn.Module:
    """The branch as a copy of the blocks it feeds, with projections of 0: at first it changes nothing.

    diffusers leaves the projections random, which would be noise of the size of the signal.
    """
    for own, other in SHARED.items():
        part, copy = getattr(base, own, None), getattr(branch, other, None)
        if part is not None and copy is not None:
            weights = part.state_dict()
            if own == "patch_embed" and not base.config.concat_padding_mask:
                weights = _with_padding_channel(weights, copy)
            copy.load_state_dict(weights)
    _tied(branch, base)
    for i, block in enumerate(branch.control_blocks):
        block.load_state_dict(base.transformer_blocks[i * base.config.controlnet_block_every_n].state_dict(), strict=False)
        for projection in (block.before_proj, block.after_proj):
            if projection is not None:
                nn.init.zeros_(projection.weight)
                nn.init.zeros_(projection.bias)
    return branch


def _tied(branch: Any, base: Any) -> nn.Module:
    """The branch with the very modules of its base in the place of those it repeats, wherever the two are equal.

    Originally they are one, and training must not take them apart. What was trained apart elsewhere stays two.
    """
    for own, other in SHARED.items():
        part, copy = getattr(base, own, None), getattr(branch, other, None)
        if part is not None and copy is not None and _are_equal(part.state_dict(), copy.state_dict()):
            setattr(branch, other, part)
    return branch


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        return False
    # Tensors without contents, on which sizes are counted and memory is planned, stand for equal ones.
    return all(t.is_meta or isinstance(t, FakeTensor) or torch.equal(t, other[name]) for name, t in one.items())


def _with_padding_channel(weights: Mapping[str, Tensor], embed: Any) -> dict[str, Tensor]:
    """The patch embedding with one more channel, weighted 0: the branch has a padding channel even where its base has none."""
    weight = weights["proj.weight"]
    missing = embed.proj.weight.shape[1] - weight.shape[1]
    return {"proj.weight": nn.functional.pad(weight, (0, missing))}  # the channel is the outer part of a patch's entries
