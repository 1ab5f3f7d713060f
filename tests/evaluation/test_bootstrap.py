"""Against the standard error of a mean, which is known, and against the true spread over fresh sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evaluation import frechet_distance, precision_recall
from fewstep.evaluation.bootstrap import Spread, half_sampled, resampled

torch.set_num_threads(1)


def mean(x: np.ndarray) -> float:
    return float(x.mean())


def test_both_give_the_standard_error_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(size=200)
    known = x.std(ddof=1) / 200**0.5
    half = half_sampled(mean, x, draws=2000)
    full = resampled(mean, x, draws=2000)
    assert half.stderr == pytest.approx(known, rel=0.08) and full.stderr == pytest.approx(known, rel=0.08)
    for spread in (half, full):
        assert spread.value == x.mean() and spread.num == 200 and spread.level == 0.95
        assert spread.high - spread.low == pytest.approx(2 * 1.96 * known, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(1)
    for method in (half_sampled, resampled):
        spreads = [method(mean, rng.normal(size=60), draws=200, level=0.8) for _ in range(150)]
        assert 0.7 < np.mean([s.low <= 0 <= s.high for s in spreads]) < 0.9


def test_replacement_would_raise_a_frechet_distance_and_halves_keep_its_spread() -> None:
    rng = np.random.default_rng(2)
    sets = [(rng.normal(size=(128, 8)) * 1.5, rng.normal(size=(256, 8))) for _ in range(40)]
    truth = np.std([frechet_distance(a, b) for a, b in sets], ddof=1)
    half = np.mean([half_sampled(frechet_distance, a, b, draws=60).stderr for a, b in sets[:6]])
    assert 0.7 * truth < half < 1.8 * truth
    a, b = sets[0]
    with_copies = resampled(frechet_distance, a, b, draws=60)
    assert with_copies.low > with_copies.value - with_copies.stderr  # nearly the whole interval lies above the score itself


def test_coverage_spread_against_fresh_sets() -> None:
    rng = np.random.default_rng(3)

    def coverage(fake: np.ndarray, real: np.ndarray) -> float:
        return precision_recall(real, fake).coverage

    sets = [(rng.normal(size=(96, 6)) * 1.2, rng.normal(size=(96, 6))) for _ in range(40)]
    truth = np.std([coverage(a, b) for a, b in sets], ddof=1)
    half = np.mean([half_sampled(coverage, a, b, draws=60).stderr for a, b in sets[:6]])
    assert 0.6 * truth < half < 1.6 * truth


def test_clips_are_drawn_whole_and_pairs_together() -> None:
    clips = np.repeat(np.arange(10.0)[:, None], 16, axis=1)  # 16 frames, all alike within a clip
    assert resampled(mean, clips).stderr == pytest.approx(np.arange(10.0).std() / 10**0.5, rel=0.1)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def gap(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).mean())

    assert half_sampled(gap, x, x + 1, paired=True).stderr < 1e-7
    assert half_sampled(gap, x, x + 1).stderr > 0.05
    assert resampled(gap, x, x + 1, paired=True).stderr < 1e-7


def test_verdicts() -> None:
    spread = Spread(1.0, 0.1, 0.8, 1.2, 0.95, 10, 100)
    assert [spread.verdict(bound) for bound in (1.5, 1.1, 0.5)] == ["met", "undetermined", "missed"]
    assert [spread.verdict(bound, "higher") for bound in (1.5, 1.1, 0.5)] == ["missed", "undetermined", "met"]


def test_wrong_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sets of \[3\] clips are too few"):
        half_sampled(mean, np.zeros(3))
    with pytest.raises(ValueError, match="paired sets must hold the same clips"):
        resampled(lambda a, b: 0.0, np.zeros(5), np.zeros(6), paired=True)
