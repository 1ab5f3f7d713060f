"""EDM's preconditioning: the reference's numbers, unit variances, and an exact network behind it."""

import math

import torch

from fewstep.batch import Condition
from fewstep.diffusion import EDM
from fewstep.diffusion.precondition import edm_preconditioning, edm_weight
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
SIGMA = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=F64)


def test_by_hand():
    """sigma_d = 0.5 and sigma = 0.5: half of the variance is data. sigma = 80: nearly all is noise."""
    c = edm_preconditioning(torch.tensor([0.5, 80.0]), 0.5)
    total = 6400.25
    torch.testing.assert_close(c.c_skip, torch.tensor([0.5, 0.25 / total], dtype=F64))
    torch.testing.assert_close(c.c_out, torch.tensor([0.25 / math.sqrt(0.5), 40 / math.sqrt(total)], dtype=F64))
    torch.testing.assert_close(c.c_in, torch.tensor([math.sqrt(2), 1 / math.sqrt(total)], dtype=F64))
    torch.testing.assert_close(c.c_noise, torch.tensor([math.log(0.5) / 4, math.log(80.0) / 4], dtype=F64))
    torch.testing.assert_close(edm_weight(torch.tensor([0.5]), 0.5), torch.tensor([8.0], dtype=F64))


def test_input_and_target_have_unit_variance():
    """Karras et al., appendix B.6: x0 ~ N(0, sigma_d^2), F* = (x0 - c_skip x) / c_out; c_skip makes c_out least."""
    for sigma_data in (0.5, 1.0, 2.0):
        c = edm_preconditioning(SIGMA, sigma_data)
        one = torch.ones_like(SIGMA)
        torch.testing.assert_close(c.c_in**2 * (sigma_data**2 + SIGMA**2), one)
        target = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * SIGMA**2) / c.c_out**2
        torch.testing.assert_close(target, one)
        torch.testing.assert_close(edm_weight(SIGMA, sigma_data) * c.c_out**2, one)
        for nudge in (-1e-3, 1e-3):
            other = (1 - c.c_skip - nudge) ** 2 * sigma_data**2 + (c.c_skip + nudge) ** 2 * SIGMA**2
            assert bool((other > c.c_out**2).all())


def test_under_trigflow_it_is_what_cosmos_writes():
    """cosmos.md 2.1: c_in 1, c_skip sigma_d cos t, c_out sigma_d sin t, c_noise ln(sigma_d tan t)/4."""
    t, sigma_data = torch.tensor([0.1, 0.8, 1.5], dtype=F64), 0.5
    c = edm_preconditioning(sigma_data * t.tan(), sigma_data)
    scale = sigma_data / t.cos()  # the EDM state is x0 + sigma eps, TrigFlow's is cos t x0 / sigma_d + sin t eps
    torch.testing.assert_close(c.c_in * scale, torch.ones_like(t))
    torch.testing.assert_close(c.c_skip * scale, sigma_data * t.cos())
    torch.testing.assert_close(c.c_out, sigma_data * t.sin())
    torch.testing.assert_close(c.c_noise, (sigma_data * t.tan()).log() / 4)


def test_an_exact_network_behind_it_gives_x0():
    """Data N(0, sigma_d^2) makes the raw target's mean 0 everywhere; any other data is recovered through F."""
    x_t = torch.randn(len(SIGMA), 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * (1 + SIGMA[:, None])
    c = edm_preconditioning(SIGMA, 0.5)
    plain = GaussianMixture([[0.0, 0.0, 0.0]], [0.5], path=EDM(0.5))(x_t, SIGMA, Condition()).x0
    torch.testing.assert_close(c.c_skip[:, None] * x_t, plain, rtol=1e-10, atol=1e-10)

    mean, std = torch.tensor([1.0, -0.5, 0.2], dtype=F64), 0.3
    net = GaussianMixture(mean[None], [std], path=EDM(0.5))

    def raw(y, c_noise):  # the network sees c_in x and ln(sigma)/4 only
        sigma = (4 * c_noise).exp()[:, None]
        x = y * (sigma**2 + 0.25).sqrt()
        x0 = (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
        return (x0 * (sigma**2 + 0.25) - 0.25 * x) / (0.5 * sigma * (sigma**2 + 0.25).sqrt())

    x0 = c.c_skip[:, None] * x_t + c.c_out[:, None] * raw(c.c_in[:, None] * x_t, c.c_noise)
    torch.testing.assert_close(x0, net(x_t, SIGMA, Condition()).x0, rtol=1e-10, atol=1e-10)
