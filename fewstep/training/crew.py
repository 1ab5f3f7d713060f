"""The networks of a run, on their device, and those of them that are trained.

The loop, the memory plan and the tests assemble a run here; an ability that changes what is in memory is added in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fewstep.methods.contract import Turn
from fewstep.networks.contract import Network
from fewstep.networks.frozen import Offloaded, round_frozen
from fewstep.networks.grid import Grid
from fewstep.networks.lora import Shared
from fewstep.networks.roles import FROZEN, Whole, wholes
from fewstep.networks.saved import SavedOnHost
from fewstep.parallel import COMPUTE, World, has_unreduced, place, reduce_over_replicas
from fewstep.training.errors import TrainingError
from fewstep.training.role import TrainedRole
from fewstep.training.run import Run

FROZEN_GRID: Mapping[str, Grid] = {"8bit": "int8", "float8": "float8"}


@dataclass(frozen=True)
class Crew:
    """networks: all of the method's roles. trained: those with an optimiser. modules: what was placed, each once."""

    networks: Mapping[str, Network]
    trained: Mapping[str, TrainedRole]
    modules: tuple[Whole, ...]

    @property
    def student(self) -> TrainedRole:
        return self.trained["student"]

    @property
    def teacher(self) -> Network | None:
        return self.networks.get("teacher")

    @property
    def critic(self) -> Network | None:
        return self.networks.get("critic")

    def reduce_over_replicas(self, now: bool) -> None:
        """Whether the next backwards sum gradients over replicas, which only the last micro-batch needs to do."""
        for whole in self.modules:
            if whole.waits and (whole.trained or whole.adapters):
                reduce_over_replicas(whole.module, now)

    def refuse_unreduced(self, turn: Turn) -> None:
        """Raises TrainingError where a micro-batch left gradients that the last one did not sum over replicas."""
        for whole in self.modules:
            if whole.waits and (whole.trained or whole.adapters) and has_unreduced(whole.module):
                raise TrainingError(
                    f"{turn.label} turn: some blocks were trained by some micro-batches only, so that their gradients were not "
                    "summed over the replicas. Set trainer.grad_accum=1, or parallel.num_replicas=none"
                )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, as ROLE.PART.NAME; the very tensors, so that loading fills them in place."""
        return {f"{name}.{key}": tensor for name, role in self.trained.items() for key, tensor in role.state().items()}


def assemble(run: Run, networks: Mapping[str, Network], world: World) -> Crew:
    """Places `networks` on this process's device, whole or sharded, and gives the trained ones optimisers and averages."""
    networks = dict(networks)
    modules = tuple(wholes(networks))
    compute = COMPUTE[run.trainer.precision]
    recomputed = frozenset(run.trainer.recompute_roles)
    for whole in modules:
        place(
            whole.module,
            tuple(whole.blocks),
            world,
            mode=run.parallel.mode,
            compute=compute,
            trained=whole.trained,
            adapters=whole.adapters,
            remember=whole.remember,
            checkpointing=run.trainer.checkpointing and (not recomputed or bool(recomputed & whole.roles)),
            selective=run.trainer.recompute == "selective",
            compiled=run.trainer.compile,
        )
        if world.context is not None and whole.share_tokens is not None:
            whole.share_tokens(world.context)
    grid = FROZEN_GRID.get(run.trainer.frozen)
    if grid is not None:
        round_frozen((whole.module for whole in modules if not whole.trained), grid)
    teacher = networks.get("teacher")
    if run.trainer.offload_teacher and teacher is not None and not isinstance(teacher, Shared):
        networks["teacher"] = Offloaded(teacher, world.device)
    networks |= {role: SavedOnHost(networks[role], world.device) for role in run.trainer.offload_activations}
    trained = {
        name: TrainedRole(
            name,
            network,
            run.optim_of(name),
            run.ema if name == "student" else None,
            compute,
            run.networks.rounding_of(name),
        )
        for name, network in networks.items()
        if name not in FROZEN
    }
    return Crew(networks, trained, modules)
