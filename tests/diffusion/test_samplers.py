"""Samplers on a single Gaussian, whose probability-flow ODE is known: measured orders, the RES formulas, exact trajectories."""

import math

import pytest
import torch

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, RectifiedFlow, TrigFlow, samplers, times
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
MEAN, STD = torch.tensor([0.5, -1.0], dtype=F64), 1.0
ALL = ["euler", "heun", "dpmpp_2m", "res_2ab", "unipc"]
FLOW = RectifiedFlow()


class Counting:
    """A denoiser that keeps the time and state of every call."""

    def __init__(self, inner):
        self.inner, self.path, self.calls = inner, inner.path, []

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        self.calls.append((t.clone(), x_t.clone()))
        return self.inner(x_t, t, cond)


def teacher(path, mean=MEAN, std=STD):
    return GaussianMixture(mean[None], [std], path=path)


def scales(path, t, std=STD):
    a, s, _, _ = path.coefficients(torch.as_tensor(t, dtype=F64))
    return a, s, torch.sqrt(a**2 * std**2 + s**2)


def moved(path, x, t, t_next, std=STD):
    """The exact ODE from t to t_next: every axis keeps its place in units of its spread (closed form)."""
    a, _, width = scales(path, t, std)
    a_next, _, width_next = scales(path, t_next, std)
    return a_next * MEAN + width_next * (x - a * MEAN) / width


def denoised(path, x, t, std=STD):
    a, _, width = scales(path, t, std)
    return MEAN + a * std**2 / width**2 * (x - a * MEAN)


def started(path, t, num=8):
    a, s, _ = scales(path, t)
    noise = torch.randn(num, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return a * (MEAN + 0.5) + s * noise


def error(name, path, grid, **options):
    x = started(path, grid[0])
    x0 = getattr(samplers, name)(teacher(path), x, grid, Condition(), **options)
    return float((x0 - denoised(path, moved(path, x, grid[0], grid[-1]), grid[-1])).abs().max())


def order(name, path, grid, num, **options):
    coarse, fine = (error(name, path, grid(n), **options) for n in (num, 2 * num))
    return math.log2(coarse / fine)


# --- orders -----------------------------------------------------------------------------------------------------------


def on_edm(num):
    return times.karras(num + 1)


def on_log_flow(num):
    return times.converted(times.karras(num + 1), EDM(), FLOW)


@pytest.mark.parametrize(
    "path, grid", [(EDM(), on_edm), (FLOW, on_log_flow), (FLOW, times.shifted)], ids=["edm", "log-flow", "flow"]
)
def test_euler_is_of_order_1(path, grid):
    assert 0.9 <= order("euler", path, grid, 80) <= 1.15


@pytest.mark.parametrize("path, grid", [(EDM(), on_edm), (FLOW, on_log_flow)], ids=["edm", "flow"])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "res_2ab", "unipc"])
def test_the_others_are_of_order_2(name, path, grid):
    assert order(name, path, grid, 80) >= 1.9


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "res_2ab", "unipc"])
def test_on_the_even_flow_grid_order_2_comes_with_a_logarithm(name):
    """From pure noise, evenly in flow time, the first lambda steps are ln 2, ln 3/2, ..: never small, whatever N.

    The k-th of them adds an error of about 1/(k N^2), so that a multistep method's error is (log N)/N^2 and its measured order
    comes to 2 from below; N = 80 shows 1.88 for dpmpp_2m and 1.90 for res_2ab.
    """
    coarse, middle, fine = (error(name, FLOW, times.shifted(n)) for n in (40, 80, 160))
    first, second = math.log2(coarse / middle), math.log2(middle / fine)
    assert second >= 1.8
    assert second > first or first > 2  # on its way to 2, from either side


@pytest.mark.parametrize("path, grid", [(EDM(), on_edm), (FLOW, on_log_flow)], ids=["edm", "flow"])
def test_unipc_gains_one_order_by_its_corrector(path, grid):
    assert order("unipc", path, grid, 40, order=2) >= 2.8
    assert order("unipc", path, grid, 40, order=3) >= 3.8


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("path", [TrigFlow(0.5), VP("linear"), VP(zero_terminal_snr=True)], ids=str)
def test_every_path_is_sampled_to_the_end(name, path):
    grid = times.on_flow(60, path)
    assert error(name, path, grid) < (0.08 if name == "euler" else 0.02)


