"""Batches of noise in the shapes of real ones: to plan memory, to time a step, and to try a recipe before there is data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind


@kind("mock", group="data")
@dataclass(frozen=True)
class Mock:
    """Random latents, embeddings and controls of the shapes given. A run on it learns nothing."""

    shape: tuple[int, ...] = (
        16,
        16,
        88,
        160,
    )  # of x0 without the batch: C T H W of latents. Cosmos 1 at 704 x 1280, 121 frames
    text: tuple[int, int] | None = (512, 1024)  # tokens, channels; none: no text. T5-11b of Cosmos 1
    controls: tuple[str, ...] = ()  # each with latents of x0's shape
    given_frames: int = 0  # first latent frames that are given
    noise: bool = True  # the noise of each sample, as pairs have it
    path_times: tuple[float, ...] = ()  # states at these times, as pairs with paths have them
    fps: float | None = 24.0
    num: int = 64  # samples
    pooled: int | None = None  # channels of a vector of the whole text: SDXL 1280, Flux 768
    image: tuple[int, int] | None = None  # tokens, channels of a picture's features: Wan 2.1 I2V (257, 1280)
    beside: int = 0  # channels read beside x_t: Wan I2V 20, CogVideoX I2V 16
    num_labels: int = 0  # classes; the negative's is -1, none

    @property
    def fields(self) -> frozenset[str]:
        names = {"x0", "negative"} | ({"noise"} if self.noise else set[str]())
        return frozenset(names | ({"path", "path_times"} if self.path_times else set[str]()))

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.shape or min(self.shape) < 1:
            yield "shape", f"must be (C, T, H, W), each at least 1, not {self.shape}"
        if self.given_frames and (len(self.shape) != 4 or self.given_frames >= self.shape[1]):
            yield "given_frames", f"is {self.given_frames}, but x0 is of shape {self.shape}"

    def open(self) -> MockData:
        return MockData(self)


@dataclass(frozen=True)
class MockData:
    spec: Mock

    def __len__(self) -> int:
        return self.spec.num

    def batch(self, index: Tensor) -> Batch:
        spec, num = self.spec, len(index)
        generator = torch.Generator().manual_seed(0 if num == 0 else int(index[0]))
        draw = lambda *shape: torch.randn((num, *shape), generator=generator)  # noqa: E731
        mask = None
        if spec.given_frames:
            mask = torch.zeros(num, spec.shape[1])
            mask[:, : spec.given_frames] = 1
        cond = Condition(
            text=None if spec.text is None else draw(*spec.text),
            frames=None if mask is None else draw(*spec.shape),
            frame_mask=mask,
            control={name: draw(*spec.shape) for name in spec.controls},
            fps=None if spec.fps is None else torch.full((num,), spec.fps),
            pooled=None if spec.pooled is None else draw(spec.pooled),
            image=None if spec.image is None else draw(*spec.image),
            beside=draw(spec.beside, *spec.shape[1:]) if spec.beside else None,
            label=torch.randint(spec.num_labels, (num,), generator=generator) if spec.num_labels else None,
        )
        negative = replace(
            cond,
            text=None if cond.text is None else torch.zeros_like(cond.text),
            pooled=None if cond.pooled is None else torch.zeros_like(cond.pooled),
            label=None if cond.label is None else torch.full_like(cond.label, -1),
        )
        times = torch.tensor(spec.path_times, dtype=torch.float64).expand(num, -1)
        return Batch(
            x0=draw(*spec.shape),
            noise=draw(*spec.shape) if spec.noise else None,
            path=draw(len(spec.path_times), *spec.shape) if spec.path_times else None,
            path_times=times if spec.path_times else None,
            cond=cond,
            negative=negative,
            index=index,
        )
