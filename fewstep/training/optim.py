"""Optimiser and learning rate of a role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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

    def build(self, parameters: Iterable[Tensor]) -> AdamW | torch.optim.Optimizer:
        parameters = list(parameters)
        if self.states == "8bit":
            return self._with_8bit_states(parameters)
        return AdamW(parameters, self)

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
        lr: Any = torch.tensor(self.lr)  # a tensor, as below
        return AdamW8bit(parameters, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def lr_at(self, iteration: int, max_iter: int) -> float:
        """The learning rate of an iteration, counted in iterations of the run whoever's turn it is."""
        if iteration < self.warmup_iters:
            return self.lr * (iteration + 1) / self.warmup_iters
        progress = (iteration - self.warmup_iters) / max(max_iter - self.warmup_iters, 1)
        factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}[self.schedule]
        if self.schedule != "constant":
            factor = self.end_factor + (1 - self.end_factor) * factor
        return self.lr * factor


class AdamW:
    """The update of torch.optim.AdamW, by the function that it calls, with the parts of its interface that a role uses.

    torch's class imports torch's compiler when it is built, which takes longer than to import torch.
    """

    def __init__(self, parameters: list[Tensor], options: Optim):
        self.options = options
        self.defaults = {"fused": _can_fuse(parameters)}
        # The learning rate is a tensor: changing it never recompiles.
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, "lr": torch.tensor(options.lr)}]
        self.state: dict[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in parameters}
        # The numbers of steps lie in one tensor: to count with one call is faster than with one for each parameter.
        self._counts = torch.zeros(len(parameters), device=parameters[0].device if self.defaults["fused"] else "cpu")
        self._steps = dict(zip(parameters, self._counts.unbind(), strict=True))
        self._stepped: list[bool] = []  # which parameters took part in the last step, as numbers too, and their tensors
        self._taking_part = torch.zeros(0)
        self._tensors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters that have a gradient."""
        (group,) = self.param_groups
        stepped = [parameter.grad is not None for parameter in group["params"]]
        if stepped != self._stepped:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state_of(parameter) for parameter in parameters]
            averages, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            self._stepped, self._tensors = stepped, (parameters, averages, squares, steps)
            self._taking_part = torch.tensor(stepped, dtype=torch.float32)
        parameters, averages, squares, steps = self._tensors
        gradients = [cast("Tensor", parameter.grad) for parameter in parameters]
        options = self.options
        settings: dict[str, Any] = {
            "amsgrad": False, "beta1": options.betas[0], "beta2": options.betas[1], "lr": group["lr"],
            "weight_decay": options.weight_decay, "eps": options.eps, "maximize": False,
        }  # fmt: skip
        if self.defaults["fused"] and parameters and parameters[0].device.type == "cpu":
            # What `adamw` does after it has sorted the tensors by device and type: here all are alike.
            self._counts.add_(self._taking_part)
            torch._fused_adamw_(parameters, gradients, averages, squares, [], steps, **settings)
        else:
            adamw(parameters, gradients, averages, squares, [], steps, fused=self.defaults["fused"], **settings)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The number of its steps and its two moments, made as zeros where there was no step yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = self._steps[parameter]
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _can_fuse(parameters: list[Tensor]) -> bool:
    return all(not is_sharded(p) or p.device.type == "cuda" for p in parameters)


def state_of(optimizer: AdamW | torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, made (as zeros) where no step was taken yet, so that it can be loaded into."""
    out: dict[str, Tensor] = {}
    for name, parameter in names.items():
        state: Any  # tensors, or torchao's subclass of them
        if isinstance(optimizer, AdamW):
            state = optimizer.state_of(parameter)
        else:
            state = optimizer.state[parameter]
            blocks: Any = getattr(optimizer, "_new_buffer")  # noqa: B009  # torchao's: makes its states at the first step
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = blocks(parameter, True), blocks(parameter, False)
        for key, value in state.items():
            if hasattr(value, "codes"):  # eight bits: the codes and the scale of each block; their table is a constant
                out[f"{name}.{key}.codes"], out[f"{name}.{key}.scale"] = value.codes, value.scale
            else:
                out[f"{name}.{key}"] = value
    return out
