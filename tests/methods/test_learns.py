"""KD and DMD2 on one Gaussian with a linear student: mean and spread are recovered within a stated bound."""

import pytest
import torch
from torch import nn

from fewstep.batch import Batch, Condition
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, TrigFlow, times
from fewstep.methods import DMD2, KD, Critic, Nets, StudentSample
from fewstep.networks.analytic import GaussianMixture

MEAN, STD = torch.tensor([1.0, -0.5]), torch.tensor([0.3, 0.8])
NONE = Condition()


class Linear:
    """x0 = W x_t / s(t) + b: all that a one-step student of a Gaussian needs."""

    def __init__(self, path):
        self.path, self.module = path, nn.Linear(2, 2)
        with torch.no_grad():
            self.module.weight.copy_(torch.eye(2) + 0.2)
            self.module.bias.zero_()

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        s = self.path.coefficients(t)[1][:, None].float()
        return Prediction.of("x0", self.module(x_t / s), x_t, t, self.path)


class Gaussian:
    """A critic that can be exact: E[x0 | x_t] of N(m, C) with m and the factor of C trained."""

    def __init__(self, path):
        self.path, self.module = path, nn.Linear(2, 2)
        with torch.no_grad():
            self.module.weight.copy_(torch.eye(2))
            self.module.bias.zero_()

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        a, s = (c[:, None].float() for c in self.path.coefficients(t)[:2])
        mean, factor = self.module.bias, self.module.weight
        cov = factor @ factor.T
        inverse = torch.linalg.inv(a[..., None] ** 2 * cov + s[..., None] ** 2 * torch.eye(2))
        x0 = mean + a * torch.einsum("ij,bjk,bk->bi", cov, inverse, x_t - a * mean)
        return Prediction.of("x0", x0, x_t, t, self.path)


def trained(method, networks, make_batch, optimizers, steps):
    for step in range(steps):
        turn, rng = method.turn(step), Rng(1, step, range(256))
        for terms in method.losses(turn, Nets(networks), make_batch(step), rng):
            terms.total.backward()
        for role in turn.trains:
            optimizers[role].step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()


def moments(method, student):
    rng = Rng(77, rows=range(20000))
    made = method.sampler(student.path)(student, rng.normal((2,)), NONE, rng)
    return made.mean(0), torch.cov(made.T)


@pytest.mark.parametrize("path", [RectifiedFlow(), EDM()], ids=str)
def test_kd_recovers_the_map_itself(path):
    torch.manual_seed(0)
    teacher, student = GaussianMixture(MEAN[None], STD[None], path=path), Linear(path)
    noise = Rng(5, rows=range(4096)).normal((2,))
    s = path.coefficients(torch.tensor(path.t_max))[1].float()
    x0 = teacher.ode_map(s * noise, torch.full((4096,), path.t_max))
    method = KD(t_list=(path.t_max,))

    def make_batch(step):
        part = slice(256 * (step % 16), 256 * (step % 16 + 1))
        return Batch(x0=x0[part], noise=noise[part])

    trained(method, {"student": student}, make_batch, {"student": torch.optim.Adam(student.module.parameters(), 0.02)}, 600)
    torch.testing.assert_close(student.module.weight.detach(), torch.diag(STD), rtol=0, atol=2e-3)
    torch.testing.assert_close(student.module.bias.detach(), MEAN, rtol=0, atol=0.02 if path == EDM() else 2e-3)


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow()], ids=str)
def test_dmd2_recovers_the_distribution(path):
    """The map may turn the noise; mean and covariance must be the teacher's."""
    torch.manual_seed(0)
    teacher, student, critic = GaussianMixture(MEAN[None], STD[None], path=path), Linear(path), Gaussian(path)
    method = DMD2(
        student=StudentSample((path.t_max,)),
        times=times.Shifted(shift=2.0, low=0.02, high=0.98),
        critic=Critic("velocity"),
        student_update_freq=3,
    )
    optimizers = {
        "student": torch.optim.Adam(student.module.parameters(), 0.02, betas=(0.0, 0.99)),
        "critic": torch.optim.Adam(critic.module.parameters(), 0.03, betas=(0.0, 0.99)),
    }
    before, _ = moments(method, student)
    assert float((before - MEAN).abs().max()) > 0.4

    def make_batch(step):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] *= 0.997
        return Batch(x0=torch.zeros(256, 2))

    trained(method, {"student": student, "critic": critic, "teacher": teacher}, make_batch, optimizers, 1300)
    mean, cov = moments(method, student)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(cov.diagonal().sqrt(), STD, rtol=0.03, atol=0)
    assert abs(float(cov[0, 1])) < 0.03
