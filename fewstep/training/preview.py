"""Previews: what a person looks at while a run goes on, and the numbers that go with the picture.

A preview is a frozen dataclass with `every` and `show(scene) -> numbers`. It is called before the first step, every `every`
iterations, and at the end; its last numbers go into summary.json, those of the first call as NAME_undistilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import OneOf, kind
from fewstep.data.contract import AnyData, Dataset
from fewstep.diffusion import Denoiser, Rng, Sampler
from fewstep.evaluation.energy import energy_distance
from fewstep.evaluation.plot import scatter
from fewstep.files import write_text


@dataclass(frozen=True)
class Scene:
    """What a preview may look at; the student answers with its moving average."""

    student: Denoiser
    teacher: Denoiser | None
    sampler: Sampler
    step: int
    folder: Path  # previews/ of the run
    device: torch.device
    is_main: bool  # all ranks call (a sharded network needs them all), one writes
    data: Dataset  # of the training
    base: str | None = None  # the pipeline that the teacher's or the student's weights come from, with its codec
    guidance: float = 1.0  # w of the teacher, as the method has it
    latent_scale: float = 1.0  # deviation of the latents: sigma_data of an EDM network
    fps: float | None = None
    picture: Callable[[str, NDArray[np.uint8]], None] = lambda name, picture: None  # shows an image H W 3 in TensorBoard
    agree: Callable[[bool], bool] = lambda flag: flag  # whether it is true on any process
    say: Callable[[str], None] = lambda text: None  # prints a line for people, kept in log.txt


class Preview(Protocol):
    @property
    def every(self) -> int | None:
        """Iterations between two previews; None: only the first and the last."""
        ...

    # A field `max_share`, if there is one: the share of the run's time that previews may take; one that is due but would
    # exceed it is left out.

    def show(self, scene: Scene) -> Mapping[str, float]: ...


AnyPreview = Annotated[Preview, OneOf("preview")]


@kind("points", group="preview")
@dataclass(frozen=True)
class PointsPreview:
    """Points of the plane: a scatter plot, and the energy distance to held-out data (squared form, unbiased)."""

    reference: AnyData  # held-out samples: give it another seed than the training data's
    every: int | None = None
    num: int = 4096
    seed: int = 1234
    max_share: float = 1.0  # of the run's time that previews may take

    def show(self, scene: Scene) -> Mapping[str, float]:
        reference = self.reference.open().batch(torch.arange(self.num)).x0
        assert reference is not None
        rng = Rng(self.seed, 0, torch.arange(self.num), scene.device)
        noise = rng.normal(reference.shape[1:])
        samples = scene.sampler(scene.student, noise, Condition(), rng).float().cpu()
        distance = float(energy_distance(samples, reference))
        if scene.is_main:
            self._plot(scene, samples, reference, distance)
        return {"energy_distance": distance}

    def _plot(self, scene: Scene, samples: Tensor, reference: Tensor, distance: float) -> None:
        title = f"iteration {scene.step}: energy distance {distance:.4f}"
        svg = scatter(
            {"held-out data": reference[:, :2], f"student, {scene.sampler.num_calls} call(s)": samples[:, :2]}, title=title
        )
        write_text(scene.folder / f"step_{scene.step:09d}.svg", svg)
