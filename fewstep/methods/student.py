"""The sample on which distribution matching trains its student: a roll-out from pure noise, with gradient in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.diffusion import Denoiser, Rng, rollout, times
from fewstep.diffusion.rollout import Renoise, start
from fewstep.methods.contract import free_mask


def generate(
    student: Denoiser,
    batch: Batch,
    rng: Rng,
    t_list: Sequence[float],
    *,
    renoise: Renoise,
    exit_step: Literal["random", "last"],
    student_input: Literal["rollout", "data"] = "rollout",
    from_pairs: bool = False,
    with_grad: bool,
) -> Tensor:
    """The student's own x0 after some of its calls; given frames carry no gradient.

    student_input: "data" asks it once, at noised real data (one call is still from pure noise).
    from_pairs: start from the noise that the batch's x0 was made of.
    """
    assert batch.x0 is not None
    if student_input == "data" and len(t_list) > 1:
        t = times.Listed(tuple(t_list)).draw(rng, student.path).to(batch.x0.device)
        with torch.set_grad_enabled(with_grad):
            x_t = student.path.add_noise(batch.x0, rng.normal_like(batch.x0), t)
            sample = student(x_t, t, batch.cond).x0
    else:
        num_calls = len(t_list) if exit_step == "last" else 1 + rng.shared.integer(len(t_list))
        noise = batch.noise if from_pairs else rng.normal_like(batch.x0)
        assert noise is not None
        x = start(student.path, noise, t_list[0])
        sample = rollout(student, x, t_list, batch.cond, renoise=renoise, rng=rng, num_calls=num_calls, with_grad=with_grad).x0
    mask = free_mask(batch.cond, sample)
    return sample if mask is None or not with_grad else torch.where(mask.bool(), sample, sample.detach())


def check_times(t_list: Sequence[float]) -> Iterable[tuple[str, str]]:
    """Problems of the student's times."""
    if not t_list or list(t_list) != sorted(set(t_list), reverse=True) or min(t_list) <= 0:
        yield "t_list", f"must descend and stay above 0 (the final 0 is left out), but is {list(t_list)}"
