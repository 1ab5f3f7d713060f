"""Paths against finite differences, autograd, the constants of the references, and the tables of diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fewstep.diffusion import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.diffusion.path import spread

F64 = torch.float64
PATHS = [
    EDM(),
    EDM(sigma_data=1.0, t_max=200.0),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(sigma_data=0.5),
    VP("linear"),
    VP("scaled_linear"),
    VP("cosine"),
    VP("scaled_linear", zero_terminal_snr=True),
    VP("cosine", num_steps=50),
]


def grid(path) -> torch.Tensor:
    """Times all along the path, never on an entry of a VP table, where the derivative jumps."""
    return path.t_max * (torch.arange(0, 990, 15, dtype=F64) + 0.37) / 1000


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_by_finite_differences_inside(path):
    t, h = grid(path), 1e-5 * path.t_max
    a, s, da, ds = path.coefficients(t)
    after, before = path.coefficients(t + h), path.coefficients(t - h)
    torch.testing.assert_close(da, (after[0] - before[0]) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ds, (after[1] - before[1]) / (2 * h), rtol=1e-6, atol=1e-8)
    assert all(c.dtype == F64 for c in (a, s, da, ds))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_by_finite_differences_at_both_ends(path):
    for end, h in ((0.0, 1e-5), (path.t_max, -1e-5)):  # one-sided, of second order: (-3 f0 + 4 f1 - f2) / 2h
        h = h * path.t_max
        f0, f1, f2 = (path.coefficients(torch.tensor(end + k * h, dtype=F64)) for k in range(3))
        torch.testing.assert_close(f0[2], (-3 * f0[0] + 4 * f1[0] - f2[0]) / (2 * h), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(f0[3], (-3 * f0[1] + 4 * f1[1] - f2[1]) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_by_autograd(path):
    t = grid(path).requires_grad_()
    a, s, da, ds = path.coefficients(t)
    (by_autograd,) = torch.autograd.grad(s.sum(), t, retain_graph=True)
    torch.testing.assert_close(ds, by_autograd, rtol=1e-12, atol=1e-12)
    if a.requires_grad:  # EDM: a is 1
        (by_autograd,) = torch.autograd.grad(a.sum(), t)
        torch.testing.assert_close(da, by_autograd, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_ends(path):
    a, s, da, ds = path.coefficients(torch.tensor([0.0, path.t_max], dtype=F64))
    assert float(s[0]) == 0.0
    assert all(bool(torch.isfinite(c).all()) for c in (a, s, da, ds))
    assert bool((a * ds - s * da > 0).all())  # the determinant that Prediction divides by


ZERO_SNR = [
    VP(name, num_steps=num, zero_terminal_snr=True)
    for name in ("linear", "scaled_linear", "cosine")
    for num in (7, 50, 64, 1000)
]


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), TrigFlow(0.5), *ZERO_SNR], ids=str)
def test_pure_noise_holds_no_data_at_all(path):
    """a is exactly 0 at t_max, and also at the float32 next to it: float32(pi/2) is larger than pi/2."""
    for dtype in (torch.float64, torch.float32):
        a, s, _, _ = path.coefficients(torch.tensor(path.t_max, dtype=dtype))
        assert float(a) == 0.0 and float(s) == pytest.approx(1.0, abs=1e-12)
        assert float(path.time_of(s / a)) == path.t_max


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_time_of_inverts_the_ratio(path):
    t = torch.cat([torch.tensor([0.0, path.t_max, 1e-6 * path.t_max], dtype=F64), grid(path)])
    a, s, _, _ = path.coefficients(t)
    torch.testing.assert_close(path.time_of(s / a), t, rtol=1e-10, atol=1e-12)
    assert float(path.time_of(torch.tensor(math.inf))) == path.t_max
    assert float(path.time_of(torch.tensor(0.0))) == 0.0


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_time_of_never_goes_beyond_the_end(path):
    t = path.time_of(torch.logspace(-8, 12, 200, dtype=F64))
    assert bool((t[1:] >= t[:-1]).all()) and float(t[-1]) <= path.t_max


def test_add_noise_by_hand():
    x0, eps = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64), torch.tensor([[5.0, 6.0], [7.0, 8.0]], dtype=F64)
    t = torch.tensor([0.25, 1.0], dtype=F64)
    torch.testing.assert_close(RectifiedFlow().add_noise(x0, eps, t), torch.tensor([[2.0, 3.0], [7.0, 8.0]], dtype=F64))
    torch.testing.assert_close(EDM().add_noise(x0, eps, t), torch.tensor([[2.25, 3.5], [10.0, 12.0]], dtype=F64))
    half = TrigFlow(sigma_data=0.5).add_noise(x0, eps, torch.full((2,), math.pi / 6, dtype=F64))
    torch.testing.assert_close(half, math.sqrt(3) * x0 + eps / 2)


def test_every_frame_may_have_its_own_time():
    x0, eps = torch.randn(2, 2, 3, 4, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.rand(2, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    together = RectifiedFlow().add_noise(x0, eps, t)
    for row in range(2):
        for frame in range(4):
            alone = (1 - t[row, frame]) * x0[row, :, frame] + t[row, frame] * eps[row, :, frame]
            torch.testing.assert_close(together[row, :, frame], alone)


def test_half_precision_is_stored_but_never_computed_in():
    x0, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.full((5,), 0.999)
    noisy = TrigFlow().add_noise(x0, eps, t)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, TrigFlow().add_noise(x0.float(), eps.float(), t))


def test_time_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"one time per frame"):
        spread(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\) does not fit data of shape \(2, 1, 4, 1, 1\)"):
        spread(torch.zeros(2, 3), torch.zeros(2, 1, 4, 1, 1))


# --- the references -----------------------------------------------------------------------------------------------------


def ratio(path, t):
    a, s, _, _ = path.coefficients(t)
    return s / a


def test_trigflow_and_rectified_flow():
    """cosmos.md 2.1: s = sin t / (cos t + sin t), z_s = x_t / (cos t + sin t), sigma = sigma_d tan t."""
    t = torch.linspace(0.0, 1.57, 50, dtype=F64)
    s = t.sin() / (t.cos() + t.sin())
    torch.testing.assert_close(RectifiedFlow().time_of(ratio(TrigFlow(), t)), s, rtol=1e-12, atol=1e-14)
    a_rf, s_rf, _, _ = RectifiedFlow().coefficients(s)
    a_trig, s_trig, _, _ = TrigFlow().coefficients(t)
    torch.testing.assert_close(a_rf, a_trig / (t.cos() + t.sin()), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(s_rf, s_trig / (t.cos() + t.sin()), rtol=1e-12, atol=1e-13)
    for sigma_data in (0.5, 1.0):
        sigma = EDM(t_max=1e9).time_of(ratio(TrigFlow(sigma_data), t))
        torch.testing.assert_close(sigma, sigma_data * t.tan(), rtol=1e-12, atol=1e-14)


def test_student_schedule_of_predict_2_5():
    """cosmos.md 2.2: [pi/2, atan 15, atan 5, atan 5/3] is [1, .9375, .8333, .625]."""
    trig = torch.tensor([math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)], dtype=F64)
    flow = torch.tensor([1.0, 15 / 16, 5 / 6, 5 / 8], dtype=F64)
    torch.testing.assert_close(RectifiedFlow().time_of(ratio(TrigFlow(), trig)), flow, rtol=1e-14, atol=0)
    torch.testing.assert_close(TrigFlow().time_of(ratio(RectifiedFlow(), flow)), trig, rtol=1e-14, atol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    "schedule, name, betas",
    [
        ("linear", "linear", (0.0001, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("scaled_linear", "scaled_linear", (0.001, 0.02)),
        ("cosine", "squaredcos_cap_v2", None),
    ],
)
def test_vp_tables_are_those_of_diffusers(schedule, name, betas, zero_terminal_snr):
    ends = {} if betas is None else {"beta_start": betas[0], "beta_end": betas[1]}
    path = VP(schedule, zero_terminal_snr=zero_terminal_snr, **ends)
    t = (torch.arange(1000, dtype=F64) + 1) / 1000
    a, s, _, _ = path.coefficients(t)
    for scheduler in (DDPMScheduler, DDIMScheduler):
        table = scheduler(beta_schedule=name, rescale_betas_zero_snr=zero_terminal_snr, **ends).alphas_cumprod.double()
        torch.testing.assert_close(a**2, table, rtol=2e-5, atol=2e-6)  # theirs is a float32 product
        torch.testing.assert_close(s**2, 1 - table, rtol=2e-5, atol=2e-6)


def test_vp_defaults_are_ddpm_and_stable_diffusion():
    assert torch.equal(VP("linear").angles, VP("linear", 0.0001, 0.02).angles)
    assert torch.equal(VP("scaled_linear").angles, VP("scaled_linear", 0.00085, 0.012).angles)


def test_vp_velocity_is_v_prediction_times_the_turn_of_the_angle():
    """Salimans & Ho 2022: v = alpha eps - sigma x0; dx/dt = phi'(t) v, phi = atan(s / a)."""
    path = VP()
    t = torch.tensor([0.1234], dtype=F64)
    a, s, da, ds = path.coefficients(t)
    h = 1e-5
    turn = (torch.atan(ratio(path, t + h)) - torch.atan(ratio(path, t - h))) / (2 * h)
    torch.testing.assert_close(da, -turn * s, rtol=1e-8, atol=0)
    torch.testing.assert_close(ds, turn * a, rtol=1e-8, atol=0)
