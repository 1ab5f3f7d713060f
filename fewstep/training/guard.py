"""Stops the run before the optimiser step if a loss term or a gradient is NaN or infinite.

This is where an iteration waits for the device, once: nothing else in it reads a number before the log line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.methods.contract import Turn
from fewstep.parallel import World
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.crew import Crew
from fewstep.training.errors import Diverged


def refuse_non_finite(
    norms: Mapping[str, Tensor],
    terms: Mapping[str, Tensor],
    crew: Crew,
    turn: Turn,
    step: int,
    world: World,
    checkpoints: Checkpoints,
) -> dict[str, float]:
    """The gradient norms, as numbers. Raises Diverged if a loss term or a gradient of this iteration is not finite on some
    rank."""
    values: list[float] = torch.stack([number.to(world.device) for number in (*norms.values(), *terms.values())]).tolist()
    sizes, losses = dict(zip(norms, values, strict=False)), dict(zip(terms, values[len(norms) :], strict=True))
    if not world.any(not all(map(math.isfinite, values)))[0]:
        return sizes
    problems = [f"loss term '{name}' is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if not problems:
        for name, size in sizes.items():
            if not math.isfinite(size):  # of all ranks together; the entries are problems where they are
                weights = crew.trained[name].non_finite_gradients() or ["another rank"]
                problems.append(f"the gradient of role '{name}' is {size}, first in {weights[0]}")
    where = " (rank {})" if world.size > 1 else ""
    messages = [text + where.format(rank) for rank, text in enumerate(world.gather("; ".join(problems))) if text]
    checkpoints.finish()
    raise Diverged(
        f"iteration {step}, {turn.label} turn, training {', '.join(norms)}: {'; '.join(messages)}. No weight was "
        f"changed by this iteration; the last checkpoint is {checkpoints.latest() or 'none'}. Look at the data of this "
        "iteration, or lower optim.lr"
    )
