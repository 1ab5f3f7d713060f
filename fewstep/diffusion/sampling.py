"""How a model is sampled, as a record: a few-step student by its own times, a many-step teacher by an ODE solver.

generate, pairs, evaluate, health and synthetic pairs all call these records: the clips one looks at are those a student learns
from. Both are called alike: sampler(denoiser, noise, cond, rng, negative) -> x0, from noise of unit variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import OneOf, kind
from fewstep.diffusion import samplers
from fewstep.diffusion.by_chunk import ByChunk, CausalDenoiser, Switch, chunk_by_chunk
from fewstep.diffusion.denoiser import Denoiser, on_path
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.path import EDM, VP, AnyPath, Path, RectifiedFlow, floats
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.rollout import Renoise, few_step, start
from fewstep.diffusion.samplers import Solver, Trajectory
from fewstep.diffusion.times import converted, even, karras, on_flow, shifted
from fewstep.errors import UserError
from fewstep.solvers import SolverName

SIGMA = EDM(t_max=1e9)  # the path whose time is the noise-to-signal ratio, as far as a grid may begin
Grid = Literal["flow", "karras", "even"]


@kind("student", group="sampler")
@dataclass(frozen=True)
class StudentSampler:
    """How a student is meant to be sampled; saved with its weights: other times or another renoise are another model."""

    times: tuple[float, ...]  # in the time of `path`
    path: AnyPath
    renoise: Renoise = "fresh"
    guidance: float = 1.0  # w; students are trained to do without
    by_chunk: ByChunk | None = None  # of a student that generates chunk after chunk; None: all frames at once
    shift: float | None = None  # of the times of a flow map, which takes any number of steps; none: these times only

    def with_steps(self, num_steps: int) -> StudentSampler:
        """The same student with another number of steps. Raises UserError unless it is a flow map."""
        if num_steps == len(self.times):
            return self
        if self.shift is None:
            raise UserError(f"this student takes {len(self.times)} steps, at times it was trained for, not {num_steps}")
        return replace(self, times=student_times(num_steps, self.path, self.shift))

    def with_calls(self, num: int) -> StudentSampler:
        """The same student with `num` calls, to measure it: a flow map on its own grid, any other at times between its own.

        The times of a student of n calls are spread evenly from its first to 0, in flow time, so that a divisor of n takes a
        part of them, and 1 the first; other numbers lead to times that it was not trained for.
        """
        if self.shift is not None or num == len(self.times):
            return self.with_steps(num)
        own = [*floats(converted(torch.tensor(self.times, dtype=torch.float64), self.path, RectifiedFlow())), 0.0]
        places = np.interp(np.arange(1, num) / num, np.linspace(0, 1, len(own)), own).tolist()
        between = floats(converted(torch.tensor(places, dtype=torch.float64), RectifiedFlow(), self.path)) if places else ()
        return replace(self, times=(self.times[0], *between))

    @property
    def num_calls(self) -> int:
        """Network calls for one clip, or for each chunk but the first; guidance calls the network twice."""
        return len(self.times) * (1 if self.guidance == 1.0 else 2)

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, cond: Condition, rng: Rng, negative: Condition | None = None
    ) -> Tensor:
        """x0 from unit-variance noise."""
        if self.by_chunk is not None:
            return torch.cat(list(self.stream(cast(CausalDenoiser, denoiser), noise, cond, rng, negative)), 2)
        x = start(self.path, noise, self.times[0])
        student = on_path(guided(denoiser, negative, self.guidance), self.path)
        return few_step(student, x, self.times, cond, renoise=self.renoise, rng=rng)

    @torch.no_grad()
    def stream(
        self,
        denoiser: CausalDenoiser,
        noise: Tensor,
        cond: Condition,
        rng: Rng,
        negative: Condition | None = None,
        switches: Sequence[Switch] = (),
    ) -> Iterator[Tensor]:
        """x0 of one chunk after the other, each as soon as it is finished; joined they are what a call returns.

        switches: latent frames, and the condition that holds from the first chunk at or after each of them on.
        """
        settings = self.by_chunk
        assert settings is not None

        def solve(number: int, frames: range, student: Denoiser, own: Condition) -> Tensor:
            times = settings.times(number, self.times)
            x = start(self.path, noise[:, :, frames.start : frames.stop], times[0])
            return few_step(student, x, times, own, renoise=self.renoise, rng=rng)

        student = _per_chunk(denoiser, negative, self.guidance, self.path)
        return chunk_by_chunk(student, denoiser, noise, cond, solve, settings, rng, switches=switches)


@kind("teacher", group="sampler")
@dataclass(frozen=True)
class TeacherSampler:
    """How a teacher is sampled: solver, grid and guidance. `for_path` has the published values.

    The grid is one of three. flow: `shift` in flow time, on any path. karras: Karras et al. 2022, eq. 5, in the
    noise-to-signal ratio, `num_steps` steps and a final clean denoise at `sigma_min`. even: in the path's own time.
    """

    solver: SolverName = "unipc"
    num_steps: int = 35
    grid: Grid = "flow"
    shift: float = 5.0  # of grid=flow: Predict2.5 and Wan
    sigma_max: float = 80.0  # of grid=karras: Cosmos 1
    sigma_min: float = 0.002  # of grid=karras: Cosmos 1
    guidance: float = 1.0  # w in uncond + w (cond - uncond), 1 is off; Cosmos writes g = w - 1
    guidance_low: float | None = None  # w below `boundary`; none: the same
    boundary: float | None = None  # time below which the low-noise expert of Wan A14B is called
    by_chunk: ByChunk | None = None  # of a causal network trained to continue clean frames; None: all frames at once

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"the number of a teacher's steps must be at least 1, not {self.num_steps}")
        if self.guidance_low is not None and self.boundary is None:
            raise UserError("guidance_low: this network is no pair of experts, one for high and one for low noise")

    @classmethod
    def for_path(cls, path: Path) -> TeacherSampler:
        """The published sampler of the families on this path: Cosmos 1 on EDM, Predict2.5 and Wan on flows, CogVideoX on VP."""
        if isinstance(path, EDM):
            return cls("res_2ab", grid="karras", sigma_max=path.t_max)
        return cls(num_steps=50, grid="even") if isinstance(path, VP) else cls()

    @property
    def grid_size(self) -> int:
        """Number of times of the grid: "35 steps" of Cosmos 1 are 35 and a clean denoise."""
        return self.num_steps + (self.grid == "karras")

    @property
    def num_calls(self) -> int:
        """Network calls for one clip; Heun calls the network twice for each step but the last, guidance twice for each."""
        calls = 2 * self.grid_size - 1 if self.solver == "heun" else self.grid_size
        return calls * (1 if self.guidance == 1.0 and self.guidance_low is None else 2)

    def times(self, path: Path) -> Tensor:
        """The grid in the path's own time."""
        if self.grid == "karras":
            return converted(karras(self.grid_size, self.sigma_max, self.sigma_min), SIGMA, path)
        return on_flow(self.num_steps, path, self.shift) if self.grid == "flow" else even(self.num_steps, path.t_max)

    def __call__(
        self, denoiser: Denoiser, noise: Tensor, cond: Condition, rng: Rng | None = None, negative: Condition | None = None
    ) -> Tensor:
        """x0 from unit-variance noise. `rng` is used where finished chunks are noised again: an ODE draws nothing."""
        if self.by_chunk is not None:
            return self._by_chunk(cast(CausalDenoiser, denoiser), noise, cond, rng or Rng(0, rows=range(len(noise))), negative)
        return self.trajectory(denoiser, noise, cond, negative).x0

    def trajectory(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Condition,
        negative: Condition | None = None,
        at: Sequence[float] = (),
        origin: Tensor | None = None,
    ) -> Trajectory:
        """x0, and the states B K .. at the K times `at`, which are in the time of the denoiser's path; K may be 0.

        origin: clean data; the solver starts from it with the noise of the grid's first time, instead of from noise alone.
        """
        solver: Solver = getattr(samplers, self.solver)
        below = None if self.guidance_low is None or self.boundary is None else (self.boundary, self.guidance_low)
        teacher, grid = guided(denoiser, negative, self.guidance, below=below), self.times(denoiser.path)
        if origin is None:
            x = start(denoiser.path, noise, float(grid[0]))
        else:
            x = denoiser.path.add_noise(origin, noise, grid[:1].expand(len(noise)).to(noise.device))
        if not at:
            return Trajectory(solver(teacher, x, grid, cond), grid.new_zeros(0), x.new_zeros(len(x), 0, *x.shape[1:]))
        return samplers.trajectory(solver, teacher, x, grid, cond, torch.tensor(at, dtype=torch.float64))

    @torch.no_grad()
    def _by_chunk(
        self, denoiser: CausalDenoiser, noise: Tensor, cond: Condition, rng: Rng, negative: Condition | None
    ) -> Tensor:
        settings = self.by_chunk
        assert settings is not None
        solver: Solver = getattr(samplers, self.solver)
        grid = self.times(denoiser.path)

        def solve(number: int, frames: range, teacher: Denoiser, own: Condition) -> Tensor:
            x = start(denoiser.path, noise[:, :, frames.start : frames.stop], float(grid[0]))
            return solver(teacher, x, grid, own)

        teacher = _per_chunk(denoiser, negative, self.guidance, denoiser.path)
        return torch.cat(list(chunk_by_chunk(teacher, denoiser, noise, cond, solve, settings, rng)), 2)

    def student_times(self, num_steps: int, path: Path, shift: float) -> tuple[float, ...]:
        """The times of a student of this teacher, which begins where the grid begins: Predict2's at 80 / 81, not at 1."""
        times, first = student_times(num_steps, path, shift), float(self.times(path)[0])
        return (first, *times[1:]) if first < times[0] * (1 - 1e-6) else times

    def problems_of(self, at: Sequence[float], path: Path) -> Iterable[str]:
        """Why the solver's states at the times `at` cannot be kept, or would not be what was meant."""
        if not at:
            return
        if self.num_steps < 2 * len(at):
            yield f"{self.num_steps} steps are too few to keep {len(at)} states and solve between them: at least {2 * len(at)}"
        if list(at) != sorted(set(at), reverse=True):
            yield f"the times must descend, from noise to the clip, not {list(at)}"
        first = float(self.times(path)[0])
        if not 0 < min(at) <= max(at) <= first * (1 + 1e-6):
            yield f"the times must lie between 0 and {first:g}, where this teacher's grid on {path} begins, but are {list(at)}"
        elif isinstance(path, EDM) and max(at) <= 1.0:
            yield (
                f"the times {list(at)} are flow times, from 1 to 0, but the time of this teacher's path {path} is sigma, "
                f"from {first:g} to 0. Give sigmas, or the number of the student's steps"
            )


Sampler = StudentSampler | TeacherSampler
AnySampler = Annotated[Sampler, OneOf("sampler")]  # a field that holds one of them


def _per_chunk(denoiser: Denoiser, negative: Condition | None, w: float, path: Path) -> Callable[[range], Denoiser]:
    """The guided denoiser for the frames of a chunk."""

    def of(frames: range) -> Denoiser:
        return on_path(guided(denoiser, None if negative is None else negative.part(frames), w), path)

    return of


def student_times(num_steps: int, path: Path, shift: float) -> tuple[float, ...]:
    """`num_steps` times of a student on `path`, shifted in flow time: on a flow 1, .9375, .8333, .625 for 4 and shift 5."""
    is_flow = isinstance(path, RectifiedFlow)
    return tuple(floats(shifted(num_steps, shift) if is_flow else on_flow(num_steps, path, shift)))
