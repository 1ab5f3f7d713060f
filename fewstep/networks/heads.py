"""Discriminator heads: logits from what a network's blocks put out.

A head says which blocks it reads (`taps`) and how wide their outputs are (`channels`); it works on the features of any network:
B C T H W of videos, B C H W of images, B C of points, and B N C of plain tokens where the head needs no grid. Each has one
logit or more for a sample; losses take their mean. All norms are per sample (group, layer, RMS), so that a batch of one works.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.config import OneOf, kind
from fewstep.diffusion.path import working_dtype
from fewstep.errors import UserError


@dataclass(frozen=True)
class Head:
    """A trained discriminator; `module` is what is sharded, optimised and saved."""

    module: nn.Module
    taps: tuple[int, ...]
    channels: int
    blocks: Sequence[nn.Module] = field(default=())

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        if len(features) != len(self.taps):
            raise UserError(f"this head reads {len(self.taps)} blocks (networks.head.taps), but was given {len(features)}")
        for feature in features:
            width = feature.shape[-1 if feature.ndim == 3 else 1]
            if width != self.channels:
                raise UserError(
                    f"networks.head.channels is {self.channels}, but the features of the blocks it reads have {width} channels "
                    f"(shape {tuple(feature.shape)}): set networks.head.channels={width}"
                )
        return self.module(list(features)).to(working_dtype(features[0]))


class HeadSpec(Protocol):
    """A frozen dataclass registered with @kind(NAME, group="head")."""

    def build(self) -> Head:
        """The head with random weights; the same for the same global seed."""
        ...


AnyHead = Annotated[HeadSpec, OneOf("head")]  # a field that holds the configuration of one head


@dataclass(frozen=True)
class _Spec:
    """Settings of every head."""

    taps: tuple[int, ...] = (14,)  # numbers of the blocks read, from 0. Transfer1: the middle one, 14 of 28
    channels: int = 4096  # of their outputs: the network's width. Cosmos 7B 4096, 2B 2048
    hidden: int = 320  # Transfer1
    first_frame: int = 0  # latent frames before it are not looked at: for frames that are given

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.taps or min(self.taps) < 0:
            yield "taps", f"must name one block or more, from 0, but is {list(self.taps)}"
        if self.first_frame < 0:
            yield "first_frame", f"must not be negative, but is {self.first_frame}"

    def _per_block(self, make: type[nn.Module], *sizes: object) -> Head:
        return Head(_PerBlock([make(self.channels, *sizes) for _ in self.taps], self.first_frame), self.taps, self.channels)


@kind("conv3d", group="head")
@dataclass(frozen=True)
class Conv3dSpec(_Spec):
    """Transfer1's conv3d_pool: a strided 3-D convolution, norm, 1x1x1 convolution, mean over what is left."""

    kernel: tuple[int, int, int] = (2, 4, 4)  # stride 2; (1, 4, 4) for latents of one frame

    def build(self) -> Head:
        return self._per_block(_Conv3d, self.hidden, self.kernel)


@kind("conv2d", group="head")
@dataclass(frozen=True)
class Conv2dSpec(_Spec):
    """The same, frame by frame: for images, and for videos whose motion is not to be judged."""

    def build(self) -> Head:
        return self._per_block(_Conv2d, self.hidden)


@kind("attention", group="head")
@dataclass(frozen=True)
class AttentionSpec(_Spec):
    """Self-attention over all tokens, norm, mean, one linear layer."""

    num_heads: int = 4  # Transfer1

    def build(self) -> Head:
        return self._per_block(_Attention, self.hidden, self.num_heads)


@kind("spatio_temporal", group="head")
@dataclass(frozen=True)
class SpatioTemporalSpec(_Spec):
    """Two logits a block: convolutions over space, frame by frame, and over time, place by place."""

    def build(self) -> Head:
        return self._per_block(_SpatioTemporal, self.hidden)


@kind("multiscale", group="head")
@dataclass(frozen=True)
class MultiscaleSpec(_Spec):
    """An MLP on means over cells of several sizes, one logit for each block and size; points have one size."""

    taps: tuple[int, ...] = (14, 20, 27)  # FastGen's video recipes: 50, 73 and 97 % of the depth, of 28 blocks
    scales: tuple[int, ...] = (1, 2, 4)  # cells along height and width; time is cut in two but for the first

    def build(self) -> Head:
        return self._per_block(_Multiscale, self.hidden, self.scales)


@kind("query", group="head")
@dataclass(frozen=True)
class QuerySpec(_Spec):
    """Predict2.5's: for each block a learnt query looks at the tokens; the answers together give one logit."""

    taps: tuple[int, ...] = (11, 19, 27)  # Predict2.5 2B
    channels: int = 2048
    num_heads: int = 4

    def build(self) -> Head:
        return Head(_Query(self), self.taps, self.channels)


# --- modules ----------------------------------------------------------------------------------------------------------


def _tokens(feature: Tensor) -> Tensor:
    """B N C, of any layout; a point is one token."""
    if feature.ndim == 3:
        return feature
    return feature[:, None] if feature.ndim == 2 else feature.flatten(2).transpose(1, 2)


def _video(feature: Tensor, head: str) -> Tensor:
    """B C T H W, of a video or an image."""
    if feature.ndim == 4:
        return feature[:, :, None]
    if feature.ndim != 5:
        raise UserError(
            f"networks.head={head} needs features on a grid, B C T H W or B C H W, but they are {tuple(feature.shape)}: "
            "choose attention, query or multiscale"
        )
    return feature


