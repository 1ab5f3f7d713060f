"""Small networks to be trained: a residual MLP for points (B D) and a video DiT for latents (B C T H W).

Inputs are in TrigFlow's unit: y = x_t / sqrt(a^2 sigma_d^2 + s^2) has unit variance, phi = atan(s / (a sigma_d)), and the
raw output F stands for the velocity cos(phi) eps - sin(phi) x0 / sigma_d. This is Karras' preconditioning written so that it
is finite at both ends of every path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import AnyPath, spread, working_dtype
from fewstep.diffusion.prediction import coefficients_for, with_clean_frames
from fewstep.errors import UserError
from fewstep.networks.contract import NetworkDefaults, NetworkSpec, Traits, with_copies
from fewstep.networks.taps import idle_blocks


@dataclass(frozen=True)
class Tiny(NetworkDefaults):
    """A raw module F(y, phi, cond, taps[, phi of the end]) -> (F, features) as a Network."""

    module: nn.Module
    path: Path
    sigma_data: float
    blocks: Sequence[nn.Module] = field(default=())
    reads_end: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(first_frames="time", reads_end=self.reads_end)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        x = x_t.to(working_dtype(x_t))
        mask = None if cond.frame_mask is None else cond.frame_mask.to(x)
        a, s, _, _ = self.path.coefficients(t)
        phi = torch.atan2(s, a * self.sigma_data)
        end = None if cond.end is None else self._angle(cond.end)
        if mask is not None:  # given frames are shown clean, each at its own time 0
            assert cond.frames is not None
            phi = phi if phi.ndim == 2 else phi[:, None].expand(-1, x.shape[2])
            phi = phi * (1 - mask.double())
            end = None if end is None else end[:, None] * (1 - mask.double())
        scale = torch.hypot(a * self.sigma_data, s)
        y = x / spread(scale, x).to(x.dtype)
        if mask is not None and cond.frames is not None:
            y = torch.lerp(y, cond.frames.to(x) / self.sigma_data, mask[:, None, :, None, None])
        with idle_blocks(self.blocks, taps):
            raw, features = self.module(y, phi, cond, taps, *(() if end is None else (end,)))
        raw = raw.to(x.dtype)
        cos, sin = spread(phi.cos(), x).to(x.dtype), spread(phi.sin(), x).to(x.dtype)
        x0 = self.sigma_data * (cos * y - sin * raw)
        eps = sin * y + cos * raw
        _, _, da, ds = coefficients_for(self.path, t, x)
        return with_clean_frames(Prediction(x, t, self.path, da * x0 + ds * eps, features), cond.frames, cond.frame_mask)

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A flow map begins with the weights of a network without a second time: its answer does not depend on it then."""
        return with_copies(weights, "time.", "end.") if self.reads_end else weights

    def _angle(self, t: Tensor) -> Tensor:
        a, s, _, _ = self.path.coefficients(t)
        return torch.atan2(s, a * self.sigma_data)


@kind("tiny", group="network")
@dataclass(frozen=True)
class TinySpec(NetworkSpec):
    architecture: Literal["mlp", "dit"] = "mlp"
    channels: int = 2  # D of points, C of latents
    width: int = 128
    depth: int = 4
    num_heads: int = 4  # dit only
    text_dim: int = 0  # dit only; 0: no text
    num_labels: int = 0  # classes; label -1 is one more
    end_time: bool = False  # a second time, where a jump ends: for flow maps
    sigma_data: float = 1.0
    path: AnyPath = RectifiedFlow()

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.architecture == "dit" and (self.num_heads < 1 or self.width % self.num_heads):
            yield "num_heads", f"{self.num_heads} heads do not divide a width of {self.width}"

    def build(self) -> Tiny:
        module = _Mlp(self) if self.architecture == "mlp" else _Dit(self)
        return Tiny(module, self.path, self.sigma_data, tuple(module.blocks), self.end_time)


