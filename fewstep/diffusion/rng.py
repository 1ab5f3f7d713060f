"""Randomness as a function of what it is for.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key (the seed) and a counter into
four random words. The counter names the draw: (block of the row, row, step, number of the draw). So the noise of a sample does
not depend on who draws it, with which batch size, on how many ranks or in how many micro-batches; a resumed run draws what it
would have drawn, and no generator state is ever saved. The words are equal on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SHARED_ROW = (1 << 48) - 1  # the last number a row can have; 2^32 - 1 would be the favourite seed of many


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (in int64) for each counter; the ten rounds of Philox4x32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps, which leaves the low 64 bits of the product right; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0 = (p1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class Rng:
    """Draws for the rows of one batch, each row from its own stream; `.shared` draws are the same on every replica.

    rows: the number of each row in the whole step's batch (training), or the seed of each sample (generation).
    Two draws of one Rng differ; two Rngs with the same arguments draw the same numbers.
    """

    def __init__(self, seed: int, step: int = 0, rows: Sequence[int] | Tensor = (0,), device: torch.device | str = "cpu"):
        self.seed, self.step = seed, step
        numbers = torch.as_tensor(rows, dtype=torch.int64).reshape(-1)
        outside = numbers[(numbers < 0) | (numbers > _SHARED_ROW)]
        if len(outside):
            raise UserError(f"rows and sample seeds are numbers from 0 to 2^48 - 1, not {int(outside[0])}")
        self.rows = numbers.to(device)
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

    def _words(self, num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At least `num` words for each row, as four tensors of shape (rows, blocks)."""
        assert self._draws < 1 << 16, self._draws  # beyond, a draw would reach into the upper half of the row's number
        device = self.rows.device
        blocks = torch.arange((num + 3) // 4, device=device)[None, :].expand(len(self.rows), -1)
        row = (self.rows[:, None] & _MASK).expand_as(blocks)
        counter = (blocks, row, torch.full_like(blocks, self.step & _MASK), torch.full_like(blocks, self._draws))
        # Words above 32 bits of the seed and of the row go into the key and the draw number's upper half.
        counter = (*counter[:3], counter[3] ^ (((self.rows[:, None] >> 32) & 0xFFFF) << 16))
        self._draws += 1
        return philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK))

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape) numbers in [0, 1), float64."""
        num = math.prod(shape)
        words = torch.stack(self._words(2 * num), -1).flatten(1)[:, : 2 * num].reshape(len(self.rows), num, 2)
        bits = (words[..., 0] << 20) ^ (words[..., 1] >> 12)  # 52 bits: every value is exact in float64
        return (bits.double() * 2.0**-52).reshape(len(self.rows), *shape)

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, *shape) standard normal numbers (Box-Muller)."""
        num = math.prod(shape)
        words = self._words(num)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        out: list[Tensor] = []
        for first, second in (words[:2], words[2:]):
            # (n + 1/2) / 2^32 is never 0; float32 would round the largest to 1, whose logarithm is a harmless 0.
            radius = ((first.double() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_().to(exact)
            angle = ((second.double() + 0.5) * (2.0**-31 * math.pi)).to(exact)
            out += [radius * angle.cos(), radius * angle.sin()]
        return torch.stack(out, -1).flatten(1)[:, :num].reshape(len(self.rows), *shape).to(dtype)

    def normal_like(self, like: Tensor) -> Tensor:
        """Standard normal noise for every row of `like`, of its shape and type."""
        if like.shape[0] != len(self.rows):
            raise UserError(f"this Rng draws for {len(self.rows)} rows, but the tensor has {like.shape[0]}")
        return self.normal(like.shape[1:], like.dtype).to(like.device)

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape) integers in [0, high)."""
        return (self.uniform(shape) * high).long()

    def integer(self, high: int) -> int:
        """One integer in [0, high); for `.shared`."""
        return int(self.integers(high)[0])
