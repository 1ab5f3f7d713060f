"""Which scheduler of diffusers takes a student's steps, with no argument but their number.

Every candidate is built for the number of steps, and its noise levels are compared with the student's.

    ode     DDIM, which on a flow is an Euler step: FlowMatchEulerDiscreteScheduler, DDIMScheduler, EDMEulerScheduler
    fresh   x0, then new noise: FlowMatchLCMScheduler, LCMScheduler
    same    none takes the first noise again
    map     any number of jumps: FlowMapEulerDiscreteScheduler

On a flow its words are `shift` and `shift_terminal`: the grid's last time is met by the second, the one after the first by
solving for the first. That meets every grid of the form s u / (1 + (s - 1) u), u = 1 .. 1/n, which students are trained on.
Pipelines that send u to their scheduler (Scheduling.sends_sigmas) need the plain shift s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewstep.diffusion import EDM, VP, Path, RectifiedFlow, StudentSampler
from fewstep.diffusion.path import floats
from fewstep.diffusion.times import converted, explicit
from fewstep.networks.contract import Scheduling

PLAIN = Scheduling()
CLOSE = 2e-6  # of a noise level, relative: diffusers keeps them in float32
ROUNDED = 1.001e-3  # of a flow time: times written with three digits, and FastGen's 0.999 for 1


@dataclass(frozen=True)
class Fit:
    """A scheduler that takes a student's steps."""

    scheduler: Any  # diffusers' schedulers have no useful type
    offset: float = 0.0  # how far its times are from the student's, at most; 0: the rounding of float32


def scheduler_of(sampler: StudentSampler, network_path: Path, scheduling: Scheduling = PLAIN) -> Fit | None:
    """A scheduler that takes the student's steps on the network's path; None if diffusers has none.

    On a flow its times may be rounded ones of the student's, by 1e-3.
    """
    num = len(sampler.times)
    if sampler.renoise == "map":
        return None if sampler.shift is None else _flow_map(sampler.shift)
    if sampler.renoise == "same" and num > 1:
        return None
    is_fresh = num > 1 and sampler.renoise == "fresh"
    if isinstance(network_path, RectifiedFlow):
        try:
            times = floats(converted(explicit(sampler.times), sampler.path, network_path))
        except ValueError:  # beyond the end of the flow
            return None
        name = "FlowMatchLCMScheduler" if is_fresh else "FlowMatchEulerDiscreteScheduler"
        return _flow(name, times, scheduling.sends_sigmas)
    if sampler.path != network_path:
        return None
    if isinstance(network_path, VP):
        return _vp(list(sampler.times), network_path, is_fresh, scheduling)
    if isinstance(network_path, EDM) and not is_fresh:
        return _edm(list(sampler.times), network_path.sigma_data)
    return None


def _flow(name: str, times: Sequence[float], sends_sigmas: bool) -> Fit | None:
    import diffusers
    import numpy as np

    cls, num = getattr(diffusers, name), len(times)
    words = {} if sends_sigmas or num == 1 else {"shift_terminal": times[-1]}

    def levels(shift: float) -> list[float]:
        scheduler = cls(shift=shift, **words)
        scheduler.set_timesteps(num, **({"sigmas": np.linspace(1.0, 1 / num, num)} if sends_sigmas else {}))
        return floats(scheduler.sigmas[:-1])

    low, high = 1.0, 1.0
    if num > (1 if sends_sigmas else 2):  # the second level grows with the shift
        low, high = 1e-3, 1e3
        for _ in range(80):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if levels(middle)[1] < times[1] else (low, middle)
    sigmas = levels(high)
    if _close(sigmas, times):
        return Fit(cls(shift=high, **words))
    offset = max(abs(a - b) for a, b in zip(sigmas, times, strict=True))
    return Fit(cls(shift=high, **words), offset) if offset <= ROUNDED else None


def _flow_map(shift: float) -> Fit:
    from diffusers import FlowMapEulerDiscreteScheduler

    return Fit(FlowMapEulerDiscreteScheduler(shift=shift))


def _edm(times: Sequence[float], sigma_data: float) -> Fit | None:
    from diffusers import EDMEulerScheduler

    last = times[-1] if len(times) > 1 else min(times[0], 0.002)
    scheduler = EDMEulerScheduler(sigma_max=times[0], sigma_min=last, sigma_data=sigma_data)
    scheduler.set_timesteps(len(times))
    return Fit(scheduler) if _close(floats(scheduler.sigmas[:-1]), times) else None


def _vp(times: Sequence[float], path: VP, is_fresh: bool, scheduling: Scheduling) -> Fit | None:
    """The DDPM family counts its table's entries: time t is entry 1000 t - 1."""
    import diffusers

    if path.schedule == "cosine":
        return None
    usual = (0.0001, 0.02) if path.schedule == "linear" else (0.00085, 0.012)
    words: dict[str, Any] = {
        "num_train_timesteps": path.num_steps,
        "beta_schedule": path.schedule,
        "beta_start": usual[0] if path.beta_start is None else path.beta_start,
        "beta_end": usual[1] if path.beta_end is None else path.beta_end,
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": "v_prediction" if scheduling.predicts == "v" else "epsilon",
    }
    num = len(times)
    if is_fresh and scheduling.shifts_table:
        return None
    if is_fresh:
        # It takes entries of a table of `original_inference_steps`, which it counts from its noisy end.
        scheduler: Any = diffusers.LCMScheduler(**words, original_inference_steps=num)
    elif scheduling.shifts_table:
        scheduler = diffusers.CogVideoXDDIMScheduler(**words, snr_shift_scale=path.snr_shift)
    else:
        scheduler = diffusers.DDIMScheduler(**words)
    if not scheduling.shifts_table and path.snr_shift != 1.0:
        return None
    scheduler.set_timesteps(num)
    return Fit(scheduler) if _close([(float(i) + 1) / path.num_steps for i in scheduler.timesteps], times) else None


def _close(levels: Sequence[float], targets: Sequence[float]) -> bool:
    pair = torch.tensor(levels, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    return len(levels) == len(targets) and bool(torch.allclose(*pair, rtol=CLOSE, atol=1e-7))
