"""A trained role: its network, its fp32 weights, its optimiser, and for the student the moving average.

Weights, gradients that are summed, optimiser state and average are fp32 whatever the compute precision: at learning rate 1e-5 a
bf16 weight of size 0.02 would not move, because its last bit is worth 1e-4. With precision=bf16 the module holds a rounded copy
of the fp32 weights; under FSDP2 the sharded weights are fp32 and the gathered ones bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.networks.contract import Network
from fewstep.parallel import World, average_gradients
from fewstep.training import ema as averaging
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim, state_of


class TrainedRole:
    def __init__(self, name: str, network: Network, optim: Optim, average: Ema | None):
        self.name, self.network, self.optim = name, network, optim
        module = network.module
        self.live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.live:
            raise ValueError(f"networks.{name}: not one of its weights is trainable")
        # One and the same tensor where compute is fp32; an fp32 original of the module's rounded copy otherwise.
        self.weights: dict[str, Tensor] = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self.live.items()
        }
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
        for live, weight in zip(self.live.values(), self.weights.values(), strict=True):
            if live is not weight and live.grad is not None:
                gradient = live.grad.float()
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                live.grad = None

    def clipped_norm(self, world: World) -> Tensor:
        """The gradient norm before clipping, over all ranks and shards; the gradients are clipped to `optim.clip`."""
        average_gradients(self.weights.values(), world)
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.optim.clip is not None:
            nn.utils.clip_grads_with_norm_(self.weights.values(), self.optim.clip, norm)
        return norm

    @torch.no_grad()
    def step(self, lr: float, updates: int) -> None:
        """One optimiser step, then the average; `updates` counts the steps of this role before this one."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)
        self.optimizer.step()
        self._round()
        if self.average_config:
            averaging.update(self.average, self.weights, self.average_config.beta_at(updates))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network answers with its moving average (with its weights, where there is no average)."""
        if not self.average:
            yield
            return
        kept = {n: p.detach().clone() for n, p in self.live.items()}
        try:
            self._write(self.average)
            yield
        finally:
            self._write(kept)

    def state(self) -> dict[str, Tensor]:
        """Everything that must be saved, by name; the very tensors, so that loading fills them in place."""
        state = {f"weights.{n}": w for n, w in self.weights.items()}
        state |= {f"ema.{n}": a for n, a in self.average.items()}
        state |= {f"optim.{n}": s for n, s in state_of(self.optimizer, self.weights).items()}
        frozen = {n: p for n, p in self.network.module.state_dict(keep_vars=True).items() if n not in self.weights}
        return state | {f"buffers.{n}": b for n, b in frozen.items()}

    def loaded(self) -> None:
        """To be called after `state()` was filled from a checkpoint."""
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        if any(live is not weight for live, weight in zip(self.live.values(), self.weights.values(), strict=True)):
            torch._foreach_copy_(list(self.live.values()), list(self.weights.values()))

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, live in self.live.items():
            live.copy_(values[name])
