"""A trained role: its network, its fp32 weights, its optimiser, and for the student the moving average.

Weights, gradients that are summed, optimiser state and average are fp32 whatever the compute precision: at learning rate 1e-5 a
bf16 weight of size 0.02 would not move, because its last bit is worth 1e-4. With precision=bf16 the module holds a rounded copy
of the fp32 weights; under FSDP2 the sharded weights are fp32 and the gathered ones bf16.

With a grid (networks.student.rounding) the module holds the nearest weights of the grid, under FSDP2 a rounded shard: rows stay
whole. The gradient at the rounded weights is that of the fp32 ones (straight through: Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks.contract import Network
from fewstep.networks.grid import Grid, linear_weights, on_grid
from fewstep.parallel import World, average_gradients, is_sharded, kept_in_fp32, local
from fewstep.training import ema as averaging
from fewstep.training.ema import Ema
from fewstep.training.errors import TrainingError
from fewstep.training.optim import Optim, state_of


class TrainedRole:
    def __init__(
        self,
        name: str,
        network: Network,
        optim: Optim,
        average: Ema | None,
        compute: torch.dtype = torch.float32,
        grid: Grid | None = None,
    ):
        self.name, self.network, self.optim = name, network, optim
        module = network.module
        self.live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        # A weight that two parts of the network share is saved under both names: whoever reads them knows nothing of the other.
        first = {id(p): n for n, p in self.live.items()}
        every = module.named_parameters(remove_duplicate=False)
        self.shared = {n: first[id(p)] for n, p in every if id(p) in first and n != first[id(p)]}
        if not self.live:
            raise UserError(f"networks.{name}: not one of its weights is trainable")
        # One and the same tensor where compute is fp32, and where it is FSDP that gathers in `compute`. Otherwise the module
        # gets the rounded copy, and the original stays here as it was read.
        self.weights: dict[str, Tensor] = dict(self.live)
        shards = any(is_sharded(p) for p in self.live.values())
        self.rounds = grid is not None or (compute != torch.float32 and not shards)
        self.on_grid: dict[str, Grid] = {}  # what is rounded
        if grid is not None:
            linear = {id(weight) for weight in linear_weights(module)}
            self.on_grid = {n: grid for n, p in self.live.items() if id(p) in linear}
        if self.rounds:
            exact_names = kept_in_fp32(module)
            for n, live in self.live.items():
                weight = live.detach().float()
                self.weights[n] = nn.Parameter(weight.clone() if n in self.on_grid else weight)
                if not shards:
                    live.data = live.data.to(torch.float32 if n in exact_names else compute)
            self._round()
        self.optimizer = optim.build(self.weights.values())
        self.average_config = average if average is not None and average.profile != "none" else None
        self.average = {n: w.detach().clone() for n, w in self.weights.items()} if self.average_config else {}

    def take_turn(self, trains: bool) -> None:
        """Opens or closes the role's weights to gradients, and drops what other turns may have left in them."""
        for live, weight in zip(self.live.values(), self.weights.values(), strict=True):
            live.requires_grad_(trains)
            live.grad = weight.grad = None

    def absorb(self) -> None:
        """After a backward: the module's low-precision gradients are added to the fp32 ones."""
        if not self.rounds:
            return
        for live, weight in zip(self.live.values(), self.weights.values(), strict=True):
            if live.grad is not None:
                gradient = live.grad.float()
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                live.grad = None

    def gradient_norm(self, world: World) -> Tensor:
        """The norm of the mean gradient over all ranks and shards, before clipping."""
        average_gradients(self.weights.values(), world)
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        if not gradients:
            raise TrainingError(f"no loss term of this turn depends on role '{self.name}', which the turn is said to train")
        if is_sharded(gradients[0]):
            norm = nn.utils.get_total_norm(gradients)
            return norm.full_tensor() if is_sharded(norm) else norm
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def non_finite_gradients(self) -> list[str]:
        """The weights whose gradient, as far as this rank holds it, has an entry that is no number."""
        gradients = {n: w.grad for n, w in self.weights.items() if w.grad is not None}
        return [n for n, gradient in gradients.items() if not bool(torch.isfinite(local(gradient)).all())]

    @torch.no_grad()
    def step(self, lr: float, norm: float, updates: int) -> None:
        """Clipping, one optimiser step, then the average; `updates` counts the steps of this role before this one."""
        if self.optim.clip is not None and norm > self.optim.clip:
            nn.utils.clip_grads_with_norm_(self.weights.values(), self.optim.clip, torch.as_tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        self.optimizer.step()
        self._round()
        if self.average_config:
            averaging.update(self.average, self.weights, self.average_config.beta_at(updates))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network answers with its moving average (with its weights, where there is no average), as in use."""
        weights = {n: p.detach().clone() for n, p in self.live.items()} if self.average and not self.rounds else {}
        self.network.module.eval()
        try:
            self._write(self.average)
            yield
        finally:
            self._write(self.weights if self.rounds and self.average else weights)
            self.network.module.train()

    def state(self) -> dict[str, Tensor]:
        """Everything that must be saved, by name; the very tensors, so that loading fills them in place."""
        state = {f"weights.{n}": w for n, w in self._under_all_names(self.weights).items()}
        state |= {f"ema.{n}": a for n, a in self._under_all_names(self.average).items()}
        state |= {f"optim.{n}": s for n, s in state_of(self.optimizer, self.weights).items()}
        trained = self._under_all_names(self.weights)
        frozen = {n: p for n, p in self.network.module.state_dict(keep_vars=True).items() if n not in trained}
        return state | {f"buffers.{n}": b for n, b in frozen.items()}

    def _under_all_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {alias: values[name] for alias, name in self.shared.items() if name in values}

    def loaded(self) -> None:
        """To be called after `state()` was filled from a checkpoint."""
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        if self.rounds:
            self._write(self.weights)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        plain = [name for name in values if name not in self.on_grid]
        if plain:
            torch._foreach_copy_([local(self.live[name]) for name in plain], [local(values[name]) for name in plain])
        for name, grid in self.on_grid.items():
            if name in values:
                local(self.live[name]).copy_(on_grid(local(values[name]), grid))
