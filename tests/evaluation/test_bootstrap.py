"""Against the standard error of a mean, which is known, and against the true spread over fresh sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evaluation import frechet_distance, precision_recall
from fewstep.evaluation.bootstrap import half_sampled, halves

torch.set_num_threads(1)


def mean(x: np.ndarray) -> float:
    return float(x.mean())


def test_halves_give_the_standard_error_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(size=200)
    known = x.std(ddof=1) / 200**0.5
    half = half_sampled(mean, x, draws=2000)
    assert half.spread == pytest.approx(known, rel=0.08) and half.value == x.mean() and half.num == 200
    assert half.draws[:3] == tuple(x[pick.numpy()].mean() for pick in halves(200, 3))  # the same clips for every model
    low, high = half.interval()
    assert high - low == pytest.approx(2 * 1.96 * known, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(1)
    intervals = [half_sampled(mean, rng.normal(size=60), draws=200).interval(0.8) for _ in range(150)]
    assert 0.7 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.9


def test_halves_keep_the_spread_of_a_frechet_distance() -> None:
    rng = np.random.default_rng(2)
    sets = [(rng.normal(size=(128, 8)) * 1.5, rng.normal(size=(256, 8))) for _ in range(40)]
    truth = np.std([frechet_distance(a, b) for a, b in sets], ddof=1)
    half = np.mean([half_sampled(frechet_distance, a, b, draws=60).spread for a, b in sets[:6]])
    assert 0.7 * truth < half < 1.8 * truth


def test_coverage_spread_against_fresh_sets() -> None:
    rng = np.random.default_rng(3)

    def coverage(fake: np.ndarray, real: np.ndarray) -> float:
        return precision_recall(real, fake).coverage

    sets = [(rng.normal(size=(96, 6)) * 1.2, rng.normal(size=(96, 6))) for _ in range(40)]
    truth = np.std([coverage(a, b) for a, b in sets], ddof=1)
    half = np.mean([half_sampled(coverage, a, b, draws=60).spread for a, b in sets[:6]])
    assert 0.6 * truth < half < 1.6 * truth


def test_clips_are_drawn_whole() -> None:
    clips = np.repeat(np.arange(10.0)[:, None], 16, axis=1)  # 16 frames, all alike within a clip
    assert half_sampled(mean, clips, draws=1000).spread == pytest.approx(np.arange(10.0).std(ddof=1) / 10**0.5, rel=0.1)


def test_fewer_than_four_clips_have_no_spread() -> None:
    few = half_sampled(mean, np.array([1.0, 2.0, 6.0]))
    assert few.value == 3 and few.num == 3 and np.isnan(few.spread) and few.draws == ()
