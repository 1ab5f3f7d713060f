"""The nouns that travel: what a network is conditioned on, and one batch of training data.

Both are frozen. `None` means "this data set has no such field"; a method names the fields it needs in `Method.needs` and they
are checked before any weight is read. Latents are B C T H W, or B D for points; every tensor here has the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.errors import UserError

_Rows = TypeVar("_Rows", bound="_ByRow")


class _ByRow:
    """Frozen dataclasses whose tensors, nested ones too, all have the batch as their first axis."""

    def _map(self: _Rows, change: Callable[[Tensor], Tensor]) -> _Rows:
        def walk(value: Any) -> Any:  # Any: a field holds a tensor, a nested record, a mapping of tensors, or None
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, _ByRow):
                return value._map(change)
            if isinstance(value, Mapping):
                return {name: walk(part) for name, part in value.items()}
            return value

        return type(self)(**{name: walk(value) for name, value in vars(self).items() if value is not None})

    def rows(self: _Rows, index: slice | Tensor) -> _Rows:
        """The same record with only the rows of `index`."""
        return self._map(lambda tensor: tensor[index])

    def to(self: _Rows, device: torch.device | str) -> _Rows:
        """The same record on `device`; dtypes stay as they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Condition(_ByRow):
    """All that a denoiser may know besides x_t and t. cond and its negative differ in text or label only."""

    text: Tensor | None = None  # B N D, embeddings as the text encoder gave them
    text_mask: Tensor | None = None  # B N, true where a token is; None: every token counts (Cosmos attends to padding too)
    label: Tensor | None = None  # B, class index; -1 means "no class", the unconditional answer
    frames: Tensor | None = None  # B C T H W, clean latents; only those under frame_mask are meaningful
    noisy_frames: Tensor | None = (
        None  # B C T H W, what Cosmos 1 receives in place of `frames`, with a little noise; None: frames
    )
    frame_mask: Tensor | None = None  # B T, 1 where the frame is given: it is kept as it is and adds nothing to any loss
    control: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # by control name: B C T H W latents
    fps: Tensor | None = None  # B, frames per second of the pixels
    pooled: Tensor | None = None  # B D, one vector for the whole prompt (SDXL, Flux: of their CLIP encoders)
    image: Tensor | None = None  # B N D, features of the picture a clip starts from (Wan 2.1 I2V: of CLIP's last but one layer)
    beside: Tensor | None = None  # B C T H W, read on channels of their own beside x_t (I2V: mask and latents of the picture)
    padding: Tensor | None = None  # B H W in pixels, true where a picture was padded to its bucket (an input of Cosmos)
    context: Tensor | None = None  # B C T H W, what a causal network attends to in the place of earlier chunks of x_t itself
    context_t: Tensor | None = None  # B, its noise level in the network's own time; None: it is clean
    end: Tensor | None = None  # B, the time where a flow map's jump ends, in the time of the path; None: where it begins
    size: Tensor | None = None  # B 6, pixels: height and width of the source, top and left of the crop, height and width (SDXL)

    def part(self, frames: range) -> Condition:
        """The condition of these latent frames alone."""
        span = slice(frames.start, frames.stop)
        return self._along_time(lambda clip: clip[:, :, span], lambda mask: mask[:, span])

    def twice(self) -> Condition:
        """The condition of the clip followed by itself; without context."""
        double = self._along_time(lambda clip: torch.cat([clip, clip], 2), lambda mask: torch.cat([mask, mask], 1))
        return replace(double, context=None, context_t=None)

    def _along_time(self, clip: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Condition:
        """Changes whatever has an axis of latent frames."""
        clips = {"frames": self.frames, "noisy_frames": self.noisy_frames, "beside": self.beside, "context": self.context}
        return replace(
            self,
            **{name: clip(value) for name, value in clips.items() if value is not None},
            frame_mask=None if self.frame_mask is None else mask(self.frame_mask),
            control={name: clip(value) for name, value in self.control.items()},
        )


@dataclass(frozen=True)
class Batch(_ByRow):
    """One batch of a data set. `x0` is what the Cosmos documents call "real"."""

    x0: Tensor | None = None  # clean data: latents of real clips, or of the teacher's clip in a pair
    noise: Tensor | None = None  # the unit-variance noise this very x0 was made from (pairs)
    path: Tensor | None = None  # B K ..., states of the teacher's ODE that ends in x0, at `path_times`
    path_times: Tensor | None = None  # B K, descending, in the time of the teacher's path
    cond: Condition = field(default_factory=Condition)
    negative: Condition | None = None  # what guidance pushes away from: an empty or negative prompt, the class -1
    index: Tensor | None = None  # B, int64, place of the sample in its data set

    def size(self) -> int:
        """Number of rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                return value.shape[0]
        raise UserError("an empty batch: no field of it holds a tensor")


def join(first: Condition, second: Condition) -> Condition:
    """The rows of `first` followed by those of `second`: how cond and its negative go through a network as one batch."""
    return _paired(first, second, lambda a, b: torch.cat([a, b]))


def choose(take_first: Tensor, first: Condition, second: Condition) -> Condition:
    """Row by row, `first` where `take_first` (B,) is true, `second` elsewhere."""
    return _paired(first, second, lambda a, b: torch.where(take_first.reshape(-1, *[1] * (a.ndim - 1)), a, b))


def first_frames(num: Tensor, frames: int) -> Tensor:
    """The mask (B, frames) that is true for the first num[i] frames of row i."""
    return torch.arange(frames, device=num.device)[None] < num[:, None]


def _paired(first: Condition, second: Condition, combine: Callable[[Tensor, Tensor], Tensor]) -> Condition:
    def pair(name: str, a: Any, b: Any) -> Any:  # Any: tensor, mapping of tensors or None, as the field has it
        if a is None and b is None:
            return None
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape[1:] != b.shape[1:]:
                raise UserError(
                    f"cond and negative do not match in '{name}': its shapes are {tuple(a.shape)} and {tuple(b.shape)}, "
                    "and only the number of rows may differ; texts are padded to one length"
                )
            return combine(a, b)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
            return {key: pair(f"{name}.{key}", a[key], b[key]) for key in a}
        raise UserError(
            f"cond and negative do not match in '{name}': one has it and the other does not. They may differ in their "
            "values, not in which fields they have; an empty text is an embedding too"
        )

    return Condition(**{f.name: pair(f.name, getattr(first, f.name), getattr(second, f.name)) for f in fields(Condition)})
