"""Against the eigenvalues of the kernel matrix, and sets whose diversity can be counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.evaluation.diversity import mean_pairwise_distance, vendi

torch.set_num_threads(1)


def test_vendi_counts_what_can_be_counted() -> None:
    assert vendi(np.eye(6)) == pytest.approx(6, rel=1e-12)
    assert vendi(np.repeat(np.eye(4), 5, axis=0) * 7) == pytest.approx(4, rel=1e-12)
    assert vendi(np.ones((9, 3))) == pytest.approx(1, rel=1e-12)
    three_to_one = np.repeat(np.eye(2), [3, 1], axis=0)
    assert vendi(three_to_one) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-12)


@pytest.mark.parametrize("shape", [(30, 5), (5, 30)])
def test_vendi_against_the_kernel_matrix(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(rows))
    values = values[values > 1e-14]
    assert vendi(rows) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-10)


def test_mean_pairwise_distance() -> None:
    assert mean_pairwise_distance(np.array([[0.0], [1.0], [3.0]])) == pytest.approx((1 + 3 + 2) / 3)
    groups = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert mean_pairwise_distance(groups) == pytest.approx(2.5)  # the second prompt has collapsed


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="1 feature rows are all zero"):
        vendi(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="have shape"):
        mean_pairwise_distance(np.zeros(3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_pairwise_distance(np.zeros((3, 1, 2)))
