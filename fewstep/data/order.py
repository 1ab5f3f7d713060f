"""The order of samples, as a function of (seed, position).

Position p of a run is entry p of an endless sequence of shuffled epochs. So the place of a run in its data is one number, and
no state of workers, ranks or generators is saved.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fewstep.errors import UserError


def samples_at(position: Tensor, num: int, seed: int) -> Tensor:
    """The sample number for each position; every sample comes exactly once in positions e num .. (e + 1) num - 1."""
    if num < 1:
        raise UserError("the data set is empty")
    if not len(position):
        return position.clone()
    first = int(position.min()) // num
    if int(position.max()) // num == first:  # nearly always
        return _epoch(num, seed, first)[position - first * num]
    epochs = position // num
    out = torch.empty_like(position)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        out[inside] = _epoch(num, seed, int(epoch))[position[inside] % num]
    return out


@lru_cache(maxsize=2)
def _epoch(num: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num, generator=generator)


def interleaved(position: Tensor, blocks: tuple[int, ...], block: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each position its source, and its place in the endless sequence of that source.

    Positions go in blocks of one source each; of every sum(blocks) of them, in an order drawn anew each time, `blocks[k]` are
    of source k. A source's places come one after another without a gap: each of its samples comes once in each of its epochs.
    """
    if min(blocks) < 1 or block < 1:
        raise UserError(f"every source needs a block, of at least one position, not {blocks} blocks of {block}")
    number, inside = position // block, position % block
    cycle, slot = number // sum(blocks), number % sum(blocks)
    source, place = torch.empty_like(position), torch.empty_like(position)
    per_cycle = torch.tensor(blocks)
    for one in cycle.unique().tolist():
        here = cycle == one
        of, earlier = _cycle(blocks, seed, int(one))
        source[here] = of[slot[here]]
        place[here] = (one * per_cycle[of[slot[here]]] + earlier[slot[here]]) * block + inside[here]
    return source, place


@lru_cache(maxsize=4)
def _cycle(blocks: tuple[int, ...], seed: int, cycle: int) -> tuple[Tensor, Tensor]:
    """The source of each slot of a cycle, and how many of that source's slots are before it."""
    sources = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    of = sources[_epoch(len(sources), seed ^ 0x5EED, cycle)]
    earlier = torch.empty_like(of)
    for source, num in enumerate(blocks):
        earlier[of == source] = torch.arange(num)
    return of, earlier


def shares(weights: tuple[float, ...], total: int) -> tuple[int, ...]:
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainders), each at least 1."""
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [max(int(part), 1) for part in exact]
    for place in sorted(range(len(exact)), key=lambda n: int(exact[n]) - exact[n])[: max(total - sum(whole), 0)]:
        whole[place] += 1
    return tuple(whole)
