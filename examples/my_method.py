"""A method of your own, in one file of your own, with a recipe that uses it:

    fewstep train --config examples/my_method.py experiment=my_reflow

Reflow (Liu et al. 2022, arXiv:2209.03003, section 2.2): flow matching not on independent data and noise but on pairs that a
teacher's ODE already joined. The paths between them hardly cross, so that few straight steps follow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fewstep.batch import Batch
from fewstep.config import kind, recipe
from fewstep.diffusion import Path, Prediction, Rng, StudentSampler, times
from fewstep.methods import Nets, Terms, Turn
from fewstep.methods.contract import Reduction, free_mask, reduced
from fewstep.recipes.analytic import analytic_kd
from fewstep.training.run import Run


@kind("reflow", group="method")
@dataclass(frozen=True)
class Reflow:
    """The five members of a method: roles, needs, turn, losses, sampler. Its fields are its hyper-parameters."""

    roles = ("student",)
    needs = frozenset({"x0", "noise"})

    num_steps: int = 2  # of the straight sampler afterwards
    reduction: Reduction = "mean"
    times: times.AnyTimes = times.Uniform()

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        assert batch.x0 is not None and batch.noise is not None
        t = self.times.draw(rng, nets.student.path)
        truth = Prediction.exact(batch.x0, batch.noise, t, nets.student.path)
        error = (nets.student(truth.x_t, t, batch.cond).velocity - truth.velocity) ** 2
        yield Terms.of(reflow=reduced(error, free_mask(batch.cond, error), self.reduction))

    def sampler(self, path: Path) -> StudentSampler:
        return StudentSampler(tuple(times.on_flow(self.num_steps, path).tolist()), path, renoise="ode")


@recipe("my_reflow")
def my_reflow() -> Run:
    """Reflow on pairs of the exact teacher, sampled in two straight steps."""
    run = analytic_kd()
    return replace(run, method=Reflow(), job=replace(run.job, project="examples", group="my", name="my_reflow"))
