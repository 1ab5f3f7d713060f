"""The look at all numbers of an iteration before any role steps: one that is none would be in every weight after it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.methods.contract import Turn
from fewstep.parallel import World
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.errors import TrainingError
from fewstep.training.role import TrainedRole


def refuse_non_finite(
    norms: Mapping[str, Tensor],
    terms: Mapping[str, Tensor],
    roles: Mapping[str, TrainedRole],
    turn: Turn,
    step: int,
    world: World,
    checkpoints: Checkpoints,
) -> None:
    """Nothing, where the terms and the gradient norms of this iteration are numbers on every rank; TrainingError otherwise."""
    numbers = torch.stack([number.double().to(world.device) for number in (*norms.values(), *terms.values())])
    if not world.any(not bool(torch.isfinite(numbers).all()))[0]:
        return
    found = [f"loss term '{name}' is {float(value)}" for name, value in terms.items() if not bool(torch.isfinite(value))]
    if not found:
        for name, norm in norms.items():
            if not bool(torch.isfinite(norm)):  # of all ranks together; the entries are found where they are
                places = roles[name].non_finite_gradients() or ["another rank"]
                found.append(f"the gradient of role '{name}' is {float(norm)}, first in {places[0]}")
    where = " (rank {})" if world.size > 1 else ""
    said = [text + where.format(rank) for rank, text in enumerate(world.gather("; ".join(found))) if text]
    checkpoints.finish()
    raise TrainingError(
        f"iteration {step}, {turn.name} turn, training {', '.join(norms)}: {'; '.join(said)}. No weight was "
        f"changed by this iteration; the last checkpoint is {checkpoints.latest() or 'none'}. Look at the data of this "
        "iteration, or lower optim.lr"
    )