@pytest.mark.parametrize("name", ALL)
def test_the_whole_way_is_the_closed_form_map(name):
    """From sigma 80 to 0.002 and its clean denoise, against GaussianMixture.ode_map."""
    net, grid = teacher(EDM()), times.karras(160)
    x = started(EDM(), 80.0)
    x0 = getattr(samplers, name)(net, x, grid, Condition())
    bound = 0.1 if name == "euler" else 2e-3
    assert float((x0 - net.ode_map(x, torch.full((len(x),), 80.0))).abs().max()) < bound


# --- what the exponential integrators are -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [("dpmpp_2m", {}), ("res_2ab", {}), ("unipc", {}), ("unipc", {"order": 3})])
@pytest.mark.parametrize("path", [FLOW, TrigFlow(), TrigFlow(0.5)], ids=str)
def test_exponential_integrators_do_not_depend_on_the_path(name, options, path):
    """They see lambda and x0 only: the same ratios on another path give the same x0, step by step."""
    mixture = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6])
    grid = times.karras(13, 70.0, 0.01)
    here = times.converted(grid, EDM(), path)
    x = 70 * torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    a, _, _, _ = path.coefficients(here[:1])
    sampler = getattr(samplers, name)
    on_edm_path = sampler(mixture.on(EDM()), x, grid, Condition(), **options)
    on_this = sampler(mixture.on(path), a * x, here, Condition(), **options)
    torch.testing.assert_close(on_this, on_edm_path, rtol=1e-9, atol=1e-9)


def res_2ab_of_cosmos(x0_of, x, sigmas):
    """cosmos.md A.1, in EDM form, word for word: lambda = -ln sigma, phi-functions at -h."""

    def phi1(z):
        return math.expm1(z) / z

    def phi2(z):
        return (phi1(z) - 1) / z

    previous = None
    for i in range(len(sigmas) - 1):
        s, t = float(sigmas[i]), float(sigmas[i + 1])
        lam_s, lam_t = -math.log(s), -math.log(t)
        h, x0_s = lam_t - lam_s, x0_of(x, s)
        if previous is None:
            x = (t / s) * x + (1 - t / s) * x0_s
        else:
            lam_1, x0_1 = previous
            c2 = (lam_1 - lam_s) / h
            b1, b2 = phi1(-h) - phi2(-h) / c2, phi2(-h) / c2
            x = math.exp(-h) * x + h * (b1 * x0_s + b2 * x0_1)
        previous = (lam_s, x0_s)
    return x0_of(x, float(sigmas[-1]))


def test_res_2ab_is_the_sampler_of_cosmos():
    mixture = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6], path=EDM())
    net, grid = Counting(mixture), times.karras(36)
    x = 80 * torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(1))

    def x0_of(state, sigma):
        return mixture(state, torch.full((6,), sigma, dtype=F64), Condition()).x0

    got = samplers.res_2ab(net, x, grid, Condition())
    torch.testing.assert_close(got, res_2ab_of_cosmos(x0_of, x, grid), rtol=1e-11, atol=1e-11)
    assert len(net.calls) == 36  # "35 steps" and the final clean denoise


