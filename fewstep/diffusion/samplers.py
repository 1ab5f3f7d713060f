"""Samplers of the probability-flow ODE: (denoiser, x, times, cond) -> x0.

x is the state at times[0]; times descend, without the final 0 (times.py). Every sampler calls the network once per time (Heun
twice, but for the last) and ends with the x0 of its last call: Transfer1's "final clean denoise". So the number of network
calls is len(times), and no step is wasted on a sliver of noise.

The exponential integrators work in lambda = ln(a / s), half the log signal-to-noise ratio, but only e^-h = (s_t a_s)/(a_t s_s)
is ever formed, which is 0 at pure noise (a_s = 0): they start at t_max of every path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.path import Path, floats, working_dtype
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rollout import few_step as few_step
from fewstep.errors import UserError

OnState = Callable[[float, Tensor], None]


class Solver(Protocol):
    def __call__(
        self, denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, on_state: OnState | None = None
    ) -> Tensor: ...


def _predict(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
    return denoiser(x, t.to(x.device).expand(x.shape[0]), cond)


def euler(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, on_state: OnState | None = None) -> Tensor:
    """Order 1, straight steps in the path's own time."""
    x = x.to(working_dtype(x))
    for t, t_next in pairwise(times):
        _report(on_state, t, x)
        x = x + (t_next - t).to(x.dtype).to(x.device) * _predict(denoiser, x, t, cond).velocity
    _report(on_state, times[-1], x)
    return _predict(denoiser, x, times[-1], cond).x0


def heun(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, on_state: OnState | None = None) -> Tensor:
    """Order 2, Karras et al. 2022, algorithm 1 without churn: two calls a step, one for the last."""
    x = x.to(working_dtype(x))
    for t, t_next in pairwise(times):
        _report(on_state, t, x)
        step = (t_next - t).to(x.dtype).to(x.device)
        first = _predict(denoiser, x, t, cond).velocity
        second = _predict(denoiser, x + step * first, t_next, cond).velocity
        x = x + step * (first + second) / 2
    _report(on_state, times[-1], x)
    return _predict(denoiser, x, times[-1], cond).x0


def dpmpp_2m(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, on_state: OnState | None = None) -> Tensor:
    """Order 2 multistep in x0, Lu et al. 2022, arXiv:2211.01095, algorithm 2; the first step is of order 1."""

    def guess(steps: _Exponential, i: int, x0: Tensor, last: Tensor) -> Tensor:
        # 1 / (2 r) with r = h_last / h: 0 when the last step came from pure noise, an infinite h.
        lean = float(steps.h[i] / steps.h[i - 1]) / 2
        return (1 + lean) * x0 - lean * last

    return _two_points(denoiser, x, times, cond, guess, on_state)


def res_2ab(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, on_state: OnState | None = None) -> Tensor:
    """Order 2 multistep, the exponential Adams-Bashforth form of Cosmos 1 ("2ab"), with its final clean denoise.

    x_t = e^-h x_s + h (b1 x0_s + b2 x0_1) in the EDM scaling; phi1(z) = (e^z - 1)/z, phi2(z) = (phi1(z) - 1)/z at z = -h.
    """

    def guess(steps: _Exponential, i: int, x0: Tensor, last: Tensor) -> Tensor:
        h = steps.h[i]
        h_phi1 = -torch.expm1(-h)
        h_b2 = torch.zeros_like(h)
        if bool(torch.isfinite(steps.h[i - 1])):
            c2 = -steps.h[i - 1] / h
            phi2 = (h_phi1 / h - 1) / -h
            h_b2 = h * phi2 / c2
        h_b1 = h_phi1 - h_b2
        return ((h_b1 / h_phi1) * x0 + (h_b2 / h_phi1) * last).to(x0.dtype)

    return _two_points(denoiser, x, times, cond, guess, on_state)


def _two_points(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    cond: Condition,
    guess: Callable[[_Exponential, int, Tensor, Tensor], Tensor],
    on_state: OnState | None,
) -> Tensor:
    """Exponential steps towards what `guess` makes of the newest x0 and the one before; the first is towards its x0 alone."""
    x = x.to(working_dtype(x))
    steps = _Exponential(denoiser.path, times, x)
    last: Tensor | None = None
    for i in range(len(times) - 1):
        _report(on_state, times[i], x)
        x0 = _predict(denoiser, x, times[i], cond).x0
        x = steps.shrink[i] * x + steps.gain[i] * (x0 if last is None else guess(steps, i, x0, last))
        last = x0
    _report(on_state, times[-1], x)
    return _predict(denoiser, x, times[-1], cond).x0


