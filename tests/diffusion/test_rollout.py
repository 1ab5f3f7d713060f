"""few_step and rollout against loops written out by hand, and where their gradients run."""

import math

import pytest
import torch

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, Rng, StudentSampler, TrigFlow, few_step, rollout, samplers
from fewstep.diffusion.rollout import start
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
NONE = Condition()
MIXTURE = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6])
TRIG = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))
CASES = [
    (RectifiedFlow(), (1.0, 0.9375, 0.8333333333333334, 0.625)),
    (TrigFlow(), TRIG),
    (TrigFlow(0.5), TRIG),
    (EDM(), (80.0, 5.0, 1.0)),
    (VP(zero_terminal_snr=True), (1.0, 0.7, 0.3)),
]


class Probe:
    """x0 = scale * x, and a count of the calls that could carry a gradient."""

    path = TrigFlow()

    def __init__(self):
        self.scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
        self.with_grad = []
        self.seen = []

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        self.with_grad.append(torch.is_grad_enabled())
        self.seen.append(x_t)
        return Prediction.of("x0", self.scale * x_t, x_t, t, self.path)


def noise(rows=range(5)):
    return Rng(3, rows=rows).normal((2,), F64)


def ask(path, x, t):
    return MIXTURE.on(path)(x, torch.full((len(x),), t, dtype=F64), NONE)


def by_hand(path, times, renoise, num_calls, rng, unit):
    """noise -> x0 -> a' x0 + s' noise -> x0 ..."""
    a, s = (c.tolist() for c in path.coefficients(torch.tensor(times, dtype=F64))[:2])
    x = s[0] * unit
    for i in range(num_calls):
        answer = ask(path, x, times[i])
        if i == num_calls - 1:
            return answer.x0
        if renoise == "fresh":
            again = rng.normal((2,), F64)
        elif renoise == "same":
            again = unit
        else:
            again = (x - a[i] * answer.x0) / s[i]
        x = a[i + 1] * answer.x0 + s[i + 1] * again
    return None


@pytest.mark.parametrize("path, times", CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
def test_is_the_loop_written_out(path, times, renoise):
    unit = noise()
    x = start(path, unit, times[0])
    for num_calls in range(1, len(times) + 1):
        got = rollout(MIXTURE.on(path), x, times, NONE, renoise=renoise, rng=Rng(9, rows=range(5)), num_calls=num_calls).x0
        want = by_hand(path, times, renoise, num_calls, Rng(9, rows=range(5)), unit)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(few_step(MIXTURE.on(path), x, times, NONE, renoise=renoise, rng=Rng(9, rows=range(5))), got)


def test_same_is_the_formula_of_predict_2_5():
    """cosmos.md 2.2: x <- cos t_next x0 + sin t_next init_noise."""
    path, unit = TrigFlow(), noise()
    x = unit
    for t, t_next in zip(TRIG, (*TRIG[1:], 0.0), strict=True):
        x0 = ask(path, x, t).x0
        x = math.cos(t_next) * x0 + math.sin(t_next) * unit
    got = few_step(MIXTURE.on(path), start(path, unit, TRIG[0]), TRIG, NONE, renoise="same")
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)


def test_ode_is_a_ddim_step():
    """On rectified flow a DDIM step is an Euler step, whatever its length."""
    times = (1.0, 0.7, 0.4)
    got = few_step(MIXTURE, noise(), times, NONE, renoise="ode")
    torch.testing.assert_close(got, samplers.euler(MIXTURE, noise(), torch.tensor(times, dtype=F64), NONE))


@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
@pytest.mark.parametrize("num_calls", [1, 2, 3, 4])
def test_num_calls_is_the_sampler_truncated(renoise, num_calls):
    """cosmos.md A.5.5: backward simulation of n calls is inference with the first n times, same seed, same noise."""
    path = TrigFlow()
    x = start(path, noise(), TRIG[0])
    trained = rollout(
        MIXTURE.on(path), x, TRIG, NONE, renoise=renoise, rng=Rng(4, 2, range(5)), num_calls=num_calls, with_grad=True
    ).x0
    used = StudentSampler(TRIG[:num_calls], path, renoise)(MIXTURE.on(path), noise(), NONE, Rng(4, 2, range(5)))
    assert torch.equal(trained, used)


