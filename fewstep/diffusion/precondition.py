"""Preconditioning: scales around a raw network that give its input and target unit variance at every noise level.

Karras et al. 2022, arXiv:2206.00364, table 1 and eq. 7: x0 = c_skip x + c_out F(c_in x, c_noise), on the EDM path.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewstep.diffusion.path import spread


class Preconditioning(NamedTuple):
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The four coefficients at `sigma`, float64. c_noise is ln(sigma)/4, so sigma = 0 must not reach a network."""
    sigma = sigma.double()
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


def with_noise(x0: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """x0 + sigma noise at the spread of the data again: sigma_d c_in times the state.

    Cosmos 1 corrupts the frames that it is conditioned on in this way. sigma: one for each row.
    """
    scale = spread(sigma_data * edm_preconditioning(sigma, sigma_data).c_in, x0).to(x0.dtype)
    return scale * (x0 + spread(sigma, x0).to(x0.dtype) * noise)


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2, with which the x0 error becomes the raw network's error.

    Written as 1/sigma_d^2 + 1/sigma^2, it is finite at pure noise (sigma infinite) too.
    """
    return sigma_data**-2 + sigma.double() ** -2
