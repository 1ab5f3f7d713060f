"""Against a double loop, and against the expectation of the cubic kernel in one dimension."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evaluation import mmd as module
from fewstep.evaluation.mmd import mmd, mmd_of_subsets

torch.set_num_threads(1)


def by_loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    within_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    return float(within_a + within_b - 2 * np.mean([k(x, y) for x in a for y in b]))


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 20), (7, 31), (2, 2)])
@pytest.mark.parametrize("elements", [1 << 23, 16])
def test_against_loops_with_unequal_sizes(num_a: int, num_b: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    rng = np.random.default_rng(num_a)
    a, b = rng.normal(size=(num_a, 5)), rng.normal(size=(num_b, 5)) + 0.5
    assert mmd(a, b) == pytest.approx(by_loops(a, b), rel=1e-10)
    assert mmd(torch.tensor(a), torch.tensor(b)) == mmd(a, b) == pytest.approx(mmd(b, a), rel=1e-10)


def test_closed_form_and_no_bias_at_small_n() -> None:
    """d = 1, N(0, 1) against N(m, 1): E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3, and the ones cancel."""
    m = 0.5
    first, second, third = m, m**2 + 1, m**3 + 3 * m  # moments of N(m, 1); those of N(0, 1) are 0, 1, 0
    truth = 3 * first**2 + 3 * (second - 1) ** 2 + third**2
    rng = np.random.default_rng(0)
    for num in (8, 64):
        scores = [mmd(rng.normal(size=num), rng.normal(size=num) + m) for _ in range(1600 // num * 4)]
        assert np.mean(scores) == pytest.approx(truth, abs=4 * np.std(scores) / len(scores) ** 0.5)
        assert np.std(scores) / len(scores) ** 0.5 < 0.6 * truth  # the check above has teeth


def test_equal_laws_fall_on_both_sides_of_zero() -> None:
    rng = np.random.default_rng(1)
    scores = [mmd(rng.normal(size=(32, 4)), rng.normal(size=(24, 4))) for _ in range(60)]
    assert 10 < sum(score < 0 for score in scores) < 50


def test_subsets_have_the_mmd_of_their_rows() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(20, 3)), rng.normal(size=(31, 3)) + 0.3
    subsets = (([3, 1, 8, 19], [30, 2, 7]), (list(range(20)), list(range(31))), ([0, 5], [1, 2]))
    assert mmd_of_subsets(a, b, [(torch.tensor(rows), torch.tensor(others)) for rows, others in subsets]) == pytest.approx(
        [by_loops(a[rows], b[others]) for rows, others in subsets], rel=1e-10
    )
