"""Our samplers against the schedulers of diffusers, stepping the same exact mixture through the same noise levels."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, RectifiedFlow, samplers, times
from fewstep.networks.analytic import GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers 0.42 with numpy 2

F64 = torch.float64
MIXTURE = GaussianMixture([[1.0, 0.3], [-0.8, -0.5], [0.2, 1.4]], [0.3, 0.6, 0.1], [1.0, 2.0, 1.0])
NONE = Condition()


def noise(num=6):
    return torch.randn(num, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


def exact(path, x, t):
    return MIXTURE.on(path)(x, torch.full((len(x),), float(t), dtype=F64), NONE)


def set_sigmas(scheduler, sigmas):
    """The noise levels of `sigmas` and a final 0, in float64: their own tables are float32."""
    scheduler.set_timesteps(len(sigmas))
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=F64)])
    scheduler.timesteps = torch.arange(len(sigmas), 0, -1).float()
    return scheduler


def test_euler_is_edm_euler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon")
    scheduler.set_timesteps(20)
    grid = times.karras(20)
    torch.testing.assert_close(scheduler.sigmas[:-1], grid, rtol=1e-5, atol=0, check_dtype=False)
    x = 80 * noise().float()
    ours = samplers.euler(MIXTURE.on(EDM()), x, scheduler.sigmas[:-1], NONE)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        scheduler.scale_model_input(x, t)
        x0 = exact(EDM(), x.double(), sigma).x0
        skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        x = scheduler.step(((x0 - skip * x) / out).float(), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_is_flow_match_euler(shift):
    grid = times.shifted(12, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times.shifted(12).tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], grid, rtol=1e-6, atol=0, check_dtype=False)
    x = noise()
    ours = samplers.euler(MIXTURE, x, grid, NONE)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(exact(RectifiedFlow(), x, scheduler.sigmas[i]).velocity, t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("num", [4, 12, 40])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_dpmpp_2m_is_dpm_solver_multistep_on_flow(num, shift):
    """From pure noise, sigma = 1, where lambda is -inf."""
    grid = times.shifted(num, shift)
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=1.0,
    )
    set_sigmas(scheduler, grid)
    x = noise()
    ours = samplers.dpmpp_2m(MIXTURE, x, grid, NONE)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(exact(RectifiedFlow(), x, grid[i]).velocity, t, x).prev_sample.double()
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)  # theirs steps in float32


def test_dpmpp_2m_is_edm_dpm_solver_multistep():
    grid = times.karras(20)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, solver_type="midpoint")
    set_sigmas(scheduler, grid)
    x = 80 * noise()
    ours = samplers.dpmpp_2m(MIXTURE.on(EDM()), x, grid, NONE)
    for i, t in enumerate(scheduler.timesteps):
        sigma = grid[i]
        skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        x = scheduler.step((exact(EDM(), x, sigma).x0 - skip * x) / out, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


def unipc(order, lower_order_final=True, **kind):
    return UniPCMultistepScheduler(
        solver_type="bh2", solver_order=order, predict_x0=True, lower_order_final=lower_order_final, **kind
    )


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}


@pytest.mark.parametrize("num", [3, 8, 35])
def test_unipc_2_is_theirs_on_flow(num):
    """From 0.999: at sigma 1 their system of equations holds an infinity."""
    grid = times.shifted(num, 5.0)
    grid[0] = 0.999
    scheduler = set_sigmas(unipc(2, **FLOW), grid)
    x = noise()
    ours = samplers.unipc(MIXTURE, x, grid, NONE, order=2)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(exact(RectifiedFlow(), x, grid[i]).velocity, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("num", [3, 8, 35])
def test_unipc_is_theirs_on_flow_in_every_state_and_x0(order, num):
    """Ours keeps its order to the last time; theirs lowers it near the end (lower_order_final), so that is off here."""
    grid = times.shifted(num, 5.0)
    grid[0] = 0.999
    scheduler = set_sigmas(unipc(order, lower_order_final=False, **FLOW), grid)
    asked = []

    def on_state(t, x):
        asked.append(x)

    x = noise()
    ours = samplers.unipc(MIXTURE, x, grid, NONE, order=order, on_state=on_state)
    for i, t in enumerate(scheduler.timesteps):
        answer = exact(RectifiedFlow(), x, grid[i])
        last_x0 = answer.x0
        if i == num - 1:  # the step to sigma 0 divides by 0 at this order; ours ends with the clean denoise
            break
        x = scheduler.step(answer.velocity, t, x).prev_sample
        torch.testing.assert_close(asked[i], scheduler.last_sample, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, last_x0, rtol=1e-10, atol=1e-10)


def test_unipc_is_theirs_on_vp():
    """Stable Diffusion's own: epsilon prediction, sigma = s/a, alpha = 1/sqrt(1 + sigma^2)."""
    path = VP("scaled_linear")
    grid = times.even(15, 0.999)
    a, s, _, _ = path.coefficients(grid)
    scheduler = set_sigmas(unipc(2, prediction_type="epsilon", beta_schedule="scaled_linear"), s / a)
    x = noise()
    ours = samplers.unipc(MIXTURE.on(path), x, grid, NONE)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(exact(path, x, grid[i]).eps, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