@pytest.mark.parametrize("name", ["dpmpp_2m", "res_2ab", "unipc"])
def test_the_first_step_from_pure_noise_is_a_ddim_step(name):
    """Two times: one step of order 1, x_t' = a' x0 + s' eps, then the clean denoise. Also where a = 0."""
    net = teacher(FLOW, std=0.4)
    x = started(FLOW, 1.0)
    t, t_next = torch.tensor([1.0, 0.6], dtype=F64)
    x0 = net(x, t.expand(8), Condition()).x0
    state = 0.4 * x0 + 0.6 * x  # at pure noise eps is x
    got = getattr(samplers, name)(net, x, torch.tensor([1.0, 0.6]), Condition())
    torch.testing.assert_close(got, net(state, t_next.expand(8), Condition()).x0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_number_of_calls_and_the_times_asked(name):
    net, grid = Counting(teacher(FLOW)), times.shifted(7)
    getattr(samplers, name)(net, started(FLOW, 1.0), grid, Condition())
    asked = [float(t[0]) for t, _ in net.calls]
    want = grid.tolist()
    if name == "heun":  # each inner time is met as the end of a step and as the start of the next
        want = [want[0], *[t for t in want[1:] for _ in range(2)]]
    assert asked == want


@pytest.mark.parametrize("name", ALL)
def test_rows_do_not_see_each_other_and_half_precision_is_lifted(name):
    net, grid, x = teacher(FLOW), times.shifted(5), started(FLOW, 1.0)
    sampler = getattr(samplers, name)
    together = sampler(net, x, grid, Condition())
    assert torch.equal(sampler(net, x[3:5], grid, Condition()), together[3:5])
    half = sampler(net, x.half(), grid, Condition())
    assert half.dtype == torch.float32 and torch.equal(half, sampler(net, x.half().float(), grid, Condition()))


# --- trajectories -----------------------------------------------------------------------------------------------------

TARGETS = torch.tensor([1.0, 0.9375, 0.8333333333333334, 0.625], dtype=F64)


@pytest.mark.parametrize(
    "name, bound", [("euler", 0.02), ("heun", 1e-3), ("dpmpp_2m", 1e-3), ("res_2ab", 2e-3), ("unipc", 5e-4)]
)
def test_states_are_those_of_the_ode_at_exactly_the_times_asked_for(name, bound):
    net, grid, x = Counting(teacher(FLOW)), times.shifted(50, 5.0), started(FLOW, 1.0)
    plain = Counting(teacher(FLOW))
    sampler = getattr(samplers, name)
    sampler(plain, x, grid, Condition())
    path = samplers.trajectory(sampler, net, x, grid, Condition(), TARGETS)
    assert path.states.shape == (8, 4, 2) and torch.equal(path.times, TARGETS)
    assert len(net.calls) == len(plain.calls)
    for k, t in enumerate(TARGETS):
        exact = moved(FLOW, x, 1.0, t)
        assert float((path.states[:, k] - exact).abs().max()) < bound
        # A state one solver step away would be off by far more than the solver is:
        assert k == 0 or float((path.states[:, k] - moved(FLOW, x, 1.0, t - 0.01)).abs().max()) > 2e-3
    assert torch.equal(path.states[:, 0], x)


@pytest.mark.parametrize(
    "name, bound", [("euler", 1e-12), ("heun", 1e-12), ("dpmpp_2m", 2e-3), ("res_2ab", 3e-3), ("unipc", 1e-3)]
)
def test_a_restart_from_a_stored_state_reproduces_x0(name, bound):
    """cosmos.md A.5.11. One-step methods to rounding; multistep ones lose their memory, and no more than a step's error."""
    net, grid, x = teacher(FLOW), times.shifted(50, 5.0), started(FLOW, 1.0)
    sampler = getattr(samplers, name)
    path = samplers.trajectory(sampler, net, x, grid, Condition(), TARGETS)
    whole = samplers.with_targets(grid, TARGETS)
    for k, t in enumerate(TARGETS):
        again = sampler(net, path.states[:, k], whole[whole <= t], Condition())
        assert float((again - path.x0).abs().max()) < bound


def test_targets_take_the_places_of_their_neighbours():
    grid = times.shifted(10)
    full = samplers.with_targets(grid, torch.tensor([1.0, 0.76, 0.3], dtype=F64))
    torch.testing.assert_close(full, torch.tensor([1.0, 0.9, 0.76, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=F64))
    assert set(torch.tensor([1.0, 0.76, 0.3], dtype=F64).tolist()) <= set(full.tolist())  # to the bit
    for bad in ([1.1, 0.5], [0.5, 0.0]):
        with pytest.raises(ValueError, match="must lie between"):
            samplers.with_targets(grid, torch.tensor(bad, dtype=F64))


def test_a_target_below_the_grid_does_not_take_its_end_away():
    """The end of the grid decides how clean the last call is; a target gives it up only where no inner time is left."""
    full = samplers.with_targets(times.shifted(4), torch.tensor([0.3], dtype=F64))
    torch.testing.assert_close(full, torch.tensor([1.0, 0.75, 0.3, 0.25], dtype=F64))