def unipc(
    denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, *, order: int = 2, on_state: OnState | None = None
) -> Tensor:
    """Predictor-corrector of order 2 or 3 at one call a step: UniPC with B(h) = e^h - 1 ("bh2"), x0 form.

    Zhao et al. 2023, arXiv:2302.04867, eq. 3 and 9. The corrector reuses the call made at the step's new time.
    """
    x = x.to(working_dtype(x))
    steps = _Exponential(denoiser.path, times, x)
    history: list[tuple[int, Tensor]] = []  # (index in the grid, x0), newest last
    before = x
    for i in range(len(times)):
        x0 = _predict(denoiser, x, times[i], cond).x0
        if i > 0:  # correct x with the x0 just predicted at its end; the corrected state keeps this x0
            x = steps.multistep(i - 1, before, history[-order:], end=x0)
        _report(on_state, times[i], x)
        if i == len(times) - 1:
            return x0
        history = [*history, (i, x0)][-order:]
        before = x
        x = steps.multistep(i, x, history[-order:], end=None)
    raise AssertionError("times is never empty")


class _Exponential:
    """Per step of a grid: h = lambda_next - lambda, and x_next = shrink x + gain x0 for a constant x0."""

    def __init__(self, path: Path, times: Tensor, like: Tensor):
        a, s, _, _ = path.coefficients(times.double().cpu())
        decay = (s[1:] * a[:-1]) / (a[1:] * s[:-1])  # e^-h
        self.h = -torch.log(decay)  # inf for a step from pure noise
        self.lam = torch.log(a / s)
        self.shrink = (s[1:] / s[:-1]).to(like.dtype).to(like.device)
        self.gain = (a[1:] * (1 - decay)).to(like.dtype).to(like.device)

    def multistep(self, i: int, x: Tensor, history: Sequence[tuple[int, Tensor]], end: Tensor | None) -> Tensor:
        """The state after step i from earlier x0 (predictor) and, with `end`, from the x0 at its end (corrector)."""
        last, x0 = history[-1]
        assert last == i, (last, i)
        h = self.h[i]
        out = self.shrink[i] * x + self.gain[i] * x0
        if bool(torch.isinf(h)):
            return out if end is None else self.shrink[i] * x + self.gain[i] * end
        points = [(float((self.lam[j] - self.lam[i]) / h), value) for j, value in history[:-1]]
        points = [(r, value) for r, value in reversed(points) if r > float("-inf")]
        if end is not None:
            points.append((1.0, end))
        if not points:
            return out
        # D_k = (x0_k - x0) / r_k; the weights solve sum_k r_k^(n-1) rho_k = b_n (UniPC, theorem 3.1, with z = -h).
        r = torch.tensor([r for r, _ in points], dtype=torch.float64)
        z, factorial = -h, 1.0
        b_h = torch.expm1(z)
        phi, b = b_h / z - 1, list[Tensor]()
        for n in range(1, len(points) + 1):
            factorial *= n
            b.append(phi * factorial / b_h)
            phi = phi / z - 1 / (factorial * (n + 1))
        system = torch.stack([r**n for n in range(len(points))])
        if len(points) == 1:
            rho = [0.5]  # the paper's simplification at order 2
        else:
            solution = cast(Tensor, torch.linalg.solve(system, torch.stack(b)))  # pyright: ignore[reportUnknownMemberType]  # torch
            rho = floats(solution)
        for weight, (ratio, value) in zip(rho, points, strict=True):
            out = out + self.gain[i] * (weight / ratio) * (value - x0)
        return out


def _report(on_state: OnState | None, t: Tensor, x: Tensor) -> None:
    if on_state is not None:
        on_state(float(t), x)


# --- trajectories -----------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    x0: Tensor
    times: Tensor  # (K,), those of `at`
    states: Tensor  # B K ...


def trajectory(solver: Solver, denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, at: Tensor) -> Trajectory:
    """x0 and the solver's states at exactly the times `at`.

    Each of these times replaces its nearest inner neighbour in the solver's grid, so that the number of calls stays the same.
    The state at the first solver time below a target would be paired with a time that is not its own.
    """
    grid = with_targets(times, at)
    targets = floats(at)
    states: dict[float, Tensor] = {}

    def store(t: float, state: Tensor) -> None:
        if t in targets:
            states[t] = state

    x0 = solver(denoiser, x, grid, cond, on_state=store)
    return Trajectory(x0, at.double(), torch.stack([states[t] for t in targets], dim=1))


def with_targets(times: Tensor, at: Tensor) -> Tensor:
    """`times` with every time of `at` in it: both ends stay, and each new time replaces an inner neighbour if there is one."""
    grid, targets = floats(times), floats(at)
    if max(targets) > grid[0] or min(targets) <= 0:
        raise UserError(f"the times to keep, {targets}, must lie between the first time of the grid, {grid[0]}, and 0")
    inner = [t for t in grid[1:-1] if t not in targets]
    for target in targets:
        if inner and target not in grid:
            inner.remove(min(inner, key=lambda t: abs(t - target)))
    return torch.tensor(sorted({grid[0], grid[-1], *inner, *targets}, reverse=True), dtype=torch.float64)
