"""Against closed forms, scipy's sqrtm, and the laws that bias obeys."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fewstep.evaluation import frechet_distance
from fewstep.evaluation.frechet import (
    Gaussian,
    Moments,
    Remembered,
    frechet_extrapolated,
    frechet_of_gaussians,
    frechet_score,
)

torch.set_num_threads(1)


def draw(seed: int, num: int, dims: int, rank: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of a correlated Gaussian; of a singular one if rank < dims."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or dims, dims, generator=generator, dtype=torch.float64)
    rows = torch.randn(num, rank or dims, generator=generator, dtype=torch.float64) @ mixing
    return (rows + torch.randn(dims, generator=generator, dtype=torch.float64)).to(dtype)


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, through scipy's square root of (S1^1/2 S2 S1^1/2)."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    half = scipy.linalg.sqrtm(s1)
    cross = np.trace(scipy.linalg.sqrtm(half @ s2 @ half)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def test_commuting_covariances() -> None:
    """diag(p) against diag(q), m apart: |m|^2 + sum (sqrt p - sqrt q)^2."""
    m, p, q = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 2.0])
    wanted = 5.25 + 1 + 4 + 2
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    for base in (torch.eye(3, dtype=torch.float64), turn):
        a = Gaussian(torch.zeros(3, dtype=torch.float64), base @ torch.diag(p.double()) @ base.T)
        b = Gaussian(m.double(), base @ torch.diag(q.double()) @ base.T)
        assert frechet_of_gaussians(a, b) == pytest.approx(wanted, abs=1e-12)


def test_samples_with_exact_moments() -> None:
    """Two points at -+ 1 have variance 2 (n - 1 = 1); at 2 -+ 2, variance 8: distance 4 + 2 + 8 - 2 * 4."""
    assert frechet_distance([-1.0, 1.0], [0.0, 4.0]) == pytest.approx(6.0, abs=1e-12)


@pytest.mark.parametrize(("num", "dims", "rank"), [(200, 8, None), (400, 24, None), (60, 5, 5)])
def test_general_covariances_against_sqrtm(num: int, dims: int, rank: int | None) -> None:
    a, b = draw(1, num, dims, rank), draw(2, num + 37, dims, rank)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a.numpy(), b.numpy()), rel=1e-9)
    assert frechet_distance(a.numpy(), b.numpy()) == frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_singular_covariances_against_their_limit() -> None:
    """Rank 3 in 10 dimensions; the limit of S + eps I as eps goes to 0 is approached like sqrt(eps)."""
    a, b = draw(3, 300, 10, 3), draw(4, 300, 10, 3)
    exact = frechet_distance(a, b)

    def lifted(rows: Tensor, eps: float) -> Gaussian:
        return Gaussian(rows.mean(0), rows.T.cov() + eps * torch.eye(10, dtype=torch.float64))

    gaps = [abs(frechet_of_gaussians(lifted(a, eps), lifted(b, eps)) - exact) for eps in (1e-4, 1e-6, 1e-8)]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-2 * exact


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_identical_sets_with_fewer_rows_than_columns_are_at_zero(dtype: torch.dtype, scale: float) -> None:
    """The trap: float32 eigenvalues of S1 S2 give 0.06 here, and 0.5 at three times the scale."""
    rows = draw(5, 40, 96, dtype=torch.float64)
    rows = (rows / rows.std() * scale).to(dtype)
    assert abs(frechet_distance(rows, rows)) < 1e-11 * scale**2 * 96
    assert abs(frechet_distance(rows, rows[torch.randperm(40)])) < 1e-11 * scale**2 * 96
    streamed = Moments()
    streamed.update(rows)
    assert abs(frechet_distance(streamed, streamed)) < 1e-11 * scale**2 * 96


def test_disjoint_rows_beyond_the_rank() -> None:
    """n < d on both sides, different spans: the cross term is small, not noise of size sqrt(eps)."""
    a, b = draw(6, 10, 64), draw(7, 12, 64)
    streamed = [Moments(), Moments()]
    for moments, rows in zip(streamed, (a, b)):
        moments.update(rows)
    assert frechet_distance(*streamed) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_bias_falls_like_one_over_n_and_the_limit_removes_it() -> None:
    """Equal laws: the truth is 0. d = 16, so the bias of two sets of n is near (d (d + 1) / 4 + d) * 2 / n for S = I."""
    generator = torch.Generator().manual_seed(8)
    rows = torch.randn(2, 24, 1024, 16, generator=generator, dtype=torch.float64)
    plain = {n: np.mean([frechet_distance(a[:n], b[:n]) for a, b in zip(*rows)]) for n in (128, 256, 512, 1024)}
    for n in (128, 256, 512):
        assert plain[n] / plain[2 * n] == pytest.approx(2.0, rel=0.12)
    limits = [frechet_extrapolated(a[:512], b[:512]) for a, b in zip(*rows)]
    values = np.array([limit.value for limit in limits])
    assert abs(values.mean()) < 0.15 * plain[512]
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5 + 0.02 * plain[512]
    assert all(limit.value < limit.full.value and limit.slope > 0 and limit.is_determined for limit in limits)


def test_the_limit_of_different_laws_is_their_distance() -> None:
    dims = 12
    zero, eye = torch.zeros(dims, dtype=torch.float64), torch.eye(dims, dtype=torch.float64)
    truth = frechet_of_gaussians(Gaussian(zero, eye), Gaussian(zero + 0.2, 1.44 * eye))
    assert truth == pytest.approx(12 * (0.04 + 0.04), rel=1e-12)
    generator = torch.Generator().manual_seed(9)
    values, plain = [], []
    for _ in range(12):
        a = torch.randn(512, dims, generator=generator, dtype=torch.float64)
        b = torch.randn(256, dims, generator=generator, dtype=torch.float64) * 1.2 + 0.2
        limit = frechet_extrapolated(b, a)
        values.append(limit.value)
        plain.append(limit.full.value)
    assert np.mean(plain) > 1.2 * truth
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / 12**0.5)


def test_extrapolation_is_a_function_of_its_seed() -> None:
    a, b = draw(10, 100, 4), draw(11, 120, 4)
    first = frechet_extrapolated(a, b, seed=1)
    assert first == frechet_extrapolated(a, b, seed=1) != frechet_extrapolated(a, b, seed=2)
    assert first.stderr > 0 and len(first.points) == 5
    assert first.points[0][1] == pytest.approx(first.full.value, rel=1e-9)


def test_too_few_samples_are_marked() -> None:
    assert not frechet_score(draw(1, 16, 16), draw(2, 500, 16)).is_determined
    assert frechet_score(draw(1, 17, 16), draw(2, 500, 16)).is_determined
    limit = frechet_extrapolated(draw(1, 40, 16), draw(2, 500, 16))
    assert limit.full.is_determined and not limit.is_determined and limit.smallest == 13


def test_streams_merge_to_the_same_moments() -> None:
    """Far from the origin, where sums of squares would have lost every digit."""
    rows = draw(12, 300, 6) + 1e6
    parts = [Moments() for _ in range(3)]
    for i, batch in enumerate(rows.split([1, 99, 50, 30, 119, 1])):
        parts[i % 3].update(batch)
    merged = parts[0].merge(parts[1]).merge(Moments()).merge(parts[2])
    mean, covariance = merged.compute()
    assert merged.count == 300 and parts[0].count == 31
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(covariance, torch.as_tensor(np.cov(rows.numpy(), rowvar=False)), rtol=1e-9, atol=1e-9)
    again = Moments()
    again.load_state_dict(merged.state_dict())
    again.update(rows[:5])
    merged.update(rows[:5])
    assert torch.equal(again.compute().covariance, merged.compute().covariance)
    assert frechet_distance(merged, rows) < 0.1
    merged.reset()
    assert merged.count == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), "a has 3 columns and b has 2"),
        (np.zeros((4, 3, 2)), np.zeros((4, 2)), r"a must be real numbers of shape \(n, d\)"),
        (np.zeros((1, 3)), np.zeros((4, 3)), "at least 2 rows"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "a: 4 of 4 rows are not finite"),
        (np.zeros((4, 3)), np.array([[0, 0, 0], [0, np.inf, 0.0]]), "the first is row 1"),
    ],
)
def test_wrong_features_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_wrong_moments_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, 0 came"):
        Moments().compute()
    one, other = Moments(), Moments()
    one.update(draw(1, 4, 3))
    other.update(draw(1, 4, 2))
    with pytest.raises(ValueError, match="do not merge"):
        one.merge(other)
    with pytest.raises(ValueError, match="a has 3 columns and b has 2"):
        frechet_distance(one, other)
    with pytest.raises(ValueError, match="two or more different numbers"):
        frechet_extrapolated(draw(1, 40, 3), draw(2, 40, 3), scales=(2,))
    with pytest.raises(ValueError, match="too few to thin"):
        frechet_extrapolated(draw(1, 5, 3), draw(2, 40, 3))


def test_a_remembered_reference_changes_nothing_and_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(10, 100, 4), draw(11, 220, 4)
    known = Remembered(b)
    for subsample in ("both", "first"):
        fresh = frechet_extrapolated(a, b, seed=1, subsample=subsample)
        assert frechet_extrapolated(a, known, seed=1, subsample=subsample) == fresh
    assert frechet_score(a, known) == frechet_score(a, b)
    assert frechet_distance(a, known) == pytest.approx(by_sqrtm(a.numpy(), b.numpy()), rel=1e-9)
    asked: list[int] = []
    plain = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda rows, **kw: asked.append(len(rows)) or plain(rows, **kw))
    frechet_extrapolated(draw(12, 100, 4), known, seed=1)  # another set of that size: only its own rows are new
    assert max(asked) <= 100 < len(b) // 2
    with pytest.raises(ValueError, match="same feature network"):
        frechet_extrapolated(draw(12, 100, 5), known)
