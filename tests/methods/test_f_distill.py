"""f-distill: h from the divergences themselves, by autograd; the binned ratio; the weight in the loss."""

import math
from dataclasses import replace

import pytest
import torch

from fewstep.batch import Batch
from fewstep.config import check, presets
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, TrigFlow, times
from fewstep.methods import DMD2, FDivergence, Gan, Nets, StudentSample, Turn
from fewstep.methods.f_distill import bin_means, f_distill, h

F64 = torch.float64
# f of D_f(p || q) = E_q f(p / q)
DIVERGENCES = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (1 + r) * ((1 + r) / r).log(),
    "neyman": lambda r: 0.5 * (1 - r) ** 2 / r,
    "sh": lambda r: 2 * (1 - r.sqrt()) ** 2,
    "jf": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_h_is_the_second_derivative_times_r_squared(name):
    r = torch.logspace(-1.5, 1.5, 31, dtype=F64).requires_grad_()
    (first,) = torch.autograd.grad(DIVERGENCES[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(h(r, name), (second * r**2).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_of_the_divergence_itself(name):
    """d/dm D_f(N(0,1) || N(m,1)) by quadrature = E_q[h(r) (score_q - score_p)]: what the weight is for."""
    x = torch.linspace(-12, 12, 20001, dtype=F64)
    log_p = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
    m = torch.tensor(0.7, dtype=F64, requires_grad=True)
    log_q = -0.5 * (x - m) ** 2 - 0.5 * math.log(2 * math.pi)
    divergence = torch.trapezoid(log_q.exp() * DIVERGENCES[name]((log_p - log_q).exp()), x)
    (want,) = torch.autograd.grad(divergence, m)
    q, ratio = log_q.exp().detach(), (log_p - log_q).exp().detach()
    found = torch.trapezoid(q * h(ratio, name) * (-(x - 0.7) + x), x)  # dx/dm is 1
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_bins_by_hand_and_alike_on_every_path():
    u = torch.tensor([0.02, 0.04, 0.26, 0.33, 0.97, 1.0], dtype=F64)  # places in the angle
    ratio = torch.tensor([1.0, 3.0, 5.0, 9.0, 2.0, 4.0], dtype=F64)
    tangent = torch.where(u == 1, math.inf, torch.tan(u * math.pi / 2))
    want = torch.tensor([2.0, 2.0, 7.0, 7.0, 3.0, 3.0], dtype=F64)
    for path in (RectifiedFlow(), TrigFlow()):
        assert torch.equal(bin_means(ratio, path.time_of(tangent), path, 4), want)
    assert torch.equal(bin_means(ratio, u, EDM(), 1), ratio.mean().expand(6))


class Affine:
    path = RectifiedFlow()

    def __init__(self, gain):
        self.gain, self.calls = torch.tensor(gain, dtype=F64, requires_grad=True), []

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        x0 = self.gain * x_t
        self.calls.append((x_t.detach(), t, x0.detach()))
        return Prediction.of("x0", x0, x_t, t, self.path, (x_t,) if taps else ())


class FunctionHead:
    taps = (0,)

    def __call__(self, features):
        return features[0][:, :2] * 2  # two logits a sample


@pytest.mark.parametrize("num_bins", [0, 3])
@pytest.mark.parametrize("name", ["js", "kl", "rkl"])
def test_the_students_turn_by_hand(name, num_bins):
    roles = {"student": Affine(0.7), "teacher": Affine(0.9), "critic": Affine(0.5), "head": FunctionHead()}
    method = DMD2(
        student=StudentSample((1.0,)),
        times=times.Uniform(),
        gan=Gan(),
        sample_weight=FDivergence(name, ratio_min=0.5, ratio_max=3.0, num_bins=num_bins),
    )
    batch = Batch(x0=torch.zeros(64, 3, dtype=F64))
    (terms,) = method.losses(Turn("student", ("student",)), Nets(roles), batch, Rng(1, 0, range(64)))
    (x_t, t, fake), (_, _, real), sample = roles["critic"].calls[0], roles["teacher"].calls[0], roles["student"].calls[0][2]
    ratio = (2 * x_t[:, :2]).mean(1).exp().clamp(0.5, 3.0)
    if num_bins:
        bins = (torch.atan(t / (1 - t)) / (math.pi / 2) * num_bins).long()
        ratio = ratio / torch.stack([ratio[bins == b].mean() for b in bins])
    weight = {"js": ratio / (1 + ratio), "kl": ratio, "rkl": torch.ones_like(ratio)}[name]
    weight = weight / weight.mean()
    gradient = weight[:, None] * (fake - real) / (sample - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(terms.values["vsd"].detach(), 0.5 * (gradient**2).mean(), rtol=1e-9, atol=0)
    assert "gan" in terms.values and float(terms.watch["sample_weight"]) == pytest.approx(1.0)
    if name == "rkl":
        plain = {"student": Affine(0.7), "teacher": Affine(0.9), "critic": Affine(0.5), "head": FunctionHead()}
        dmd2 = replace(method, sample_weight=None)
        (other,) = dmd2.losses(Turn("student", ("student",)), Nets(plain), batch, Rng(1, 0, range(64)))
        torch.testing.assert_close(other.total, terms.total)


def test_problems():
    method = f_distill()
    assert check(method) == [] and method.roles[-1] == "head" and presets("method")["f_distill"] is f_distill
    for gan in (None, Gan(form="hinge")):
        assert [key for key, _ in replace(method, gan=gan).problems()] == ["gan"]
    assert [key for key, _ in FDivergence(ratio_min=2.0).problems()] == ["ratio_min"]
    assert [key for key, _ in FDivergence(num_bins=-1).problems()] == ["num_bins"]
