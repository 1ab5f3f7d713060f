"""Optimiser and learning rate of a role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.parallel import is_sharded


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip: float | None = 10.0  # largest gradient norm of the role; every role is clipped, not the student only. Transfer1 10
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up; the latter two end at end_factor
    warmup_iters: int = 0  # iterations of linear warm-up from 0
    end_factor: float = 0.0
    states: Literal["fp32", "8bit"] = "fp32"  # 8bit: of both moments, in blocks of 256 (needs torchao); weights stay fp32

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.lr <= 0:
            yield "lr", f"is {self.lr}: the run would go to its end and train nothing"
        if self.clip is not None and self.clip <= 0:
            yield "clip", f"must be above 0, or none for no clipping, not {self.clip}"
        if self.warmup_iters < 0:
            yield "warmup_iters", f"must not be negative, but is {self.warmup_iters}"

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        if self.states == "8bit":
            return self._with_8bit_states(parameters)
        return torch.optim.AdamW(
            parameters,
            lr=torch.tensor(self.lr),  # a tensor: changing it never recompiles, and it is saved like all state
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=_can_fuse(parameters),
        )

    def _with_8bit_states(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        try:
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            raise UserError(
                "optim.states=8bit needs torchao: pip install 'fewstep[eight-bit]', or set optim.states=fp32"
            ) from error
        if any(is_sharded(p) for p in parameters):
            raise UserError(
                "optim.states=8bit has no checkpoint that loads on another number of processes, so it does not go with "
                "parallel.mode=fsdp, where every process holds a part of the states anyway: set optim.states=fp32"
            )
        # a tensor, as below
        lr: Any = torch.tensor(self.lr)
        return AdamW8bit(parameters, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def lr_at(self, iteration: int, max_iter: int) -> float:
        """The learning rate of an iteration, counted in iterations of the run whoever's turn it is."""
        if iteration < self.warmup_iters:
            return self.lr * (iteration + 1) / self.warmup_iters
        done = (iteration - self.warmup_iters) / max(max_iter - self.warmup_iters, 1)
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[self.schedule]
        if self.schedule != "constant":
            factor = self.end_factor + (1 - self.end_factor) * factor
        return self.lr * factor


def _can_fuse(parameters: list[Tensor]) -> bool:
    return all(not is_sharded(p) or p.device.type == "cuda" for p in parameters)


def state_of(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, made (as zeros) where no step was taken yet, so that it can be loaded into."""
    out: dict[str, Tensor] = {}
    for name, parameter in names.items():
        state = optimizer.state[parameter]
        blocks: Any = getattr(optimizer, "_new_buffer", None)  # torchao's: what it makes its states with at the first step
        if not state and blocks is not None:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = blocks(parameter, True), blocks(parameter, False)
        elif not state:
            state["step"] = torch.zeros((), device=parameter.device if _is_fused(optimizer) else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for key, value in state.items():
            if hasattr(value, "codes"):  # eight bits: the codes and the scale of each block; their table is a constant
                out[f"{name}.{key}.codes"], out[f"{name}.{key}.scale"] = value.codes, value.scale
            else:
                out[f"{name}.{key}"] = value
    return out


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
