"""The GAN and each relative of DMD2 on small known distributions, with a bound. The recipes are in tests/stories."""

import pytest
import torch
from torch import nn

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Prediction, RectifiedFlow, Rng, times
from fewstep.methods import DMD2, LADD, FDivergence, Gan, Nets, PhasedDMD, RewardWeight, SiD, StudentSample
from fewstep.methods.reward_dmd import Toward
from fewstep.networks.analytic import GaussianMixture

PATH = RectifiedFlow()
MEAN, STD = torch.tensor([1.0, -0.5]), torch.tensor([0.3, 0.8])
TARGET = GaussianMixture(MEAN[None], STD[None])
LAW = times.Shifted(shift=2.0, low=0.02, high=0.98)
SETTINGS = {"student": StudentSample((1.0,)), "times": LAW, "student_update_freq": 3}
ROWS = 256


class Student:
    """x0 = W x_t + b, with a W and b of its own for each of its times: a Gaussian needs no more."""

    path = PATH

    def __init__(self, *boundaries):
        self.boundaries = boundaries
        self.module = nn.ModuleList(nn.Linear(2, 2) for _ in range(len(boundaries) + 1))
        for layer in self.module:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        which = sum(float(t[0]) < boundary for boundary in self.boundaries)
        return Prediction.of("x0", self.module[which](x_t), x_t, t, self.path)


class Critic:
    """Exact for whatever Gaussian the student makes: m and the factor of the covariance are trained. Shows x_t and t."""

    path = PATH

    def __init__(self):
        self.module = nn.Linear(2, 2)
        nn.init.eye_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        a, s = (c[:, None].float() for c in self.path.coefficients(t)[:2])
        mean, factor = self.module.bias, self.module.weight
        cov = factor @ factor.T
        inverse = torch.linalg.inv(a[..., None] ** 2 * cov + s[..., None] ** 2 * torch.eye(2))
        x0 = mean + a * torch.einsum("ij,bjk,bk->bi", cov, inverse, x_t - a * mean)
        return Prediction.of("x0", x0, x_t, t, self.path, (torch.cat([x_t, t[:, None].float()], 1),))


class Head:
    taps = (0,)

    def __init__(self):
        self.module = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def __call__(self, features):
        return self.module(features[0])


def learnt(method, teacher, steps, student=None, data=TARGET, lr=0.05):
    """Samples of the student after `steps` turns; the learning rates fall to nothing in the second half."""
    torch.manual_seed(0)
    nets = {"student": student or Student(), "critic": Critic(), "head": Head(), "teacher": teacher}
    rates = {role: rate for role, rate in (("student", lr), ("critic", 0.05), ("head", 0.01)) if role in method.roles}
    optimizers = {role: torch.optim.Adam(nets[role].module.parameters(), betas=(0.0, 0.99)) for role in rates}
    for step in range(steps):
        turn, rng = method.turn(step), Rng(1, step, range(ROWS))
        for role, optimizer in optimizers.items():
            nets[role].module.requires_grad_(role in turn.trains)
            optimizer.zero_grad()
        for terms in method.losses(turn, Nets(nets), Batch(x0=data.sample(rng)), rng):
            terms.total.backward()
        for role in turn.trains:
            for group in optimizers[role].param_groups:
                group["lr"] = rates[role] * min(1.0, 2.1 - 2 * step / steps)
            optimizers[role].step()
    rng = Rng(77, rows=range(20000))
    with torch.no_grad():
        return method.sampler(PATH)(nets["student"], rng.normal((2,)), Condition(), rng)


def assert_close(made, mean=0.05, std=0.12):
    """Within `mean` of each axis' mean and a share `std` of its spread, and no correlation."""
    torch.testing.assert_close(made.mean(0), MEAN, rtol=0, atol=mean)
    torch.testing.assert_close(made.std(0), STD, rtol=std, atol=0)
    assert abs(float(torch.corrcoef(made.T)[0, 1])) < 0.15


