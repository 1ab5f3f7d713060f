"""Randomness as a function of what it is for.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key (the seed) and a counter into
four random words. The counter names the draw: (block of the row, row, step, number of the draw). So the noise of a sample does
not depend on who draws it, with which batch size, on how many ranks or in how many micro-batches; a resumed run draws what it
would have drawn, and no generator state is ever saved. The words are equal on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import UserError

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MULTIPLY_COLUMN = np.array(_MULTIPLY, np.uint64)[:, None]
_LOW, _HALF = np.uint64(_MASK), np.uint64(32)
_FEW, _MANY = 4, 4096  # blocks of four words: so few are fastest in Python, so many on a GPU where there is one
_SHARED_ROW = (1 << 48) - 1  # the last number a row can have; 2^32 - 1 would be the favourite seed of many
Word = TypeVar("Word", int, Tensor)
Words = NDArray[np.uint64]


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words for each counter; the ten rounds of Philox4x32. Of Python's integers or of int64 tensors."""
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        # int64 wraps, which leaves the low 64 bits of the product right; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
    return c0, c1, c2, c3


def _philox_of_rows(high: Words, low: Words, key: tuple[int, int]) -> None:
    """The same for high = [c0, c2] and low = [c1, c3], which become the words, with the two halves of a round in one call."""
    product = np.empty_like(high)
    for keys in _key_columns(key):
        np.multiply(high, _MULTIPLY_COLUMN, out=product)
        crossed = product[::-1]  # the product of c2 makes c0 and c1, that of c0 makes c2 and c3
        np.right_shift(crossed, _HALF, out=high)
        np.bitwise_xor(high, low, out=high)
        np.bitwise_xor(high, keys, out=high)
        np.bitwise_and(crossed, _LOW, out=low)


