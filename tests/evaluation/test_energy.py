"""Against double loops, scipy's one-dimensional V-statistic, and the closed form for Gaussians on a line."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats
import torch

from fewstep.evaluation import energy as module
from fewstep.evaluation import energy_distance

torch.set_num_threads(1)


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return math.dist(a, b)

    within_x = np.mean([apart(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([apart(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return float(2 * np.mean([apart(a, b) for a in x for b in y]) - within_x - within_y)


@pytest.mark.parametrize(("num_x", "num_y", "dims"), [(20, 20, 2), (7, 31, 5), (2, 2, 1)])
@pytest.mark.parametrize("elements", [1 << 23, 16])
def test_against_loops(num_x: int, num_y: int, dims: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    rng = np.random.default_rng(num_x)
    x, y = rng.normal(size=(num_x, dims)), rng.normal(size=(num_y, dims)) + 0.5
    assert energy_distance(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)
    assert energy_distance(torch.tensor(x), y) == energy_distance(x, y)


def test_float32_samples_have_the_distance_of_the_same_numbers_in_float64() -> None:
    x, y = torch.randn(3000, 2, generator=torch.manual_seed(0)), 0.9 * torch.randn(2500, 2) + 0.1
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.double(), y.double()), abs=1e-7)


def test_against_scipy_whose_pairs_include_each_sample_with_itself() -> None:
    """scipy returns the root of the V-statistic: its within terms are ours times (n - 1) / n."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), 1.3 * rng.normal(size=45) + 0.4
    within = [np.abs(values[:, None] - values).sum() / len(values) ** 2 for values in (x, y)]
    correction = sum(w / (len(values) - 1) for w, values in zip(within, (x, y)))
    assert energy_distance(x, y) == pytest.approx(scipy.stats.energy_distance(x, y) ** 2 - correction, rel=1e-10)


def folded(mean: float, std: float) -> float:
    """E |Z| for Z ~ N(mean, std^2)."""
    tail = math.erf(mean / (std * math.sqrt(2)))
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * tail


def test_two_gaussians_on_a_line() -> None:
    m, s = 0.7, 1.5
    truth = 2 * folded(m, math.sqrt(1 + s * s)) - folded(0, math.sqrt(2)) - folded(0, s * math.sqrt(2))
    rng = np.random.default_rng(1)
    scores = [energy_distance(rng.normal(size=400), m + s * rng.normal(size=300)) for _ in range(60)]
    error = np.std(scores) / len(scores) ** 0.5
    assert error < 0.05 * truth
    assert np.mean(scores) == pytest.approx(truth, abs=4 * error)


def test_unbiased_around_zero_even_for_few_samples() -> None:
    rng = np.random.default_rng(2)
    scores = [energy_distance(rng.normal(size=(12, 2)), rng.normal(size=(9, 2))) for _ in range(300)]
    assert abs(np.mean(scores)) < 4 * np.std(scores) / 300**0.5
    assert min(scores) < 0 < max(scores)


def test_thousands_of_points_are_quick() -> None:
    rng = np.random.default_rng(3)
    start = time.perf_counter()
    assert abs(energy_distance(rng.normal(size=(4000, 2)), rng.normal(size=(4000, 2)))) < 0.01
    assert time.perf_counter() - start < 10  # 0.3 s on a quiet core


def test_wrong_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="y: 1 of 3 rows are not finite"):
        energy_distance(np.zeros((3, 2)), np.array([[0, 0], [np.nan, 0], [0, 0.0]]))
    with pytest.raises(ValueError, match="x has 2 columns and y has 3"):
        energy_distance(np.zeros((3, 2)), np.zeros((3, 3)))
