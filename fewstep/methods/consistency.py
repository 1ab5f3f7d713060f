"""Consistency models in discrete steps: the answer at x_t must be the answer at a less noisy point of the same ODE.

    L = w(t, r) d( f(x_t, t), f(x_r, r) without a graph ),   r < t         Song et al. 2023, arXiv:2303.01469, eq. 7

x_r comes from the teacher (one Euler step of its ODE from x_t: distillation) or shares the noise of x_t (training on data). The
pairs (t, r) come from a curriculum that draws r towards t (ECT, Geng et al. 2024, arXiv:2406.14548), or are neighbours on a
grid (Luo et al. 2023, arXiv:2310.04378; rCM's dCM has 48 steps). With `truncation` this is the second stage of TCM (Lee et al.
2024, arXiv:2410.14895): below t' the first stage, frozen as the teacher, answers in place of the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import OneOf, kind
from fewstep.diffusion import Denoiser, Path, Prediction, Rng, StudentSampler, guided, on_path, times
from fewstep.diffusion.path import AnyPath, floats, spread
from fewstep.diffusion.rollout import Renoise
from fewstep.diffusion.times import on_flow
from fewstep.methods.contract import Nets, Terms, Turn, free_mask
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.student import problems_of_times


class Schedule(Protocol):
    def draw(self, rng: Rng, path: Path, step: int) -> tuple[Tensor, Tensor]:
        """Times t and r < t of every row, in the time of `path`; r = 0 is the data."""
        ...


AnySchedule = Annotated[Schedule, OneOf("consistency_schedule")]


@kind("curriculum", group="consistency_schedule")
@dataclass(frozen=True)
class Curriculum:
    """ECT: in sigma, the noise-to-signal ratio, r = t - t (1 - p)(1 + 8 sigmoid(-t)), p = 1 - q^-(stage + 1)."""

    times: times.AnyTimes = times.LogNormal(mean=-1.1, std=2.0)
    stage_iters: int = 10_000  # student turns after which the stage rises by one
    q: float = 2.0  # ECT: 2 for CIFAR-10, 4 for EDM2
    max_ratio: float = 0.999  # upper bound of p
    sigma_max: float = 80.0  # noise beyond it counts as this

    def draw(self, rng: Rng, path: Path, step: int) -> tuple[Tensor, Tensor]:
        a, s, _, _ = path.coefficients(self.times.draw(rng, path))
        sigma = (s / a).clamp(max=self.sigma_max)
        p = min(1 - self.q ** -(step // self.stage_iters + 1), self.max_ratio)
        lower = (sigma - sigma * (1 - p) * (1 + 8 * torch.sigmoid(-sigma))).clamp(min=0.0)
        return path.time_of(sigma), path.time_of(lower)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.q <= 1:
            yield "q", f"must be above 1, not {self.q}"
        if self.stage_iters < 1:
            yield "stage_iters", f"must be at least 1, not {self.stage_iters}"


@kind("grid", group="consistency_schedule")
@dataclass(frozen=True)
class Grid:
    """t and r are neighbours on a grid of `num` steps with `shift` in flow time; the last r is 0."""

    num: int = 48
    shift: float = 5.0

    def draw(self, rng: Rng, path: Path, step: int, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """(rows, *shape) each; a sample has one pair, or one for each of its chunks."""
        grid = torch.cat([on_flow(self.num, path, self.shift), torch.zeros(1, dtype=torch.float64)])
        place = rng.integers(self.num, shape).to(grid.device)
        return grid[place], grid[place + 1]

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.num < 2:
            yield "num", f"must be at least 2, not {self.num}"


@dataclass(frozen=True)
class Truncation:
    """TCM: the student answers above `t` alone; at `t` itself it must meet the first stage."""

    t: float = 0.5  # in the time of the path; Lee et al. 1.0 in sigma
    boundary_share: float = 0.25  # of the samples, whose t is `t`
    boundary_weight: float = 0.1

    def cut(self, t: Tensor, r: Tensor, at_boundary: Tensor) -> tuple[Tensor, Tensor]:
        """Times above `t` only; on the boundary both are `t`, where the first stage answers for the target."""
        edge = torch.full_like(t, self.t)
        t = torch.where(at_boundary, edge, torch.maximum(t, edge * (1 + 1e-6)))
        return t, torch.where(at_boundary, edge, torch.minimum(r, t))

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.t <= 0:
            yield "t", f"must be above 0, not {self.t}"
        if not 0 < self.boundary_share < 1:
            yield "boundary_share", f"is a share of samples between 0 and 1, not {self.boundary_share}"


@kind("consistency", group="method")
@dataclass(frozen=True)
class Consistency:
    source: Literal["teacher", "data"] = "teacher"  # of x_r: distillation, or training on data
    t_list: tuple[float, ...] = (1.0,)  # at which the student is sampled, in the time of the path
    renoise: Renoise = "fresh"
    path: AnyPath | None = None  # None: the network's own
    schedule: AnySchedule = Curriculum()
    guidance: float = 1.0  # w of the teacher; 1 is off
    huber: float = 1e-8  # c of d = sqrt(|difference|^2 + c^2) - c, over a whole sample; ECT 1e-8 to .06
    weighting: Literal["none", "gap", "sigma"] = "gap"  # 1, 1 / (t - r), or 1 / t^2, times in sigma; ECT: gap
    truncation: Truncation | None = None  # none: an ordinary consistency model
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student", "teacher") if self.source == "teacher" or self.truncation is not None else ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "negative"} if self.guidance != 1.0 else {"x0"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",), step=step)

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng)
        assert batch.x0 is not None
        path = self.path or nets.student.path
        student = on_path(nets.student, path)
        t, r = (time.to(batch.x0.device) for time in self.schedule.draw(rng, path, turn.step))
        at_boundary = torch.zeros_like(t, dtype=torch.bool)
        if self.truncation is not None:
            at_boundary = rng.uniform().to(t.device) < self.truncation.boundary_share
            t, r = self.truncation.cut(t, r, at_boundary)
        truth = Prediction.exact(batch.x0, rng.normal_like(batch.x0), t, path)
        answer = student(truth.x_t, t, batch.cond).x0
        target = self._target(truth, r, student, nets, batch)
        mask = free_mask(batch.cond, answer)
        gap = (answer - target) ** 2 if mask is None else (answer - target) ** 2 * mask
        distance = torch.sqrt(gap.flatten(1).sum(1) + self.huber**2) - self.huber
        loss = distance * self._weight(path, t, r).to(distance.dtype)
        if self.truncation is None:
            yield Terms.of(consistency=loss.mean())
            return
        share, none = self.truncation.boundary_share, torch.zeros_like(distance)
        boundary = torch.where(at_boundary, distance, none).mean() / share
        inside = torch.where(at_boundary, none, loss).mean() / (1 - share)
        yield Terms.of(consistency=inside, boundary=(boundary, self.truncation.boundary_weight))

    @torch.no_grad()
    def _target(self, truth: Prediction, r: Tensor, student: Denoiser, nets: Nets, batch: Batch) -> Tensor:
        """The answer at x_r, which is the data itself where r is 0."""
        path, cond = truth.path, batch.cond
        step = truth
        if self.source == "teacher":
            step = guided(on_path(nets.teacher, path), batch.negative, self.guidance)(truth.x_t, truth.t, cond)
        x_r = path.add_noise(step.x0, step.eps, r)  # an Euler step in the noise-to-signal ratio: DDIM
        answer = student(x_r, r, cond).x0
        if self.truncation is not None:
            first = on_path(nets.teacher, path)(x_r, r, cond).x0
            answer = torch.where(spread(r <= self.truncation.t, answer), first, answer)
        return torch.where(spread(r == 0, answer), step.x0, answer)

    def _weight(self, path: Path, t: Tensor, r: Tensor) -> Tensor:
        if self.weighting == "none":
            return torch.ones_like(t)
        upper, lower = (s / a for a, s, _, _ in (path.coefficients(t), path.coefficients(r)))
        return 1 / (upper - lower).clamp(min=1e-8) if self.weighting == "gap" else 1 / upper**2

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(self.t_list, self.path or path, self.renoise)

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames)
        if self.huber < 0:
            yield "huber", f"must be at least 0, not {self.huber}"
        if self.truncation is not None and self.source == "teacher":
            yield (
                "source",
                "must be data with truncation: the teacher's role belongs to the frozen first stage "
                "(networks.teacher_init=RUN of the first stage)",
            )
        if self.truncation is not None and max(self.t_list) <= self.truncation.t:
            yield "truncation.t", f"lies above every time of t_list {floats(torch.tensor(self.t_list))}, so nothing is trained"
        if self.source == "data" and self.guidance != 1.0:
            yield "guidance", "has no effect without a teacher: set source=teacher, or guidance=1"
