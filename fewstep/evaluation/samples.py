"""Samples: a matrix with one row per clip, in float64, which is what every set score here is computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError

Samples = Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]


def as_samples(values: Samples, name: str, least: int = 2) -> Tensor:
    """`values` as an (n, d) float64 tensor on its own device; (n,) counts as d = 1. Refuses anything else by `name`."""
    tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.is_complex() or tensor.ndim not in (1, 2):
        raise UserError(f"{name} must be real numbers of shape (n, d), not {tensor.dtype} of shape {tuple(tensor.shape)}.")
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # mps has no float64
    tensor = tensor.to(torch.float64).reshape(len(tensor), -1)
    if len(tensor) < least or tensor.shape[1] == 0:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; this score needs at least {least} rows and one column.")
    bad = ~tensor.isfinite().all(dim=1)
    if bad.any():
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(tensor)} rows are not finite (the first is row {int(bad.nonzero()[0])}). "
            "Look at that clip and at the network that made its features."
        )
    return tensor


def as_pair(a: Samples, b: Samples, names: tuple[str, str], least: int = 2) -> tuple[Tensor, Tensor]:
    """Both as `as_samples` gives them, on the device of the first; refuses different numbers of columns."""
    first, second = as_samples(a, names[0], least), as_samples(b, names[1], least)
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"{names[0]} has {first.shape[1]} columns and {names[1]} has {second.shape[1]}. "
            "Make both with the same feature network."
        )
    return first, second.to(first.device)
