"""The denoising loss against hand computations: every space, weighting, reduction; masks; dropped conditions."""

import pytest
import scipy.stats
import torch

from fewstep.batch import Batch, Condition
from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, Rng, TrigFlow, times
from fewstep.methods import Finetune, Nets
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
PATHS = [EDM(), RectifiedFlow(), TrigFlow(), TrigFlow(0.5), VP(zero_terminal_snr=True)]


class Probe:
    """x0 = gain x_t / (1 + s/a): something definite and wrong, and a record of what was asked."""

    def __init__(self, path):
        self.path, self.calls = path, []
        self.gain = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        a, s = self.coefficients(t, x_t)
        answer = Prediction.of("x0", self.gain * a * x_t / (a + s), x_t, t, self.path)
        self.calls.append((x_t.detach(), t, cond, answer.x0.detach()))
        return answer

    def coefficients(self, t, like):
        a, s, _, _ = self.path.coefficients(t)
        shape = (-1, *[1] * (like.ndim - 1)) if t.ndim == 1 else (t.shape[0], 1, t.shape[1], 1, 1)
        return a.reshape(shape), s.reshape(shape)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def loss_of(method, net, batch, seed=1):
    turn = method.turn(0)
    (terms,) = method.losses(turn, Nets({"student": net}), batch, Rng(seed, 0, range(batch.size())))
    assert set(terms.values) == {"denoising"} and turn.trains == ("student",)
    return terms.total


def hand(net, x0, space):
    """The squared error in `space`, from x_t, t and the answer that the probe saw: eps is what x_t holds besides x0."""
    x_t, t, _, made = net.calls[0]
    a, s = net.coefficients(t, x0)
    eps, made_eps = (x_t - a * x0) / s, (x_t - a * made) / s
    if space == "x0":
        error = made - x0
    elif space == "eps":
        error = made_eps - eps
    else:
        h = 1e-6 * net.path.t_max  # dx_t/dt by a central difference of a and s, for each of the two
        after, before = net.coefficients(t + h, x0), net.coefficients(t - h, x0)
        da, ds = ((p - m) / (2 * h) for p, m in zip(after, before, strict=True))
        error = da * (made - x0) + ds * (made_eps - eps)
    return error**2, eps, a / s


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("space", ["velocity", "x0", "eps"])
@pytest.mark.parametrize("reduction", ["mean", "half_mean", "sum"])
def test_every_space_and_reduction_by_hand(path, space, reduction):
    x0, net = normal(6, 3), Probe(path)
    method = Finetune(space=space, reduction=reduction, times=times.Shifted(shift=2.0, low=0.1, high=0.9))
    loss = loss_of(method, net, Batch(x0=x0))
    error, _, _ = hand(net, x0, space)
    want = {"mean": error.mean(), "half_mean": error.mean() / 2, "sum": error.sum(1).mean()}[reduction]
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_weightings_by_hand(path):
    x0 = normal(8, 3)
    law = times.Shifted(shift=1.0, low=0.05, high=0.95)
    net = Probe(path)
    loss = loss_of(Finetune(space="x0", weighting="min_snr", min_snr_gamma=2.0, times=law), net, Batch(x0=x0))
    error, _, root_snr = hand(net, x0, "x0")
    weight = torch.minimum(root_snr**2, torch.tensor(2.0, dtype=F64))  # Hang et al.: min(SNR, gamma) on the x0 error
    assert bool((weight == 2.0).any()) and bool((weight < 2.0).any())
    torch.testing.assert_close(loss, (weight * error).mean(), rtol=1e-9, atol=0)

    net = Probe(path)
    loss = loss_of(Finetune(space="x0", weighting="edm", sigma_data=0.5, times=law), net, Batch(x0=x0))
    error, _, root_snr = hand(net, x0, "x0")
    sigma = 1 / root_snr
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2  # cosmos.md 3.3
    torch.testing.assert_close(loss, (weight * error).mean(), rtol=1e-9, atol=0)


def test_the_edm_weighting_makes_it_the_error_of_the_raw_network():
    """Karras et al., eq. 8: lambda |c_skip x + c_out F - x0|^2 = |F - (x0 - c_skip x)/c_out|^2 with lambda = 1/c_out^2."""
    path, sigma_data, x0 = EDM(0.5), 0.5, 0.5 * normal(8, 3)
    raw_of = torch.tanh
    seen = {}

    class Preconditioned:
        def __init__(self):
            self.path = path

        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            sigma = t[:, None]
            total = sigma**2 + sigma_data**2
            seen.update(x=x_t, skip=sigma_data**2 / total, out=sigma * sigma_data / total.sqrt(), into=1 / total.sqrt())
            value = seen["skip"] * x_t + seen["out"] * raw_of(seen["into"] * x_t)
            return Prediction.of("x0", value, x_t, t, path)

    method = Finetune(space="x0", weighting="edm", sigma_data=sigma_data, times=times.LogNormal(0.0, 1.0, scale=4.0))
    loss = loss_of(method, Preconditioned(), Batch(x0=x0))
    target = (x0 - seen["skip"] * seen["x"]) / seen["out"]
    torch.testing.assert_close(loss, ((raw_of(seen["into"] * seen["x"]) - target) ** 2).mean(), rtol=1e-9, atol=0)


