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
from fewstep.diffusion.denoiser import Around, Cache, Denoiser
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rng import Rng


class CausalDenoiser(Denoiser, Protocol):
    """A denoiser whose chunks of frames see no later ones. Networks that are not causal refuse both calls."""

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        """The chunks of latent frames in which a clip is generated."""
        ...

    def before(self, start: int) -> Sequence[int]:
        """The finished frames that a chunk which begins at frame `start` attends to."""
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
class WithCache(Around):
    """A denoiser whose calls attend to one cache: solvers need not know of it."""

    inner: Denoiser
    cache: Cache

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        return self.inner(x_t, t, cond, taps=taps, cache=self.cache)


Solve = Callable[[int, range, Denoiser, Condition], Tensor]  # number and frames of a chunk, denoiser with the cache -> its x0
Switch = tuple[int, Condition]  # the condition of the whole clip that holds from the first chunk at or after a latent frame on


def chunk_by_chunk(
    denoiser_of: Callable[[range], Denoiser],
    network: CausalDenoiser,
    like: Tensor,
    cond: Condition,
    solve: Solve,
    settings: ByChunk,
    rng: Rng,
    *,
    chunks: Sequence[range] | None = None,
    switches: Sequence[Switch] = (),
) -> Iterator[Tensor]:
    """x0 of each chunk of a clip of the shape of `like`, as `solve` computes it. Finished chunks enter the cache without
    gradients.

    denoiser_of: what is called for a chunk: guidance, for one, has a negative condition with frames of that chunk.
    switches: where the condition changes, the cache is filled anew, under the new one, from the finished chunks within reach.
    chunks: None: those of the whole clip.
    """
    cache, todo = network.new_cache(like), sorted(switches, key=lambda switch: switch[0])
    chunks = network.chunks(like.shape[2]) if chunks is None else chunks
    context = like[:, :, :0]  # finished frames within reach, where a switch is still to come
    for number, frames in enumerate(chunks):
        due = [switch for switch in todo if switch[0] <= frames.start]
        if due:
            todo, cond = todo[len(due) :], due[-1][1]
            cache = refill(denoiser_of(frames), network, context, cond, settings, rng)
        denoiser = denoiser_of(frames)
        x0 = solve(number, frames, WithCache(denoiser, cache), cond.part(frames))
        yield x0
        if frames is not chunks[-1]:
            store(denoiser, x0.detach(), cond.part(frames), cache, settings.context_noise, rng)
            context = _within_reach(network, context, x0.detach(), frames) if todo else context[:, :, :0]


def _within_reach(network: CausalDenoiser, finished: Tensor, x0: Tensor, frames: range) -> Tensor:
    """The finished frames that the chunk after `frames` attends to."""
    before = [*network.before(frames.start), *frames]
    places = [before.index(frame) for frame in network.before(frames.stop)]
    return torch.cat([finished.to(x0), x0], 2)[:, :, places]


@torch.no_grad()
def store(denoiser: Denoiser, x0: Tensor, cond: Condition, cache: Cache, context_noise: float, rng: Rng) -> None:
    """Puts the finished chunk into the cache, noised to `context_noise`."""
    t = torch.full((x0.shape[0],), context_noise, dtype=torch.float64, device=x0.device)
    eps = rng.normal_like(x0) if context_noise else torch.zeros_like(x0)
    denoiser(denoiser.path.add_noise(x0, eps, t), t, cond, cache=cache.store())


def refill(denoiser: Denoiser, network: CausalDenoiser, latents: Tensor, cond: Condition, settings: ByChunk, rng: Rng) -> Cache:
    """A cache of these finished latents under `cond`, as if they were the beginning of the clip.

    They are all that the next chunk attends to: the whole clip while it is short, and then the sink and the last frames. So
    a switch costs the same at any length. denoiser: what is called, `network` or the network under guidance.
    """
    cache = network.new_cache(latents)
    for frames in network.chunks(latents.shape[2]) if latents.shape[2] else ():
        x0 = latents[:, :, frames.start : frames.stop]
        store(denoiser, x0, cond.part(frames), cache, settings.context_noise, rng)
    return cache
