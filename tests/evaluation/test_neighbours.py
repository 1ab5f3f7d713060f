"""Against a double loop over the definitions, and on sets whose answer is known by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evaluation import neighbours, precision_recall
from fewstep.evaluation.neighbours import num_zero_balls, of_subsets

torch.set_num_threads(1)


def by_loops(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radius(rows: np.ndarray, i: int) -> float:
        return sorted(float(np.sqrt(((rows[i] - rows[j]) ** 2).sum())) for j in range(len(rows)) if j != i)[k - 1]

    def within(a: np.ndarray, b: np.ndarray, r: float) -> bool:
        return float(np.sqrt(((a - b) ** 2).sum())) <= r

    of_real = [radius(real, i) for i in range(len(real))]
    of_fake = [radius(fake, j) for j in range(len(fake))]
    precision = np.mean([any(within(f, r, d) for r, d in zip(real, of_real)) for f in fake])
    recall = np.mean([any(within(r, f, d) for f, d in zip(fake, of_fake)) for r in real])
    density = sum(within(f, r, d) for f in fake for r, d in zip(real, of_real)) / (k * len(fake))
    coverage = np.mean([any(within(f, r, d) for f in fake) for r, d in zip(real, of_real)])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize(("num_real", "num_fake", "k", "shift"), [(40, 40, 5, 0.0), (30, 17, 3, 0.7), (12, 25, 1, 2.0)])
@pytest.mark.parametrize("elements", [1 << 23, 64])
def test_against_loops(
    num_real: int, num_fake: int, k: int, shift: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_ELEMENTS", elements)  # 64: many small blocks
    rng = np.random.default_rng(num_real)
    real, fake = rng.normal(size=(num_real, 3)), rng.normal(size=(num_fake, 3)) + shift
    assert precision_recall(real, fake, k) == pytest.approx(by_loops(real, fake, k), abs=1e-12)


def test_known_answers() -> None:
    line = np.arange(10.0)
    same = precision_recall(line, line, k=2)
    assert same.precision == same.recall == same.coverage == 1
    far = precision_recall(line, line + 1000, k=2)
    assert far == (0, 0, 0, 0)
    half = precision_recall(np.concatenate([line, line + 1000]), line, k=2)  # one of two modes is missing
    assert half.precision == 1 and half.recall == half.coverage == 0.5


def collapsed(rng: np.random.Generator, scenes: np.ndarray, num: int, jitter: float) -> np.ndarray:
    return scenes[rng.integers(len(scenes), size=num)] + jitter * rng.normal(size=(num, scenes.shape[1]))


def test_jittered_collapse_is_seen_by_coverage_while_precision_stays() -> None:
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(2, 512, 8))
    healthy = precision_recall(real, other)
    sick = precision_recall(real, collapsed(rng, rng.normal(size=(16, 8)), 512, 0.15))
    assert healthy.coverage > 0.9 and abs(healthy.density - 1) < 0.1
    assert sick.precision > 0.9 * healthy.precision
    assert sick.coverage < 0.5 * healthy.coverage
    assert sick.recall < 0.5 * healthy.recall
    noise = precision_recall(real, 3 * other)  # the opposite fault
    assert noise.precision < 0.5 and noise.recall > 0.9


def test_exact_copies_have_no_balls_and_are_counted() -> None:
    rng = np.random.default_rng(1)
    real = rng.normal(size=(128, 2))
    copies = np.repeat(real[:16], 8, axis=0)
    assert num_zero_balls(copies) == 128 and num_zero_balls(real) == 0
    assert num_zero_balls(copies, k=8) == 0
    score = precision_recall(real, copies)
    assert score.precision == 1 and score.recall == 16 / 128  # the artefact: only the copied ones themselves


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="fake has 5 rows, too few for k = 5"):
        precision_recall(np.zeros((9, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="real has 3 columns and fake has 2"):
        precision_recall(np.zeros((9, 3)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="k = 0"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), k=0)


def test_subsets_have_the_fractions_of_their_rows() -> None:
    rng = np.random.default_rng(5)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 0.7
    subsets = [(rng.permutation(40)[:num], rng.permutation(30)[: num - 4]) for num in (12, 25)]
    scores = of_subsets(real, fake, [(torch.from_numpy(r), torch.from_numpy(f)) for r, f in subsets], k=3)
    for (r, f), score in zip(subsets, scores, strict=True):
        assert score == pytest.approx(by_loops(real[r], fake[f], 3), abs=1e-12)


def test_subsets_in_which_few_of_the_nearest_lie_have_the_fractions_of_their_rows() -> None:
    """Two clusters, of which the subset has few rows of one: its k-th neighbours are not among the nearest that are kept."""
    rng = np.random.default_rng(6)
    real = np.concatenate([rng.normal(size=(120, 2)), 50 + rng.normal(size=(30, 2))])
    fake = real + 0.3 * rng.normal(size=real.shape)
    rows = np.concatenate([[3, 77], np.arange(120, 150)])
    (score,) = of_subsets(real, fake, [(torch.from_numpy(rows), torch.from_numpy(rows))], k=4)
    assert score == pytest.approx(by_loops(real[rows], fake[rows], 4), abs=1e-12)
