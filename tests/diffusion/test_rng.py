"""Philox against the known answers of Random123; streams that no batch size, order or rank can change."""

import math

import pytest
import scipy.stats
import torch

from fewstep.diffusion import Rng
from fewstep.diffusion.rng import philox


def words(counter, key):
    return tuple(int(word) for word in philox(tuple(torch.tensor([c]) for c in counter), key))


def test_known_answers_of_random123():
    """kat_vectors of Random123 1.14, philox4x32 10."""
    assert words((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_numbers_are_made_from_the_words_of_their_own_counter():
    """(block, row, step, draw) under the seed, Box-Muller by hand: a saved seed means the same noise in every version."""
    seed, step, row = 7 + (9 << 32), 4, 12 + (3 << 32)
    rng = Rng(seed, step, [row])
    found = [rng.normal((8,), torch.float64)[0].tolist(), rng.uniform((2,))[0].tolist()]
    blocks = [[words((block, 12, 4, draw + (3 << 16)), (7, 9)) for block in range(2)] for draw in range(2)]
    normals = []
    for w in blocks[0]:
        for first, second in (w[:2], w[2:]):
            radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), 2 * math.pi * (second + 0.5) / 2**32
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    assert found[0] == pytest.approx(normals, rel=1e-12, abs=1e-14)
    w = blocks[1][0]
    assert found[1] == [((w[0] << 20) + (w[1] >> 12)) / 2**52, ((w[2] << 20) + (w[3] >> 12)) / 2**52]


def draw_all(rng):
    return [
        rng.normal((3, 7)),
        rng.normal((5,), torch.float64),
        rng.uniform((4,)),
        rng.integers(1000, (6,)),
        rng.normal((2, 2), torch.bfloat16),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_batch_size_and_order_change_no_bit(size):
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(3)) * 977 + 5
    whole = draw_all(Rng(7, 11, rows))
    for start in range(0, 64, size):
        part = draw_all(Rng(7, 11, rows[start : start + size]))
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[start : start + size])
    backwards = draw_all(Rng(7, 11, rows.flip(0)))
    assert all(torch.equal(got.flip(0), want) for got, want in zip(backwards, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_latent_alone_is_the_same_as_in_a_batch(dtype):
    """Vectorised logarithms and cosines must not depend on where in memory a number lies."""
    shape = (16, 5, 13, 11)
    whole = Rng(1, rows=range(5)).normal(shape, dtype)
    for row in range(5):
        assert torch.equal(Rng(1, rows=[row]).normal(shape, dtype)[0], whole[row])


def test_a_longer_draw_starts_with_the_shorter_one():
    assert torch.equal(Rng(1).normal((1000,))[:, :10], Rng(1).normal((10,)))


def test_seed_step_row_and_number_of_the_draw_each_matter():
    def first(seed=1, step=2, row=3, skip=0):
        rng = Rng(seed, step, [row])
        for _ in range(skip):
            rng.uniform()
        return float(rng.uniform())

    others = [first(seed=2), first(step=3), first(row=4), first(skip=1), first(seed=1 + 2**32), first(seed=1 + 2**63)]
    others += [first(row=3 + 2**32), first(row=3 + 2**47), first(step=1), first(row=2), first(seed=2**32), first(skip=2)]
    assert len({first(), *others}) == len(others) + 1
    assert first() == first()


def test_shared_is_the_same_for_all_rows_and_is_no_row():
    one, other = Rng(5, 6, range(4)), Rng(5, 6, range(100, 108))
    assert [one.shared.integer(10**9) for _ in range(5)] == [other.shared.integer(10**9) for _ in range(5)]
    assert one.shared is one.shared
    used = Rng(5, 6, range(4))
    used.normal((9,))
    assert used.shared.integer(10**9) == Rng(5, 6).shared.integer(10**9)  # draws of the rows do not move it
    rows = [*range(2000), 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**33 - 1]
    assert float(Rng(5, 6).shared.uniform()) not in Rng(5, 6, rows).uniform().tolist()


def test_a_row_that_has_no_stream_of_its_own_is_refused():
    for bad in (-1, 2**48):
        with pytest.raises(ValueError, match=str(bad)):
            Rng.of_samples([0, bad])
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 1, 2**47]
    assert len(set(Rng.of_samples(seeds).uniform().tolist())) == len(seeds)


def test_uniform_law():
    u = Rng(3, rows=range(1000)).uniform((100,))
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert scipy.stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    fine = (u * 2**26) % 1  # the low bits too
    assert scipy.stats.kstest(fine.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_law(dtype):
    z = Rng(4, rows=range(1000)).normal((200,), dtype)
    assert z.dtype == dtype and bool(torch.isfinite(z).all())
    z = z.double()
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((z**3).mean())) < 4 * (15 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    # The four numbers made from one block, and the rows, are independent of each other.
    by_place = torch.corrcoef(z.reshape(-1, 4).T) - torch.eye(4, dtype=torch.float64)
    assert float(by_place.abs().max()) < 5 / (n / 4) ** 0.5
    assert float((torch.corrcoef(z[:50]) - torch.eye(50, dtype=torch.float64)).abs().max()) < 5 / 200**0.5
    squares = torch.corrcoef(z.reshape(-1, 4).T ** 2) - torch.eye(4, dtype=torch.float64)
    assert float(squares.abs().max()) < 5 / (n / 4) ** 0.5


def test_integers_are_in_range_and_even():
    draws = Rng(9, rows=range(500)).integers(7, (40,))
    assert draws.dtype == torch.int64
    counts = torch.bincount(draws.flatten(), minlength=7)
    assert len(counts) == 7 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert bool((Rng(9).integers(1, (10,)) == 0).all())
    exits = torch.bincount(torch.tensor([Rng(0, step).shared.integer(4) for step in range(2000)]), minlength=4)
    assert scipy.stats.chisquare(exits.numpy()).pvalue > 1e-3


def test_normal_like_refuses_another_number_of_rows():
    rng = Rng(1, rows=range(3))
    like = torch.zeros(3, 2, 2, dtype=torch.float64)
    assert torch.equal(rng.normal_like(like), Rng(1, rows=range(3)).normal((2, 2), torch.float64))
    with pytest.raises(ValueError, match="3 rows, but the tensor has 4"):
        rng.normal_like(torch.zeros(4, 2))
