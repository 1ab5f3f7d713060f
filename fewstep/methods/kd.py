"""KD: regress the student's output onto the clip that the teacher generated from the same noise.

    L = || f(x_t, t) - x0_teacher ||^2          Luhman & Luhman 2021, arXiv:2101.02388

One step: x_t is the stored noise at the first time. More steps: x_t is a stored state of the teacher's ODE at one of the
student's times; the state is looked up by its time in `path_times`, never by its position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, StudentSampler, on_path
from fewstep.diffusion.path import AnyPath, floats
from fewstep.diffusion.rollout import Renoise, start
from fewstep.diffusion.sampling import student_times
from fewstep.diffusion.times import LogNormal
from fewstep.errors import UserError
from fewstep.methods.contract import Nets, Reduction, Terms, Turn, free_mask, reduced
from fewstep.methods.first_frames import problems_of_shares, with_first_frames
from fewstep.methods.student import problems_of_times


@kind("kd", group="method")
@dataclass(frozen=True)
class KD:
    student_sample_steps: int = 1  # 1, 2 or 4 in Cosmos; any number of steps whose states the data set holds
    shift: float = 5.0  # of its times in flow time: 4 steps are 1, .9375, .8333.., .625 on a flow, as `pairs --path-times 4`
    t_list: tuple[float, ...] | None = None  # its times themselves, descending, without the final 0, in the path's time
    reduction: Reduction = "half_mean"  # Transfer1 and FastGen
    path: AnyPath | None = None  # None: the network's own; `t_list` and `path_times` are in its time
    renoise: Renoise = "fresh"  # fresh noise on its x0 has the distribution of x_t; "ode" leaves the teacher's curve
    first_frames: tuple[float, ...] = ()  # shares of samples conditioned on 0, 1, .. clean first frames; Transfer1 0 to 2
    frame_noise: LogNormal | None = None  # level of noise on given frames, in sigma; Predict1: mean -3, std 2

    roles = ("student",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "noise"} if self.student_sample_steps == 1 else {"x0", "path", "path_times"})

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        batch = with_first_frames(batch, self.first_frames, rng, self.frame_noise, self.path or nets.student.path)
        assert batch.x0 is not None
        student = nets.student if self.path is None else on_path(nets.student, self.path)
        times = self.times_on(student.path)
        if self.student_sample_steps == 1:
            assert batch.noise is not None
            t = torch.full((batch.size(),), times[0], dtype=torch.float64, device=batch.x0.device)
            x_t = start(student.path, batch.noise, times[0])
        else:
            x_t, t = _state(batch, times, rng)
        error = (student(x_t, t, batch.cond).x0 - batch.x0) ** 2
        yield Terms.of(kd=reduced(error, free_mask(batch.cond, error), self.reduction))

    def times_on(self, path: Path) -> tuple[float, ...]:
        """The student's times on `path`."""
        return student_times(self.student_sample_steps, path, self.shift) if self.t_list is None else self.t_list

    def sampler(self, path: Path) -> StudentSampler:
        path = self.path or path
        return StudentSampler(self.times_on(path), path, self.renoise)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.student_sample_steps < 1:
            yield "student_sample_steps", f"must be at least 1, not {self.student_sample_steps}"
        if self.shift <= 0:
            yield "shift", f"must be above 0, not {self.shift}"
        if self.t_list is not None and self.student_sample_steps != len(self.t_list):
            steps = f"student_sample_steps={self.student_sample_steps}"
            yield "t_list", f"has {len(self.t_list)} times for {steps}: give one per step, descending, without the final 0"
        if self.t_list is not None:
            yield from problems_of_times(self.t_list)
        yield from problems_of_shares(self.first_frames, self.frame_noise)


def _state(batch: Batch, t_list: Sequence[float], rng: Rng) -> tuple[Tensor, Tensor]:
    """A stored state of each sample at a random one of the student's times, and that time."""
    assert batch.path is not None and batch.path_times is not None
    times = torch.tensor(t_list, dtype=torch.float64, device=batch.path.device)
    index = aligned(times, batch.path_times.double())  # B, steps
    step = rng.integers(len(times)).to(index.device)
    row = torch.arange(len(step), device=index.device)
    return batch.path[row, index[row, step]], times[step]


def aligned(times: Tensor, path_times: Tensor, tolerance: float = 1e-4) -> Tensor:
    """(B, steps) indices of `times` in `path_times` (B, K). Raises UserError if no state was stored for one of them."""
    distance = (path_times[:, None, :] - times[None, :, None]).abs()
    nearest, index = distance.min(-1)
    wrong = (nearest > tolerance * times).any(-1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise UserError(
            f"t_list {[round(t, 6) for t in floats(times)]} does not align with the stored path, whose states are at "
            f"{[round(t, 6) for t in floats(path_times[row])]} (row {row} of this batch). Choose "
            "method.t_list among these times (or method.shift, the shift of all), or make the pairs anew with these "
            "(fewstep pairs --path-times; data.path_times)"
        )
    return index
