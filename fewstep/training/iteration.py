"""One iteration: gradients of the roles whose turn it is, their norms, and the step of each.

The loop trains with these functions, the memory plan measures them on tensors without contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fewstep.batch import Batch
from fewstep.diffusion import Rng
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.parallel import World, sum_over_processes
from fewstep.training.crew import Crew
from fewstep.training.run import Run


@dataclass(frozen=True)
class Part:
    """A micro-batch on its device, its random numbers, and the weight of its losses in the iteration's gradient."""

    batch: Batch
    rng: Rng
    weight: float


def gradients(run: Run, crew: Crew, turn: Turn, parts: Iterable[Part]) -> Iterator[Terms]:
    """Back-propagates the losses of `turn`, summed over `parts`, and yields each Terms after its backward.

    The turn's roles require gradients, all others none. Run the iterator to its end before `norms` or `step`.
    """
    for name, role in crew.trained.items():
        role.take_turn(name in turn.trains)
    num = run.trainer.grad_accum
    for micro, part in enumerate(parts):
        if num > 1:
            crew.reduce_over_replicas(micro + 1 == num)
        for terms in run.method.losses(
            turn, Nets(crew.networks, crew.student.averaged, sum_over_processes), part.batch, part.rng
        ):
            (terms.total * part.weight).backward()
            for name in turn.trains:
                crew.trained[name].absorb()
            yield terms
    if num > 1:
        crew.refuse_unreduced(turn)


def norms(crew: Crew, turn: Turn, world: World) -> dict[str, Tensor]:
    """The gradient norm of each role of the turn: of the mean over all processes, before clipping."""
    return {name: crew.trained[name].gradient_norm(world) for name in turn.trains}


def step(run: Run, crew: Crew, norms: Mapping[str, float], num_steps: int, num_updates: int) -> dict[str, float]:
    """Clips and steps each role in `norms`, updates the student's average, and returns each role's learning rate.

    num_steps: finished iterations of the run. num_updates: earlier steps of the student.
    """
    rates = {name: run.optim_of(name).lr_at(num_steps, run.trainer.max_iter) for name in norms}
    for name, norm in norms.items():
        crew.trained[name].step(rates[name], norm, num_updates)
    return rates
