"""The exact mixture against autograd, torch.distributions, numerical integration, and an ODE solver of scipy."""

import math

import pytest
import scipy.integrate
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, RectifiedFlow, Rng, TrigFlow
from fewstep.networks.analytic import GaussianMixture, MixtureSpec

F64 = torch.float64
NONE = Condition()
PATHS = [EDM(), RectifiedFlow(), TrigFlow(), TrigFlow(0.5), VP("linear"), VP("cosine"), VP(zero_terminal_snr=True)]
MEANS = torch.tensor([[0.3, -1.2, 0.0], [1.0, 0.4, -0.6], [-0.7, 0.9, 2.0]], dtype=F64)
STDS = torch.tensor([[0.4, 0.5, 0.6], [0.7, 0.3, 0.2], [1.1, 0.9, 0.8]], dtype=F64)
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
MIXTURE = GaussianMixture(MEANS, STDS, WEIGHTS, labels=[0, 1, 1])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def inner_times(path):
    return path.t_max * torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=F64)


def as_torch(path, t, weights=WEIGHTS):
    """The law of x_t at one time, as torch.distributions writes it."""
    a, s, _, _ = path.coefficients(torch.as_tensor(t, dtype=F64))
    return MixtureSameFamily(Categorical(weights.double()), Independent(Normal(a * MEANS, (a**2 * STDS**2 + s**2).sqrt()), 1))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_log_prob_is_that_of_torch(path):
    for t in (0.0, *inner_times(path).tolist(), path.t_max):
        x = 1.5 * normal(6, 3) * (1 + path.coefficients(torch.tensor(t))[1])
        got = MIXTURE.on(path).log_prob(x, torch.full((6,), t, dtype=F64))
        torch.testing.assert_close(got, as_torch(path, t).log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_x0_and_eps_by_tweedie(path):
    """E[eps | x] = -s grad log p, E[x0 | x] = (x + s^2 grad log p) / a, the gradient by autograd of torch's own density."""
    t = inner_times(path)
    a, s, da, ds = (c[:, None] for c in path.coefficients(t))
    x = (a * normal(7, 3) + s * normal(7, 3, seed=1)).requires_grad_()
    log_prob = sum(as_torch(path, float(t[i])).log_prob(x[i]) for i in range(7))
    (score,) = torch.autograd.grad(log_prob, x)
    net, x = MIXTURE.on(path), x.detach()
    answer = net(x, t, NONE)
    torch.testing.assert_close(net.score(x, t), score, rtol=1e-9, atol=1e-9)
    eps, x0 = -s * score, (x + s**2 * score) / a
    torch.testing.assert_close(answer.eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(answer.x0, x0, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(answer.velocity, da * x0 + ds * eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_score_by_autograd_of_log_prob(path):
    net, t = MIXTURE.on(path), inner_times(path)
    x = normal(7, 3).requires_grad_()
    (score,) = torch.autograd.grad(net.log_prob(x, t).sum(), x)
    torch.testing.assert_close(net.score(x.detach(), t), score, rtol=1e-10, atol=1e-10)


def test_x0_by_numerical_integration():
    """E[x0 | x_t] = int x0 p(x0) N(x_t; a x0, s^2) / int p(x0) N(..), in one dimension, on a fine grid."""
    net = GaussianMixture([[-1.0], [0.8]], [0.2, 0.5], [0.3, 0.7], path=TrigFlow(0.5))
    x0 = torch.linspace(-8, 8, 20001, dtype=F64)

    def gauss(value, mean, std):  # torch's Normal would make float32 of plain numbers
        return torch.exp(-0.5 * ((value - mean) / std) ** 2) / std

    prior = 0.3 * gauss(x0, -1.0, 0.2) + 0.7 * gauss(x0, 0.8, 0.5)
    for t in (0.1, 0.8, 1.5):
        a, s = math.cos(t) / 0.5, math.sin(t)
        for x in (-2.0, 0.1, 1.3):
            weight = prior * gauss(x, a * x0, s)
            want = float((weight * x0).sum() / weight.sum())
            got = net(torch.tensor([[x]], dtype=F64), torch.tensor([t], dtype=F64), NONE)
            assert float(got.x0) == pytest.approx(want, abs=1e-9)
            assert float(got.eps) == pytest.approx((x - a * want) / s, abs=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_both_ends_by_their_limits(path):
    """At t = 0, x0 is x_t / a and eps is 0; at pure noise eps is x_t / s and x0 the mean of the data."""
    net, x = MIXTURE.on(path), normal(4, 3)
    a, s, _, _ = path.coefficients(torch.tensor([0.0, path.t_max], dtype=F64))
    clean = net(x, torch.zeros(4, dtype=F64), NONE)
    torch.testing.assert_close(clean.x0, x / a[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(clean.eps, torch.zeros_like(x), rtol=0, atol=1e-12)
    if float(a[1]) == 0:
        pure = net(x, torch.full((4,), path.t_max, dtype=F64), NONE)
        mean = (WEIGHTS.double()[:, None] * MEANS).sum(0) / 6
        torch.testing.assert_close(pure.x0, mean.expand(4, 3), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pure.eps, x / s[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_of_no_width_are_finite_everywhere(path, dtype):
    """Two points and a blob. At t = 0 a state that rounding put beside every point belongs to the nearest one."""
    net = GaussianMixture(MEANS, [0.0, 0.5, 0.0], path=path)
    points = GaussianMixture(MEANS, 0.0, path=path)
    for t in (0.0, 1e-12, 1e-6, 0.1, 0.5, 1.0):
        t = torch.full((4,), t * path.t_max, dtype=F64)
        a, s, _, _ = (c[:, None] for c in path.coefficients(t))
        x = a * MEANS[[0, 1, 2, 2]] + s * normal(4, 3)
        for net_ in (net, points):
            answer = net_(x.to(dtype), t, NONE)
            assert all(bool(torch.isfinite(answer.read(name)).all()) for name in ("x0", "eps", "velocity"))
    zero = torch.zeros(3, dtype=F64)
    a = path.coefficients(zero)[0][:, None]
    beside = (a * MEANS * (1 + 1e-6) + 1e-6).to(dtype)
    answer = points(beside, zero, NONE)
    torch.testing.assert_close(answer.velocity, points((a * MEANS).to(dtype), zero, NONE).velocity, rtol=1e-4, atol=1e-4)
    # Very small noise around a point: x0 is the point, and the noise is read off.
    for fraction in (1e-8, 1e-3):
        t = torch.full((3,), fraction * path.t_max, dtype=F64)
        a, s, _, _ = (c[:, None] for c in path.coefficients(t))
        answer = points(a * MEANS + 0.5 * s, t, NONE)
        torch.testing.assert_close(answer.x0, MEANS, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(answer.eps, torch.full((3, 3), 0.5, dtype=F64), rtol=1e-5, atol=1e-5)


def test_far_from_everything_nothing_overflows():
    for dtype in (torch.float32, torch.float64):
        x = torch.full((1, 3), 1e6, dtype=dtype)
        answer = MIXTURE.on(EDM())(x, torch.tensor([1e-3]), NONE)
        assert bool(torch.isfinite(answer.velocity).all())


def test_labels_select_components():
    t, x = inner_times(RectifiedFlow())[:3], normal(3, 3)
    only = {0: GaussianMixture(MEANS[:1], STDS[:1]), 1: GaussianMixture(MEANS[1:], STDS[1:], WEIGHTS[1:])}
    got = MIXTURE(x, t, Condition(label=torch.tensor([0, 1, -1]))).x0
    for row, alone in enumerate((only[0], only[1], GaussianMixture(MEANS, STDS, WEIGHTS))):
        torch.testing.assert_close(got[row], alone(x, t, NONE).x0[row], rtol=1e-12, atol=1e-12)
    cond = Condition(label=torch.tensor([1, 1, 1]))
    weights = WEIGHTS * torch.tensor([0.0, 1.0, 1.0])
    want = torch.stack([as_torch(RectifiedFlow(), float(t[i]), weights).log_prob(x[i]) for i in range(3)])
    # torch's mixture weights are those of the class; ours keep the prior of the class: 5 of 6
    torch.testing.assert_close(MIXTURE.log_prob(x, t, cond), want + math.log(5 / 6), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"label \[7\] is no class of this mixture, which has \[0, 1\], and -1"):
        MIXTURE(x, t, Condition(label=torch.tensor([0, 7, -1])))


def test_every_frame_has_its_own_time():
    """One frame at each time: the posterior of the component is shared, so compare with the density by autograd."""
    means, stds = normal(2, 3, 4, 2, 2), 0.3 + normal(2, 3, 4, 2, 2, seed=1).abs()
    net = GaussianMixture(means, stds, [0.4, 0.6])
    t = torch.tensor([[0.1, 0.3, 0.7, 0.9], [0.98, 0.5, 0.2, 0.1]], dtype=F64)
    x = normal(2, 3, 4, 2, 2, seed=2).requires_grad_()
    a, s = 1 - t[:, None, :, None, None], t[:, None, :, None, None]
    parts = [
        math.log(weight) + Normal(a * mean, (a**2 * std**2 + s**2).sqrt()).log_prob(x).sum((1, 2, 3, 4))
        for weight, mean, std in zip((0.4, 0.6), means, stds, strict=True)
    ]
    log_prob = torch.logsumexp(torch.stack(parts), 0)
    (score,) = torch.autograd.grad(log_prob.sum(), x)
    x = x.detach()
    torch.testing.assert_close(net.log_prob(x, t), log_prob.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net(x, t, NONE).eps, -s * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(x, t, NONE).x0, (x + s**2 * score) / a, rtol=1e-9, atol=1e-9)


def test_samples_have_the_moments_of_the_mixture():
    num = 40000
    x = MIXTURE.sample(Rng(1, rows=range(num))).double()
    law = as_torch(RectifiedFlow(), 0.0)
    error = (law.variance / num).sqrt()
    assert bool(((x.mean(0) - law.mean).abs() < 4 * error).all())
    assert bool(((x.var(0) / law.variance - 1).abs() < 0.05).all())
    # Shares of the components, by the nearest of three far points.
    far = GaussianMixture([[0.0], [100.0], [200.0]], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], labels=[5, 6, 6])
    y = far.sample(Rng(2, rows=range(num)))[:, 0]
    place = (y / 100).round().long()
    torch.testing.assert_close(torch.bincount(place) / num, torch.tensor([1, 2, 3]) / 6, rtol=0, atol=0.012)
    for k, std in enumerate((1.0, 2.0, 3.0)):
        assert float(y[place == k].std()) == pytest.approx(std, rel=0.05)
    labelled = far.sample(Rng(3, rows=range(1000)), torch.tensor([5, 6]).repeat(500))[:, 0]
    assert float(labelled[::2].max()) < 50 < float(labelled[1::2].min())
    assert torch.equal(MIXTURE.sample(Rng(1, rows=[17, 3])), MIXTURE.sample(Rng(1, rows=range(num)))[[17, 3]])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_ode_map_is_where_scipy_arrives(path):
    mean, std = torch.tensor([[0.4, -1.0]], dtype=F64), torch.tensor([[0.3, 1.2]], dtype=F64)
    net = GaussianMixture(mean, std, path=path)
    t = 0.95 * path.t_max
    a, s, _, _ = path.coefficients(torch.tensor(t, dtype=F64))
    x = a * mean + s * normal(1, 2)

    def velocity(time, state):
        state = torch.as_tensor(state, dtype=F64)[None]
        return net(state, torch.tensor([time], dtype=F64), NONE).velocity[0].numpy()

    got = scipy.integrate.solve_ivp(velocity, (t, 0.0), x[0].numpy(), rtol=1e-6, atol=1e-8).y[:, -1]
    a0 = path.coefficients(torch.tensor(0.0))[0]  # TrigFlow's state at t = 0 is x0 / sigma_d
    want = a0 * net.ode_map(x, torch.tensor([t], dtype=F64))[0]
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=2e-4, atol=2e-5)


def test_ode_map_of_a_mixture_is_refused():
    with pytest.raises(ValueError, match="3 components"):
        MIXTURE.ode_map(normal(2, 3), torch.ones(2))


def test_half_precision_is_computed_in_float32():
    t = torch.tensor([0.2, 0.7])
    x = normal(2, 3).bfloat16()
    answer = MIXTURE(x, t, NONE)
    assert answer.velocity.dtype == torch.float32 and torch.equal(answer.velocity, MIXTURE(x.float(), t, NONE).velocity)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=r"\(components, \*shape\)"):
        GaussianMixture([1.0, 2.0])
    with pytest.raises(ValueError, match="weights has 2 entries for 3"):
        GaussianMixture(MEANS, STDS, [1.0, 1.0])
    with pytest.raises(ValueError, match="labels has 1 entries for 3"):
        GaussianMixture(MEANS, STDS, labels=[0])
    with pytest.raises(ValueError, match="no blocks"):
        MIXTURE(normal(1, 3), torch.ones(1), NONE, taps=(0,))
    with pytest.raises(ValueError, match="not causal"):
        MIXTURE.new_cache(normal(1, 3))


def test_spec_builds_what_it_says():
    spec = MixtureSpec(((0.0, 1.0), (2.0, 3.0)), (0.5, 0.6), (1.0, 3.0), (0, 1), EDM())
    net, x, t = spec.build(), normal(2, 2), torch.tensor([0.5, 3.0], dtype=F64)
    same = GaussianMixture([[0.0, 1.0], [2.0, 3.0]], [0.5, 0.6], [0.25, 0.75], path=EDM(), labels=[0, 1])
    assert net.path == EDM() and torch.equal(net(x, t, NONE).x0, same(x, t, NONE).x0)