def _round_keys(key: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(((key[0] + i * _WEYL[0]) & _MASK, (key[1] + i * _WEYL[1]) & _MASK) for i in range(10))


@lru_cache(maxsize=16)
def _key_columns(key: tuple[int, int]) -> Words:
    return np.array(_round_keys(key), np.uint64)[:, :, None]


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  # torch's stub is vague


class Rng:
    """Draws for the rows of one batch, each row from its own stream; `.shared` draws are the same on every replica.

    rows: the number of each row in the whole step's batch (training), or the seed of each sample (generation).
    Two draws of one Rng differ; two Rngs with the same arguments draw the same numbers.
    """

    def __init__(self, seed: int, step: int = 0, rows: Sequence[int] | Tensor = (0,), device: torch.device | str = "cpu"):
        self.seed, self.step, self.device = seed, step, torch.device(device)
        numbers = cast(Sequence[int], rows.reshape(-1).tolist()) if isinstance(rows, Tensor) else rows  # pyright: ignore[reportUnknownMemberType]  # torch's stub is vague
        outside = [number for number in numbers if not 0 <= number <= _SHARED_ROW]
        if outside:
            raise UserError(f"rows and sample seeds are numbers from 0 to 2^48 - 1, not {outside[0]}")
        self._numbers: Words = np.array(numbers, np.uint64)
        self._key = (seed & _MASK, (seed >> 32) & _MASK)
        self._draws = 0
        self._shared: Rng | None = None

    @classmethod
    def of_samples(cls, seeds: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Rng:
        """For generation: row i depends on seeds[i] alone, so that batch size never changes a sample."""
        return cls(seed=0, step=0, rows=seeds, device=device)

    @property
    def shared(self) -> Rng:
        """A stream of one row that does not know which rows this replica holds."""
        if self._shared is None:
            self._shared = Rng(self.seed, self.step, (_SHARED_ROW,), "cpu")
        return self._shared

    @property
    def rows(self) -> Tensor:
        """The number of each row, on the CPU."""
        return _tensor(self._numbers.view(np.int64))

    def _words(self, num: int) -> tuple[Words, Words]:
        """The four words of `num` blocks for each row: words 0 and 2 of all blocks, and words 1 and 3, (2, rows, blocks).

        The counter is (block, row, step, draw); words of row and seed above 32 bits go into the draw's upper half and the key.
        """
        draw, step, shape = self._next_draw(), self.step & _MASK, (2, len(self._numbers), num)
        if shape[1] * num <= _FEW:
            rows: list[int] = self._numbers.tolist()
            counters = [(block, row & _MASK, step, draw ^ (row >> 32) << 16) for row in rows for block in range(num)]
            words = np.array([philox(counter, self._key) for counter in counters], np.uint64).reshape(-1, 4).T
            return words[0::2].reshape(shape), words[1::2].reshape(shape)
        high, low = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
        high[0], high[1] = np.arange(num, dtype=np.uint64), step
        row = self._numbers[:, None]
        low[0], low[1] = row & _LOW, draw ^ (row >> _HALF << np.uint64(16))
        _philox_of_rows(high.reshape(2, -1), low.reshape(2, -1), self._key)
        return high, low

    def _words_on_device(self, num: int) -> tuple[Tensor, Tensor]:
        """The same words as tensors on the device; there too, where there are many."""
        if self.device.type == "cpu" or num * len(self._numbers) <= _MANY:
            high, low = self._words(num)
            return _tensor(high.view(np.int64)).to(self.device), _tensor(low.view(np.int64)).to(self.device)
        row = self.rows.to(self.device)[:, None].expand(-1, num)
        block = torch.arange(num, device=self.device).expand_as(row)
        counter = (block, row & _MASK, torch.full_like(block, self.step & _MASK), self._next_draw() ^ ((row >> 32) << 16))
        words = philox(counter, self._key)
        return torch.stack(words[0::2]), torch.stack(words[1::2])

    def _next_draw(self) -> int:
        assert self._draws < 1 << 16, self._draws  # beyond, a draw would reach into the upper half of the row's number
        self._draws += 1
        return self._draws - 1

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape) numbers in [0, 1), float64. They are few (times, choices), and made on the CPU."""
        rows, num = len(self._numbers), math.prod(shape)
        even, odd = self._words((num + 1) // 2)
        bits = (even << np.uint64(20)) ^ (odd >> np.uint64(12))  # 52 bits: every value is exact in float64
        values = (bits * 2.0**-52).transpose(1, 2, 0).reshape(rows, -1)[:, :num].reshape(rows, *shape)
        return _tensor(values).to(self.device)

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, *shape) standard normal numbers (Box-Muller)."""
        rows, num = len(self._numbers), math.prod(shape)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        even, odd = self._words_on_device((num + 3) // 4)
        # (n + 1/2) / 2^32 is never 0; float32 would round the largest to 1, whose logarithm is a harmless 0.
        radius = even.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_().to(exact)
        angle = odd.double().add_(0.5).mul_(2.0**-31 * math.pi).to(exact)
        out = torch.empty(*even.shape[1:], 2, 2, dtype=exact, device=self.device)
        torch.mul(radius, angle.cos(), out=out[..., 0].permute(2, 0, 1))
        torch.mul(radius, angle.sin(), out=out[..., 1].permute(2, 0, 1))
        return out.flatten(1)[:, :num].reshape(rows, *shape).to(dtype)

    def normal_like(self, like: Tensor) -> Tensor:
        """Standard normal noise for every row of `like`, of its shape and type."""
        if like.shape[0] != len(self._numbers):
            raise UserError(f"this Rng draws for {len(self._numbers)} rows, but the tensor has {like.shape[0]}")
        return self.normal(like.shape[1:], like.dtype).to(like.device)

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape) integers in [0, high)."""
        return (self.uniform(shape) * high).long()

    def integer(self, high: int) -> int:
        """One integer in [0, high), the first of `integers`; for `.shared`."""
        even, odd = self._words(1)
        return int(((int(even[0, 0, 0]) << 20) ^ (int(odd[0, 0, 0]) >> 12)) * 2.0**-52 * high)
