"""Grids against their formulas, distributions against their laws on every path."""

import math

import pytest
import scipy.stats
import torch

from fewstep.diffusion import EDM, VP, RectifiedFlow, Rng, TrigFlow, times

F64 = torch.float64
PATHS = [
    EDM(),
    EDM(t_max=1e6),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(0.5),
    VP("linear"),
    VP("cosine"),
    VP(zero_terminal_snr=True),
]
FLOW = RectifiedFlow()


def ratio(path, t):
    a, s, _, _ = path.coefficients(torch.as_tensor(t, dtype=F64))
    return s / a


# --- grids ------------------------------------------------------------------------------------------------------------


def test_karras_is_equation_5():
    """Karras et al. 2022: (smax^(1/rho) + i/(N-1) (smin^(1/rho) - smax^(1/rho)))^rho; cosmos.md A.1 counts i = 0 .. N."""
    grid = times.karras(36)
    by_hand = [(80 ** (1 / 7) + i / 35 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(36)]
    torch.testing.assert_close(grid, torch.tensor(by_hand, dtype=F64), rtol=1e-13, atol=0)
    assert float(grid[0]) == pytest.approx(80, rel=1e-14) and float(grid[-1]) == pytest.approx(0.002, rel=1e-10)
    straight = times.karras(5, 70.0, 0.02, rho=1.0)
    torch.testing.assert_close(straight, torch.linspace(70.0, 0.02, 5, dtype=F64))
    assert times.karras(1).tolist() == [pytest.approx(80)]
    times.explicit(grid.tolist(), EDM())  # within the path, although 80 comes out of a seventh power


def test_shifted_is_the_schedule_of_predict_2_5():
    torch.testing.assert_close(times.shifted(4, 5.0), torch.tensor([1.0, 15 / 16, 5 / 6, 5 / 8], dtype=F64))
    torch.testing.assert_close(times.shifted(4), torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64))
    grid = times.shifted(35, 5.0)  # a shift by s multiplies the ratio s/a by s
    torch.testing.assert_close(ratio(FLOW, grid[1:]), 5 * ratio(FLOW, times.shifted(35)[1:]), rtol=1e-12, atol=0)


def test_even():
    torch.testing.assert_close(times.even(4, 2.0), torch.tensor([2.0, 1.5, 1.0, 0.5], dtype=F64))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_on_flow_is_evenly_spaced_in_unshifted_flow_time(path, shift):
    grid = times.on_flow(9, path, shift)
    assert float(grid[0]) == path.t_max and len(grid) == 9
    times.explicit(grid.tolist(), path)
    unshifted = FLOW.time_of(ratio(path, grid) / shift)
    torch.testing.assert_close(unshifted.diff(), -unshifted[:1].expand(8) / 9, rtol=1e-9, atol=1e-12)


def test_converted():
    trig = times.converted(times.shifted(4, 5.0), FLOW, TrigFlow())
    torch.testing.assert_close(trig, torch.tensor([math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)], dtype=F64))
    torch.testing.assert_close(times.converted(times.karras(36), EDM(), FLOW), times.karras(36) / (1 + times.karras(36)))
    torch.testing.assert_close(times.converted(times.karras(36), EDM(), TrigFlow(0.5)), torch.atan(times.karras(36) / 0.5))


@pytest.mark.parametrize("target", [EDM(), VP("scaled_linear")], ids=str)
def test_converted_refuses_ratios_beyond_the_end(target):
    """sigma 100 does not exist on EDM, and pure noise is on neither: an end quietly moved is another schedule."""
    with pytest.raises(ValueError, match=r"beyond the end"):
        times.converted(torch.tensor([1.0, 0.5], dtype=F64), FLOW, target)
    with pytest.raises(ValueError, match=r"beyond the end"):
        times.converted(torch.tensor([0.999, 0.5], dtype=F64), FLOW, target)


def test_explicit_is_checked():
    assert times.explicit([0.9, 0.5]).tolist() == [0.9, 0.5] and times.explicit((80,)).dtype == F64
    for bad in ([], [0.5, 0.9], [0.5, 0.5], [0.5, 0.0], [0.5, -0.1], [0.9, math.nan]):
        with pytest.raises(ValueError, match="descending"):
            times.explicit(bad)
    with pytest.raises(ValueError, match=r"80\.0 is beyond the path's t_max of 1\.0"):
        times.explicit([80.0, 0.5], FLOW)
    times.explicit(torch.tensor([math.pi / 2, 1.0]), TrigFlow())  # float32(pi/2) is above pi/2


# --- distributions ----------------------------------------------------------------------------------------------------

RNG = {"seed": 5, "rows": range(4000)}


def passes(sample: torch.Tensor, law: str, *args: float) -> bool:
    return scipy.stats.kstest(sample.flatten().numpy(), law, args=args).pvalue > 1e-3