@pytest.mark.parametrize("num_calls", [1, 2, 4])
@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
def test_the_gradient_runs_through_the_last_call_only(num_calls, renoise):
    net, x = Probe(), noise()
    x0 = rollout(net, x, TRIG, NONE, renoise=renoise, rng=Rng(1, rows=range(5)), num_calls=num_calls, with_grad=True).x0
    assert net.with_grad == [False] * (num_calls - 1) + [True]
    assert not any(state.requires_grad for state in net.seen)
    (gradient,) = torch.autograd.grad(x0.sum(), net.scale)
    torch.testing.assert_close(gradient, net.seen[-1].sum(), rtol=1e-10, atol=1e-10)  # d(scale x)/d scale at the last state


def test_without_with_grad_nothing_carries_a_gradient():
    net = Probe()
    assert not rollout(net, noise(), TRIG, NONE, renoise="same").x0.requires_grad
    assert not few_step(net, noise(), TRIG, NONE, renoise="same").requires_grad
    assert net.with_grad == [False] * 8


@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
def test_batch_size_changes_no_bit(renoise):
    sampler = StudentSampler(TRIG, TrigFlow(), renoise)
    seeds = [7, 2**32 - 1, 0, 123456789]

    def generate(some):
        rng = Rng.of_samples(some)
        return sampler(MIXTURE, rng.normal((2,)), NONE, rng)  # a flow student asked in TrigFlow

    together = generate(seeds)
    for row, seed in enumerate(seeds):
        assert torch.equal(generate([seed])[0], together[row])


def test_start_is_noise_of_the_right_size():
    unit = noise()
    torch.testing.assert_close(start(EDM(), unit, 80.0), 80 * unit)
    torch.testing.assert_close(start(TrigFlow(0.5), unit, math.pi / 2), unit)
    torch.testing.assert_close(start(RectifiedFlow(), unit, 0.999), 0.999 * unit)
    assert start(EDM(), unit.bfloat16(), 80.0).dtype == torch.float32


@pytest.mark.parametrize("renoise", ["same", "ode", "fresh"])
def test_half_precision_is_computed_in_float32(renoise):
    half = noise().bfloat16()
    got = few_step(MIXTURE, half, (1.0, 0.7), NONE, renoise=renoise, rng=Rng(1, rows=range(5)))
    want = few_step(MIXTURE, half.float(), (1.0, 0.7), NONE, renoise=renoise, rng=Rng(1, rows=range(5)))
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_times_as_a_float32_tensor_are_the_same_sampler():
    a = few_step(MIXTURE.on(TrigFlow()), noise(), torch.tensor(TRIG), NONE, renoise="same")
    torch.testing.assert_close(a, few_step(MIXTURE.on(TrigFlow()), noise(), TRIG, NONE, renoise="same"), rtol=1e-5, atol=1e-5)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="needs an rng"):
        few_step(MIXTURE, noise(), (1.0, 0.5), NONE)
    for num_calls in (0, 3):
        with pytest.raises(ValueError, match=rf"1 \.\. 2, the length of times, but is {num_calls}"):
            rollout(MIXTURE, noise(), (1.0, 0.5), NONE, renoise="same", num_calls=num_calls)
    with pytest.raises(ValueError, match="descending"):
        few_step(MIXTURE, noise(), (0.5, 1.0), NONE, renoise="same")
    with pytest.raises(ValueError, match="beyond the path"):
        few_step(MIXTURE, noise(), (80.0, 1.0), NONE, renoise="same")


@pytest.mark.parametrize("path, t", [(EDM(), 1.0), (RectifiedFlow(), 0.75), (TrigFlow(), math.atan(5))], ids=str)
def test_a_first_time_that_is_not_pure_noise_is_refused(path, t):
    """The default t_list of a flow, put on EDM, would show the student noise of size 1 and call it sigma 1."""
    with pytest.raises(ValueError, match=r"not pure noise.*t_max"):
        start(path, noise(), t)
    start(path, noise(), 0.99999 * path.t_max)
    start(VP(), noise(), 1.0)  # Stable Diffusion's last time is as near as it goes
