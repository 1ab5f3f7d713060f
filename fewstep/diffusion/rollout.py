"""How a few-step student generates: noise -> x0 -> noised again, less -> x0 -> ...

The one loop that both generates and trains: DMD2's backward simulation and Self-Forcing run this very code, so that what is
trained is what is used. How the state is noised between two calls is a property of the student, by name:

    fresh  new noise each time (DMD2, rCM, FastGen "sde")
    same   the noise it started from (Predict2.5)
    ode    the noise its own prediction implies: a DDIM step (FastGen "ode")
    map    the same, and the network also receives where each step ends: the jumps of a flow map (AnyFlow, MeanFlow)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion.denoiser import Cache, Denoiser
from fewstep.diffusion.path import Path, working_dtype
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.times import explicit
from fewstep.errors import UserError

Renoise = Literal["fresh", "same", "ode", "map"]
Times = Sequence[float] | Tensor


def start(path: Path, noise: Tensor, t: float) -> Tensor:
    """The state at the first time: s(t) noise, no data in it. On EDM this is 80 eps, on the other paths eps.

    Refuses times at which the data left out would be seen: 1.0 is pure noise on a flow, and half data on EDM.
    """
    a, s, _, _ = path.coefficients(torch.tensor(t, dtype=torch.float64))
    if t < path.t_max * (1 - 1e-6) and float(s) < 10 * float(a):
        raise UserError(
            f"t = {t:g} is not pure noise on {path}, where noise is only {float(s / a):.3g} times the data: "
            f"the first time of t_list must be t_max = {path.t_max:g} or near it"
        )
    return s.to(working_dtype(noise)).to(noise.device) * noise.to(working_dtype(noise))


def rollout(
    denoiser: Denoiser,
    x: Tensor,
    times: Times,
    cond: Condition,
    *,
    renoise: Renoise = "fresh",
    rng: Rng | None = None,
    num_calls: int | None = None,
    with_grad: bool = False,
    cache: Cache | None = None,
) -> Prediction:
    """The student's prediction after its first `num_calls` calls (None: all of them).

    With `with_grad` the last of them carries gradients and no other does: DMD2's multi-step backward simulation.
    """
    grid = explicit(times, denoiser.path).to(x.device)
    num_calls = len(grid) if num_calls is None else num_calls
    if not 1 <= num_calls <= len(grid):
        raise UserError(f"num_calls must be 1 .. {len(grid)}, the length of times, but is {num_calls}")
    x = x.to(working_dtype(x))
    first, start_scale = x, denoiser.path.coefficients(grid[0])[1].to(x.dtype)
    for i in range(num_calls):
        last = i == num_calls - 1
        with torch.set_grad_enabled(with_grad and last):
            if renoise == "map":
                cond = replace(cond, end=(grid[i + 1] if i + 1 < len(grid) else torch.zeros_like(grid[i])).expand(x.shape[0]))
            answer = denoiser(x, grid[i].expand(x.shape[0]), cond, cache=cache)
        if last:
            return answer
        if renoise == "fresh":
            if rng is None:
                raise UserError("renoise 'fresh' draws new noise between two calls and needs an rng")
            noise = rng.normal_like(x)
        else:
            noise = first / start_scale if renoise == "same" else answer.eps
        x = denoiser.path.add_noise(answer.x0, noise, grid[i + 1].expand(x.shape[0]))
    raise AssertionError("num_calls is at least 1")


@torch.no_grad()
def few_step(
    denoiser: Denoiser, x: Tensor, times: Times, cond: Condition, *, renoise: Renoise = "fresh", rng: Rng | None = None
) -> Tensor:
    """x0 of a student asked at each of `times`, descending, without the final 0; x is the state at times[0]."""
    return rollout(denoiser, x, times, cond, renoise=renoise, rng=rng).x0