DISTRIBUTIONS = [
    times.Uniform(0.1, 0.9),
    times.LogNormal(),
    times.LogitNormal(),
    times.Shifted(),
    times.KarrasIndex(),
    times.Listed((0.9, 0.5)),
]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("times_", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_shapes_and_range(path, times_):
    one, frames = times_.draw(Rng(1, rows=range(6)), path), times_.draw(Rng(1, rows=range(6)), path, (5,))
    assert one.shape == (6,) and frames.shape == (6, 5) and one.dtype == frames.dtype == F64
    assert bool((frames > 0).all()) and bool((frames <= path.t_max).all())
    part = times_.draw(Rng(1, rows=range(2, 4)), path, (5,))
    assert torch.equal(part, frames[2:4])  # a row's time does not know its batch


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_uniform(path):
    t = times.Uniform(0.25, 0.75).draw(Rng(**RNG), path, (2,))
    assert passes(t / path.t_max, "uniform", 0.25, 0.5)


@pytest.mark.parametrize(
    "path", [EDM(t_max=1e6), FLOW, TrigFlow(), TrigFlow(0.5), VP("linear", zero_terminal_snr=True)], ids=str
)
@pytest.mark.parametrize("law", [times.LogNormal(), times.LogNormal(0.0, 1.0, scale=4.0)], ids=str)
def test_log_normal_is_normal_in_the_log_of_the_ratio(path, law):
    t = law.draw(Rng(**RNG), path, (2,))
    assert passes((ratio(path, t) / law.scale).log(), "norm", law.mean, law.std)


def test_log_normal_beyond_sigma_max_is_held_there():
    law = times.LogNormal(2.0, 2.0)
    t = law.draw(Rng(**RNG), EDM(), (5,))
    share = float((t == 80).double().mean())
    tail = scipy.stats.norm.sf((math.log(80) - 2) / 2)
    assert abs(share - tail) < 4 * (tail * (1 - tail) / t.numel()) ** 0.5


@pytest.mark.parametrize(
    "path", [EDM(t_max=1e6), FLOW, TrigFlow(), TrigFlow(0.5), VP("linear", zero_terminal_snr=True)], ids=str
)
def test_logit_normal_is_normal_in_the_logit_of_flow_time(path):
    t = times.LogitNormal(0.3, 0.8).draw(Rng(**RNG), path, (2,))
    assert passes(torch.logit(FLOW.time_of(ratio(path, t))), "norm", 0.3, 0.8)


@pytest.mark.parametrize(
    "path", [EDM(t_max=1e9), FLOW, TrigFlow(), TrigFlow(0.5), VP("linear", zero_terminal_snr=True)], ids=str
)
def test_shifted_is_uniform_before_the_shift(path):
    """cosmos.md 2.3: u ~ U(0,1), s = 5u/(1+4u), t = atan(s/(1-s))."""
    t = times.Shifted(5.0, 0.1, 0.9).draw(Rng(**RNG), path, (2,))
    s = FLOW.time_of(ratio(path, t))
    assert passes(s / (5 - 4 * s), "uniform", 0.1, 0.8)
    u = Rng(**RNG).uniform((2,)) * 0.8 + 0.1
    torch.testing.assert_close(s, 5 * u / (1 + 4 * u), rtol=1e-10, atol=0)
    if path == TrigFlow():
        torch.testing.assert_close(t, torch.atan(s / (1 - s)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", [EDM(t_max=1e6), FLOW, TrigFlow(0.5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_karras_index_draws_entries_of_the_grid(path, scale):
    """cosmos.md 1.2: index uniform in [20, 980] of a 1000-point grid over [0.002, 80], times sqrt(latent T)."""
    sigma = ratio(path, times.KarrasIndex(scale=scale).draw(Rng(**RNG), path, (10,))).flatten() / scale
    grid = times.karras(1000)
    place = (sigma[:, None] - grid.flip(0)).abs().argmin(1)  # the index from the clean end
    torch.testing.assert_close(sigma, grid.flip(0)[place], rtol=1e-9, atol=0)
    index = 999 - place
    assert int(index.min()) == 20 and int(index.max()) == 980
    assert scipy.stats.chisquare(torch.bincount(index, minlength=981)[20:].numpy()).pvalue > 1e-3


def test_karras_index_is_held_at_the_end_of_the_path():
    t = times.KarrasIndex(scale=4.0).draw(Rng(**RNG), EDM(), (10,))
    assert float(t.max()) == 80.0


def test_listed_draws_each_as_often():
    t = times.Listed((0.9, 0.5, 0.2)).draw(Rng(**RNG), FLOW, (2,))
    counts = [int((t == value).sum()) for value in (0.9, 0.5, 0.2)]
    assert sum(counts) == t.numel() and scipy.stats.chisquare(counts).pvalue > 1e-3
    assert [name for name, _ in times.Listed().problems()] == ["times"]
    with pytest.raises(ValueError, match="beyond the path"):
        times.Listed((80.0,)).draw(Rng(1), FLOW)
