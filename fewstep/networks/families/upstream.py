"""What the adapters of diffusers classes share: precision of inputs, pictures as clips of one frame, required conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fewstep.batch import Condition
from fewstep.diffusion import Path, Prediction, RectifiedFlow
from fewstep.diffusion.prediction import coefficients_for
from fewstep.errors import UserError
from fewstep.networks.contract import NetworkDefaults

_M = TypeVar("_M", bound=nn.Module)


class Adapter(NetworkDefaults):
    """A network whose `module` is one class of diffusers."""

    module: nn.Module
    part: ClassVar[str] = "transformer"  # what pipelines call it
    blocks_part: ClassVar[str] = "transformer_blocks"  # and what it calls its blocks

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return tuple(getattr(self.module, self.blocks_part))

    def parts(self) -> dict[str, Any]:
        return {self.part: self.module}


class FlowAdapter(Adapter):
    """One whose path is the rectified flow."""

    @property
    def path(self) -> Path:
        return RectifiedFlow()


EXACT = ("timestep", "guidance", "added_cond_kwargs", "image_rotary_emb")


def enters_in_compute_dtype(module: _M, weight: Callable[[_M], Tensor], exact: Sequence[str] = EXACT) -> _M:
    """`module`, whose tensor arguments but those in `exact` come in the type that `weight` has at that moment.

    Only inside the call are the weights those of compute: under FSDP they are sharded fp32 before and gathered bf16 in it.
    A time in bf16 would be another time: 0.999 becomes 1.
    """

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype = weight(module).dtype
        return args, {name: value if name in exact else _cast(value, dtype) for name, value in kwargs.items()}

    module.register_forward_pre_hook(enter, with_kwargs=True)
    return module


def _cast(value: Any, dtype: torch.dtype) -> Any:  # Any: a tensor, several, or a plain argument
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(part, dtype) for part in value) if isinstance(value, tuple) else value


def needed(cond: Condition, field: str, network: str, what: str) -> Tensor:
    """The field of the condition, which this network cannot do without."""
    value = getattr(cond, field)
    if value is None:
        hint = ". Embed captions (fewstep prepare text; --prompt TEXT gives one to all), and set data.text=t5_xxl"
        raise UserError(f"{network} reads {what} from cond.{field}, and the batch has none{hint if field == 'text' else ''}")
    return value


def zero_padded(text: Tensor, mask: Tensor | None) -> Tensor:
    """The text with zeros where no token is: for networks that attend to their padding, and were trained with zeros there."""
    return text if mask is None else torch.where(mask.bool()[..., None], text, 0.0)


def as_picture(x: Tensor, t: Tensor, network: str) -> tuple[Tensor, Tensor]:
    """x as B C H W and t as (B,), from a picture or a clip of one frame."""
    if x.ndim == 5 and x.shape[2] == 1:
        return x[:, :, 0], t[:, 0] if t.ndim == 2 else t
    if x.ndim == 4 and t.ndim == 1:
        return x, t
    raise UserError(f"{network} makes pictures, B C H W or B C 1 H W, but was given {tuple(x.shape)} at times {tuple(t.shape)}")


def one_time(t: Tensor, network: str) -> Tensor:
    """t as (B,), for networks that receive one time for a whole clip."""
    if t.ndim == 1:
        return t
    if not isinstance(t, FakeTensor) and bool((t != t[:, :1]).any()):  # fakes, on which memory is planned, hold no numbers
        raise UserError(f"{network} receives one time for the whole clip, so its frames cannot carry noise levels of their own")
    return t[:, 0]


def of_v(v: Tensor, x_t: Tensor, t: Tensor, path: Path, features: tuple[Tensor, ...] = ()) -> Prediction:
    """The prediction whose v = a eps - s x0 (Salimans & Ho 2022, arXiv:2202.00512) is `v`, on a path with a^2 + s^2 = 1: there
    the velocity is v times the speed at which the angle grows, at both ends too."""
    _, _, da, ds = coefficients_for(path, t, x_t)
    return Prediction(x_t, t, path, torch.hypot(da, ds) * v, features)


def table_index(t: Tensor, num_steps: int = 1000) -> Tensor:
    """The timestep of a network trained on a DDPM table at time t of VP: entry i is at t = (i + 1) / num_steps. float32."""
    return (num_steps * t.double() - 1).clamp(min=0).float()


def refuse_given(cond: Condition, network: str) -> None:
    """Refuses given frames, for networks without an input that marks clean frames."""
    if cond.frame_mask is not None:
        raise UserError(f"{network} cannot be conditioned on given frames (cond.frame_mask): it has no input that marks them")


def refuse_context(cond: Condition) -> None:
    """Refuses what earlier chunks are to be attended to instead of, in a network that is called without causality."""
    if cond.context is not None:
        raise UserError("this network is not causal: it cannot attend to cond.context. networks.student.causal makes it so")