class _PerBlock(nn.Module):
    """One head for each block that is read; their logits side by side."""

    def __init__(self, heads: Iterable[nn.Module], first_frame: int):
        super().__init__()
        self.heads, self.first_frame = nn.ModuleList(heads), first_frame

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(_input(f, self.first_frame, head)) for head, f in zip(self.heads, features)], 1)


def _input(feature: Tensor, first_frame: int, module: nn.Module) -> Tensor:
    """The frames that are looked at, in the type of the head's weights."""
    if first_frame and feature.ndim == 5:
        if first_frame >= feature.shape[2]:
            raise UserError(f"networks.head.first_frame is {first_frame}, but the features have {feature.shape[2]} frames")
        feature = feature[:, :, first_frame:]
    return feature.to(next(module.parameters()).dtype)


def _norm(width: int) -> nn.Module:
    groups = next(n for n in (8, 4, 2, 1) if width % n == 0)
    return nn.GroupNorm(groups, width)


class _Conv3d(nn.Module):
    def __init__(self, channels: int, hidden: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.kernel = kernel
        self.enter = nn.Conv3d(channels, hidden, kernel, stride=2, padding=(0, 1, 1))
        self.norm, self.leave = _norm(hidden), nn.Conv3d(hidden, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        feature = _video(feature, "conv3d")
        if feature.shape[2] < self.kernel[0] or min(feature.shape[3:]) + 2 < max(self.kernel[1:]):
            raise UserError(
                f"networks.head.kernel {self.kernel} does not fit features of {tuple(feature.shape[2:])} frames, height, width"
            )
        h = functional.leaky_relu(self.norm(self.enter(feature)), 0.2)
        return self.leave(h).mean((2, 3, 4))


class _Conv2d(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.enter = nn.Conv2d(channels, hidden, 4, stride=2, padding=1)
        self.norm, self.leave = _norm(hidden), nn.Conv2d(hidden, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        feature = _video(feature, "conv2d")
        num = feature.shape[0]
        frames = feature.transpose(1, 2).flatten(0, 1)
        h = functional.leaky_relu(self.norm(self.enter(frames)), 0.2)
        return self.leave(h).reshape(num, -1).mean(1, keepdim=True)


class _Conv1d(nn.Module):
    """Over time, at every place."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.enter = nn.Conv1d(channels, hidden, 3, padding=1)
        self.norm, self.leave = _norm(hidden), nn.Conv1d(hidden, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        num = feature.shape[0]
        places = feature.permute(0, 3, 4, 1, 2).flatten(0, 2)
        h = functional.leaky_relu(self.norm(self.enter(places)), 0.2)
        return self.leave(h).reshape(num, -1).mean(1, keepdim=True)


class _SpatioTemporal(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.space, self.time = _Conv2d(channels, hidden), _Conv1d(channels, hidden)

    def forward(self, feature: Tensor) -> Tensor:
        feature = _video(feature, "spatio_temporal")
        return torch.cat([self.space(feature), self.time(feature)], 1)


class _Attention(nn.Module):
    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.enter, self.qkv = nn.Linear(channels, hidden), nn.Linear(hidden, 3 * hidden)
        self.norm, self.leave = nn.LayerNorm(hidden), nn.Linear(hidden, 1)

    def forward(self, feature: Tensor) -> Tensor:
        h = self.enter(_tokens(feature))
        q, k, v = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(functional.silu(self.norm(h)).mean(1))


def _mlp(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(channels),
        nn.Linear(channels, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 1),
    )


class _Multiscale(nn.Module):
    def __init__(self, channels: int, hidden: int, scales: tuple[int, ...]):
        super().__init__()
        self.scales = scales
        self.mlps = nn.ModuleList(_mlp(channels, hidden) for _ in scales)

    def forward(self, feature: Tensor) -> Tensor:
        if feature.ndim in (2, 3):  # no grid to cut: the finest MLP on every token
            return self.mlps[-1](_tokens(feature)).mean(1)
        feature = _video(feature, "multiscale")
        frames, height, width = feature.shape[2:]
        logits: list[Tensor] = []
        for scale, mlp in zip(self.scales, self.mlps):
            cells = (min(1 if scale == 1 else 2, frames), min(scale, height), min(scale, width))
            logits.append(mlp(_tokens(functional.adaptive_avg_pool3d(feature, cells))).mean(1))
        return torch.cat(logits, 1)


class _Query(nn.Module):
    def __init__(self, spec: QuerySpec):
        super().__init__()
        hidden, self.first_frame = spec.hidden, spec.first_frame
        self.branches = nn.ModuleList(_QueryBranch(spec.channels, hidden, spec.num_heads) for _ in spec.taps)
        self.norm, self.leave = nn.LayerNorm(hidden * len(spec.taps)), nn.Linear(hidden * len(spec.taps), 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        answers = [branch(_input(f, self.first_frame, branch)) for branch, f in zip(self.branches, features)]
        return self.leave(self.norm(torch.cat(answers, -1)))


class _QueryBranch(nn.Module):
    """A query looks at the tokens once, then an MLP four times as wide."""

    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(1, 1, hidden) * hidden**-0.5)
        self.norm, self.key_value = nn.RMSNorm(channels), nn.Linear(channels, 2 * hidden)
        self.mlp = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, feature: Tensor) -> Tensor:
        tokens = self.norm(_tokens(feature))
        k, v = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.expand(len(tokens), -1, -1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        h = self.query + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (h + self.mlp(h))[:, 0]