def test_x_t_is_x0_noised_by_unit_noise_at_times_of_the_law():
    x0, net = normal(4000, 3), Probe(RectifiedFlow())
    loss_of(Finetune(times=times.Uniform(0.2, 0.8)), net, Batch(x0=x0))
    _, eps, _ = hand(net, x0, "x0")
    assert scipy.stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(net.calls[0][1].numpy(), "uniform", args=(0.2, 0.6)).pvalue > 1e-3


def test_a_perfect_network_has_the_least_loss():
    """The mixture's own answer beats any nudge of it, in every space."""
    net = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6])
    x0 = net.sample(Rng(3, rows=range(4000))).double()

    class Nudged:
        path = net.path

        def __init__(self, nudge):
            self.nudge = nudge

        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            answer = net(x_t, t, cond)
            return Prediction.of("x0", answer.x0 + self.nudge, x_t, t, self.path)

    for space in ("velocity", "x0", "eps"):
        method = Finetune(space=space, times=times.Uniform(0.3, 0.9))
        best, low, high = (float(loss_of(method, Nudged(nudge), Batch(x0=x0))) for nudge in (0.0, -0.1, 0.1))
        assert best < low and best < high


def test_masked_frames_contribute_exactly_nothing():
    """Neither what is in them nor what is answered there changes loss or gradient."""
    x0, mask = normal(2, 3, 4, 2, 2), torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]])
    given = mask.bool()[:, None, :, None, None].expand_as(x0)
    other = torch.where(given, 50 * normal(2, 3, 4, 2, 2, seed=5), x0)
    for reduction in ("mean", "sum"):
        for weighting in ("none", "edm"):
            method = Finetune(space="x0", weighting=weighting, reduction=reduction)
            found = []
            for data in (x0, other):
                net = Probe(RectifiedFlow())
                loss = loss_of(method, net, Batch(x0=data, cond=Condition(frames=data, frame_mask=mask)))
                found.append((loss.detach(), torch.autograd.grad(loss, net.gain)[0]))
            assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
            assert float(found[0][0]) > 0 and float(found[0][1]) != 0
    everything = Condition(frames=x0, frame_mask=torch.ones(2, 4))
    net = Probe(RectifiedFlow())
    loss = loss_of(Finetune(), net, Batch(x0=x0, cond=everything))
    assert float(loss.detach()) == 0.0 and float(torch.autograd.grad(loss, net.gain)[0]) == 0.0


def test_every_frame_gets_its_own_time():
    x0, net = normal(5, 3, 4, 2, 2), Probe(RectifiedFlow())
    loss = loss_of(Finetune(space="x0", per_frame_times=True), net, Batch(x0=x0))
    t = net.calls[0][1]
    assert t.shape == (5, 4) and len(set(t.flatten().tolist())) == 20
    torch.testing.assert_close(loss, hand(net, x0, "x0")[0].mean(), rtol=1e-9, atol=0)


def test_another_path_than_the_networks_own():
    x0 = 0.5 * normal(6, 3)
    net = GaussianMixture([[0.0, 0.0, 0.0]], [0.5], path=EDM(t_max=1e6))
    method = Finetune(space="velocity", path=TrigFlow(), times=times.Shifted(shift=2.0, low=0.1, high=0.9))
    native = Finetune(space="velocity", times=times.Shifted(shift=2.0, low=0.1, high=0.9))
    torch.testing.assert_close(
        loss_of(method, net, Batch(x0=x0)), loss_of(native, net.on(TrigFlow()), Batch(x0=x0)), rtol=1e-9, atol=0
    )


def test_a_share_of_the_samples_is_trained_on_the_negative():
    rows = 4000
    batch = Batch(
        x0=normal(rows, 2), cond=Condition(label=torch.ones(rows).long()), negative=Condition(label=-torch.ones(rows).long())
    )
    method, net = Finetune(drop_condition=0.2), Probe(RectifiedFlow())
    loss_of(method, net, batch)
    dropped = (net.calls[0][2].label == -1).double()
    assert abs(float(dropped.mean()) - 0.2) < 4 * (0.16 / rows) ** 0.5
    assert method.needs == {"x0", "negative"} and Finetune().needs == {"x0"}
    net = Probe(RectifiedFlow())
    loss_of(Finetune(), net, batch)
    assert bool((net.calls[0][2].label == 1).all())


@pytest.mark.parametrize("path", [RectifiedFlow(), EDM(), TrigFlow(0.5)], ids=str)
def test_its_sampler_follows_the_ode(path):
    net = GaussianMixture([[0.4, -0.2]], [0.5], path=path)
    noise = normal(16, 2)
    sampler = Finetune(num_sample_steps=200).sampler(path)
    times = sampler.times(path)
    assert sampler.num_steps == 200 and sampler.guidance == 1.0
    torch.testing.assert_close(float(times[0]), path.t_max, rtol=1e-3, atol=0)
    got = sampler(net, noise, Condition(), Rng(1, rows=range(16)))
    start = path.coefficients(torch.tensor(path.t_max))[1] * noise
    want = net.ode_map(start, torch.full((16,), path.t_max, dtype=F64))
    assert float((got - want).abs().max()) < 0.05


def test_settings_that_say_nothing_are_named():
    assert [key for key, _ in Finetune(weighting="edm").problems()] == ["weighting"]
    assert [key for key, _ in Finetune(drop_condition=1.0).problems()] == ["drop_condition"]
    assert not list(Finetune(weighting="edm", space="x0").problems())