def test_sid_learns():
    assert_close(learnt(SiD(**SETTINGS), TARGET, 350))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("kl", "sf", "neyman", "sh", "jf", "rkl")]


@pytest.mark.parametrize("divergence", ["js", *SLOW])
def test_f_distill_learns(divergence):
    gan = Gan(weight=1e-3, features="critic")
    method = DMD2(**SETTINGS, gan=gan, sample_weight=FDivergence(divergence))
    assert_close(learnt(method, TARGET, 350))


def test_ladd_learns():
    method = LADD(student=StudentSample((1.0,)), times=LAW, gan=Gan(weight=1.0, r1_weight=1.0, r1_std=0.1))
    made = learnt(method, Critic(), 600)  # a map of noise may turn it: the axes' means and spreads are what is learnt
    torch.testing.assert_close(made.mean(0), MEAN, rtol=0, atol=0.15)
    torch.testing.assert_close(made.std(0), STD, rtol=0.25, atol=0)


def test_phased_learns_phase_by_phase():
    """Two phases; after the first alone the states at t = 0.6 have the law of the data there."""
    settings, student = {"t_list": (1.0, 0.6), "times": LAW, "student_update_freq": 3}, Student(0.9)
    learnt(PhasedDMD(**settings, steps_per_phase=300), TARGET, 300, student)
    rng = Rng(5, rows=range(20000))
    with torch.no_grad():
        x0 = student(rng.normal((2,)), torch.ones(20000), Condition()).x0
        state = PATH.add_noise(x0, rng.normal((2,)), torch.full((20000,), 0.6))
    torch.testing.assert_close(state.mean(0), 0.4 * MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(state.std(0), (0.16 * STD**2 + 0.36).sqrt(), rtol=0.05, atol=0)
    first = student.module[0].weight.detach().clone()
    made = learnt(PhasedDMD(**settings, steps_per_phase=1), TARGET, 350, student)
    assert_close(made, std=0.2)
    # but for one student turn of phase 1, which the second run begins with, the first expert keeps what it learnt
    assert float((student.module[0].weight.detach() - first).abs().max()) < 0.06


@pytest.mark.parametrize("side", [1.0, pytest.param(-1.0, marks=pytest.mark.slow)])
def test_a_reward_chooses_what_a_student_covers_that_cannot_cover_all(side):
    """A Gaussian student of two far modes lies between them, and leans to the one it is paid for."""
    teacher = GaussianMixture([[-1.2, 0.0], [1.2, 0.0]], [0.3, 0.3])
    paid = learnt(DMD2(**SETTINGS, sample_weight=RewardWeight(Toward((side, 0.0)), beta=0.5)), teacher, 250)
    assert 0.15 < float(side * paid[:, 0].mean()) < 0.5
    unpaid = learnt(DMD2(**SETTINGS, sample_weight=RewardWeight(Toward((0.0, 0.0)), beta=0.5)), teacher, 250)
    assert abs(float(unpaid[:, 0].mean())) < 0.08


def test_a_gan_takes_the_student_nearer_to_the_data_than_its_biased_teacher_is():
    wrong = GaussianMixture((MEAN + 0.3)[None], (1.4 * STD)[None])

    def distance(made):  # of Gaussians, the Frechet distance
        return float(((made.mean(0) - MEAN) ** 2).sum() + ((made.std(0) - STD) ** 2).sum())

    teachers = distance(wrong.sample(Rng(3, rows=range(20000))))
    alone = distance(learnt(DMD2(**SETTINGS), wrong, 300))
    with_gan = distance(learnt(DMD2(**SETTINGS, gan=Gan(weight=3.0, features="critic", r1_weight=1.0)), wrong, 400))
    assert 0.7 * teachers < alone < 1.4 * teachers, (teachers, alone)
    assert with_gan < 0.4 * teachers, (teachers, with_gan)