class _TimeEmbedding(nn.Module):
    """Sinusoids of phi, then two layers. phi spans 0 .. pi/2, so the lowest frequency is 1 and nothing is aliased."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(6), persistent=False)
        self.net = nn.Sequential(nn.Linear(13, width), nn.SiLU(), nn.Linear(width, width))

    frequencies: Tensor

    def forward(self, phi: Tensor) -> Tensor:
        angle = phi[..., None].float() * self.frequencies.float()
        waves = torch.cat([phi[..., None].float(), angle.sin(), angle.cos()], -1)
        return self.net(waves.to(self.net[0].weight.dtype))  # pyright: ignore[reportArgumentType, reportCallIssue]  # an attribute of a module


END_GATE = 0.25  # share of the second time, AnyFlow's


def _times(time: nn.Module, second: nn.Module | None, phi: Tensor, end: Tensor | None) -> Tensor:
    """The embedding of a noise level, or of that at which a jump begins and that at which it ends."""
    if second is None:
        return time(phi)
    return torch.lerp(time(phi), second(phi if end is None else end), END_GATE)


class _MlpBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulate(emb).chunk(2, -1)
        return h + self.second(functional.silu(self.first(h) * (1 + scale) + shift))


class _Mlp(nn.Module):
    def __init__(self, spec: TinySpec):
        super().__init__()
        self.enter = nn.Linear(spec.channels, spec.width)
        self.time = _TimeEmbedding(spec.width)
        self.end = _TimeEmbedding(spec.width) if spec.end_time else None
        self.label = nn.Embedding(spec.num_labels + 1, spec.width) if spec.num_labels else None
        self.blocks = nn.ModuleList(_MlpBlock(spec.width) for _ in range(spec.depth))
        self.leave = nn.Linear(spec.width, spec.channels)

    def forward(
        self, y: Tensor, phi: Tensor, cond: Condition, taps: Sequence[int], end: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        _refuse_other(y, "points", 2, self.leave.out_features)
        y = y.to(self.enter.weight.dtype)  # in here, where the weights are those of compute; outside they may be sharded fp32
        emb = _with_label(functional.silu(_times(self.time, self.end, phi, end)), self.label, cond, y.shape[0])
        h, features = self.enter(y), {}
        for i, block in enumerate(self.blocks):
            h = block(h, emb)
            features[i] = h
        return self.leave(functional.silu(h)), tuple(features[i] for i in taps)


def _refuse_other(y: Tensor, what: str, num_axes: int, channels: int) -> None:
    if y.ndim != num_axes or y.shape[1] != channels:
        raise UserError(f"this tiny network works on {what} of {channels} channels, but was given {list(y.shape[1:])}")


def _with_label(emb: Tensor, table: nn.Embedding | None, cond: Condition, num: int) -> Tensor:
    if table is None:
        return emb
    label = torch.full((num,), -1) if cond.label is None else cond.label
    extra = table(label.to(table.weight.device) + 1)  # row 0 is "no class"; a label that is none of the classes has no row
    return emb + (extra if emb.ndim == 2 else extra[:, None])


class _DitBlock(nn.Module):
    """Self-attention over all tokens, cross-attention to text, MLP; each modulated by the time of the token's frame."""

    def __init__(self, width: int, num_heads: int, text_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query = nn.Linear(width, width) if text_dim else None
        self.key_value = nn.Linear(text_dim, 2 * width) if text_dim else None
        self.text_out = nn.Linear(width, width) if text_dim else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, emb: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(emb).chunk(6, -1)
        q, k, v = self.qkv(self.norm(h) * (1 + scale1) + shift1).chunk(3, -1)
        h = h + gate1 * self.out(self._attend(q, k, v, None))
        if self.query is not None and self.key_value is not None and self.text_out is not None and text is not None:
            k, v = self.key_value(text.to(h.dtype)).chunk(2, -1)
            h = h + self.text_out(self._attend(self.query(self.norm(h)), k, v, text_mask))
        return h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        heads: Callable[[Tensor], Tensor] = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        keep = None if mask is None else mask[:, None, None, :].bool()
        return functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), keep).transpose(1, 2).flatten(2)


class _Dit(nn.Module):
    """Patch 1 x 1 x 1: latents this small have no tokens to spare. Positions are sinusoids, so any size runs."""

    def __init__(self, spec: TinySpec):
        super().__init__()
        self.enter = nn.Linear(spec.channels + 1, spec.width)  # + the mask of given frames
        self.time = _TimeEmbedding(spec.width)
        self.end = _TimeEmbedding(spec.width) if spec.end_time else None
        self.label = nn.Embedding(spec.num_labels + 1, spec.width) if spec.num_labels else None
        self.blocks = nn.ModuleList(_DitBlock(spec.width, spec.num_heads, spec.text_dim) for _ in range(spec.depth))
        self.leave = nn.Linear(spec.width, spec.channels)
        self.width = spec.width

    def forward(
        self, y: Tensor, phi: Tensor, cond: Condition, taps: Sequence[int], end: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        _refuse_other(y, "latents", 5, self.leave.out_features)
        y = y.to(self.enter.weight.dtype)  # as in _Mlp
        num, _, frames, height, width = y.shape
        mask = torch.zeros(num, frames) if cond.frame_mask is None else cond.frame_mask
        mask = mask.to(y)[:, None, :, None, None].expand(-1, 1, -1, height, width)
        tokens = torch.cat([y, mask], 1).permute(0, 2, 3, 4, 1).flatten(1, 3)
        h = self.enter(tokens) + _positions(frames, height, width, self.width).to(y)
        phi = phi if phi.ndim == 2 else phi[:, None].expand(-1, frames)
        end = end if end is None or end.ndim == 2 else end[:, None].expand(-1, frames)
        emb = _with_label(functional.silu(_times(self.time, self.end, phi, end)), self.label, cond, num)
        emb = emb.repeat_interleave(height * width, 1)
        features: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            h = block(h, emb, cond.text, cond.text_mask)
            if i in taps:
                features[i] = h.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)
        out = self.leave(functional.layer_norm(h, h.shape[-1:])).unflatten(1, (frames, height, width))
        return out.permute(0, 4, 1, 2, 3).contiguous(), tuple(features[i] for i in taps)


def _positions(frames: int, height: int, width: int, channels: int) -> Tensor:
    """(T H W, channels) sinusoids, a third of the channels for each axis."""
    parts: list[Tensor] = []
    for axis, size in enumerate((frames, height, width)):
        part = channels // 3 if axis else channels - 2 * (channels // 3)
        angle = torch.arange(size)[:, None] * torch.exp(-math.log(100.0) * torch.arange((part + 1) // 2) / max(part // 2, 1))
        waves = torch.cat([angle.sin(), angle.cos()], 1)[:, :part]
        shape = [1, 1, 1, part]
        shape[axis] = size
        parts.append(waves.reshape(shape).expand(frames, height, width, part))
    return torch.cat(parts, -1).flatten(0, 2)
