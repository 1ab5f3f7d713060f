"""How a causal network generates: chunk after chunk, each from noise, attending to finished chunks in a cache.

    for each chunk:   x0 = solve(network with its cache, noise of the chunk)       the same loops that make a whole clip
                      network(x0 at `context_noise`, stored in the cache)           what the next chunks attend to

A chunk is handed out before it is stored, so that whoever shows it does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion.denoiser import Cache, Denoiser
from fewstep.diffusion.path import Path
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rng import Rng


class CausalDenoiser(Denoiser, Protocol):
    """A denoiser whose chunks of frames see no later ones. Networks that are not causal refuse both calls."""

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        """The chunks of latent frames in which a clip is generated."""
        ...

    def new_cache(self, like: Tensor) -> Cache: ...


@dataclass(frozen=True)
class ByChunk:
    """How chunks follow one another in generation; part of a student, saved with its weights."""

    first_times: tuple[float, ...] | None = None  # of the first chunk, which may take more steps; None: as the others
    context_noise: float = 0.0  # noise level at which finished chunks are attended to, in the path's time; 0: clean

    def problems(self) -> Iterable[tuple[str, str]]:
        times = self.first_times
        if times is not None and (not times or list(times) != sorted(set(times), reverse=True) or min(times) <= 0):
            yield "first_times", f"must descend and stay above 0 (the final 0 is left out), but is {list(times)}"
        if self.context_noise < 0:
            yield "context_noise", f"is a time of the path, from 0 on, not {self.context_noise}"

    def times(self, chunk: int, times: Sequence[float]) -> Sequence[float]:
        """The times at which chunk number `chunk` is computed, of a student with `times`."""
        return times if chunk or self.first_times is None else self.first_times


@dataclass(frozen=True)
class WithCache:
    """A denoiser whose calls attend to one cache: solvers need not know of it."""

    inner: Denoiser
    cache: Cache

    @property
    def path(self) -> Path:
        return self.inner.path

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        return self.inner(x_t, t, cond, taps=taps, cache=self.cache)


Solve = Callable[[int, range, Denoiser], Tensor]  # number and frames of a chunk, denoiser with the cache -> its x0


def chunk_by_chunk(
    denoiser_of: Callable[[range], Denoiser],
    chunks: Sequence[range],
    cond: Condition,
    solve: Solve,
    cache: Cache,
    settings: ByChunk,
    rng: Rng,
) -> Iterator[Tensor]:
    """x0 of each chunk, as `solve` computes it. Finished chunks enter the cache without gradients.

    denoiser_of: what is called for a chunk: guidance, for one, has a negative condition with frames of that chunk.
    """
    for number, frames in enumerate(chunks):
        denoiser = denoiser_of(frames)
        x0 = solve(number, frames, WithCache(denoiser, cache))
        yield x0
        if frames is not chunks[-1]:
            store(denoiser, x0.detach(), cond.part(frames), cache, settings.context_noise, rng)


@torch.no_grad()
def store(denoiser: Denoiser, x0: Tensor, cond: Condition, cache: Cache, context_noise: float, rng: Rng) -> None:
    """Puts the finished chunk into the cache, noised to `context_noise`."""
    t = torch.full((x0.shape[0],), context_noise, dtype=torch.float64, device=x0.device)
    eps = rng.normal_like(x0) if context_noise else torch.zeros_like(x0)
    denoiser(denoiser.path.add_noise(x0, eps, t), t, cond, cache=cache.store())


def refill(network: CausalDenoiser, latents: Tensor, cond: Condition, settings: ByChunk, rng: Rng) -> Cache:
    """A cache of these finished latents, the beginning of a clip, under `cond`: how a prompt changes in mid-stream.

    Frames out of the network's reach have to be given too, unless the clip is short: their keys decide those of later ones.
    """
    cache = network.new_cache(latents)
    for frames in network.chunks(latents.shape[2]):
        x0 = latents[:, :, frames.start : frames.stop]
        store(network, x0, cond.part(frames), cache, settings.context_noise, rng)
    return cache
