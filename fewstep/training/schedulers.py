"""Which scheduler of diffusers takes a student's steps, with no argument but their number.

Nothing is believed: each candidate is made, told the number of steps, and its noise levels are compared with the student's.

    ode     DDIM on a flow is an Euler step: FlowMatchEulerDiscreteScheduler; on EDM: EDMEulerScheduler
    fresh   x0, then new noise: FlowMatchLCMScheduler
    same    none takes the first noise again

On a flow its words are `shift` and `shift_terminal`: the grid's last time is met by the second, the one after the first by
solving for the first. That meets every grid of the form s u / (1 + (s - 1) u), u = 1 .. 1/n, which students are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fewstep.diffusion import EDM, Path, RectifiedFlow, StudentSampler
from fewstep.diffusion.path import floats
from fewstep.diffusion.times import converted, explicit

CLOSE = 2e-6  # of a noise level, relative: diffusers keeps them in float32


def scheduler_of(sampler: StudentSampler, network_path: Path) -> Any | None:  # Any: diffusers' schedulers have no useful type
    """A scheduler that takes exactly the student's steps on the network's path; None if diffusers has none."""
    num = len(sampler.times)
    if isinstance(network_path, RectifiedFlow):
        try:
            times = floats(converted(explicit(sampler.times), sampler.path, network_path))
        except ValueError:  # beyond the end of the flow
            return None
        if num == 1 or sampler.renoise == "ode":
            return _flow("FlowMatchEulerDiscreteScheduler", times)
        return _flow("FlowMatchLCMScheduler", times) if sampler.renoise == "fresh" else None
    if isinstance(network_path, EDM) and sampler.path == network_path and (num == 1 or sampler.renoise == "ode"):
        return _edm(list(sampler.times), network_path.sigma_data)
    return None


def _flow(name: str, times: Sequence[float]) -> Any | None:
    import diffusers

    cls = getattr(diffusers, name)
    terminal = times[-1] if len(times) > 1 else None

    def levels(shift: float) -> list[float]:
        made = cls(shift=shift, shift_terminal=terminal)
        made.set_timesteps(len(times))
        return floats(made.sigmas[:-1])

    low, high = 1.0, 1.0
    if len(times) > 2:  # the second level grows with the shift
        low, high = 1e-3, 1e3
        for _ in range(80):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if levels(middle)[1] < times[1] else (low, middle)
    return cls(shift=high, shift_terminal=terminal) if _close(levels(high), times) else None


def _edm(times: Sequence[float], sigma_data: float) -> Any | None:
    from diffusers import EDMEulerScheduler

    made = EDMEulerScheduler(sigma_max=times[0], sigma_min=min(times[-1], 0.002), sigma_data=sigma_data)
    if len(times) > 1:
        made = EDMEulerScheduler(sigma_max=times[0], sigma_min=times[-1], sigma_data=sigma_data)
    made.set_timesteps(len(times))
    return made if _close(floats(made.sigmas[:-1]), times) else None


def _close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    pair = torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return len(found) == len(wanted) and bool(torch.allclose(*pair, rtol=CLOSE, atol=1e-7))
