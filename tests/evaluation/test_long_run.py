"""Probes of long clips on processes whose drift and return are known, and as monitors of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Prediction, RectifiedFlow, StudentSampler
from fewstep.diffusion.by_chunk import ByChunk
from fewstep.errors import UserError
from fewstep.evaluation.long_run import LongRun, drift_by_segments, largest_rise, looks, sink_similarity
from fewstep.evaluation.score import ClipSet
from fewstep.training.health import Health, Monitor

CLIPS, FRAMES, DIMS = 256, 40, 6


def walk(keep: float, seed: int = 0) -> Tensor:
    """A stationary autoregression of unit variance, n T d."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(CLIPS, FRAMES, DIMS, generator=rng, dtype=torch.float64)
    rows = [noise[:, 0]]
    for frame in range(1, FRAMES):
        rows.append(keep * rows[-1] + (1 - keep**2) ** 0.5 * noise[:, frame])
    return torch.stack(rows, 1)


def test_a_stationary_process_does_not_drift_and_forgets_its_beginning() -> None:
    frames = walk(0.8)
    assert max(drift_by_segments(frames, 10)) < 0.15
    similarity = sink_similarity(frames, 40)
    assert similarity[0] == pytest.approx(1.0)
    for lag in (1, 2, 4):  # the mean cosine of Gaussian vectors of correlation r in d dimensions is near r
        assert similarity[lag] == pytest.approx(0.8**lag, abs=0.08)
    assert largest_rise(sink_similarity(frames, 10)) < 0.1


def test_drift_is_the_shift_and_the_stretch_in_spreads_of_the_first_segment() -> None:
    frames = 3.0 * walk(0.0)
    frames[:, 20:] += 1.5  # half a spread
    assert drift_by_segments(frames, 2)[1] == pytest.approx(0.5, abs=0.03)
    frames = 3.0 * walk(0.0)
    frames[:, 20:] *= 2.0
    assert drift_by_segments(frames, 2)[1] == pytest.approx(np.log(2.0), abs=0.03)


def test_a_clip_that_falls_back_onto_its_beginning_rises() -> None:
    frames = walk(0.8)
    frames[:, 30:] = frames[:, :1]
    assert largest_rise(sink_similarity(frames, 10)) == pytest.approx(1.0, abs=0.15)
    assert largest_rise([1.0, 0.4, 0.5, 0.2, 0.6]) == pytest.approx(0.4) and largest_rise([3.0, 2.0, 1.0]) == 0.0


def test_the_scorer_reads_pixels_and_refuses_clips_of_several_lengths() -> None:
    rng = np.random.default_rng(0)
    clips = [np.repeat(rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), 40, 0) for _ in range(8)]  # frozen
    record = LongRun().score(ClipSet(clips), None)
    assert record["drift"].value == 0.0 and record["sink_similarity"].value == pytest.approx(1.0)
    assert record["sink_rise"].value == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(UserError, match=r"of one length, not of \[40, 41\] frames"):
        looks([*clips, np.zeros((41, 16, 16, 3), np.uint8)])


@dataclass
class Cache:
    first: Tensor | None = None
    count: int = 0

    def store(self) -> Any:
        return self


@dataclass(frozen=True)
class Snapping:
    """A causal student whose chunks are new noise, and from frame 24 on the first frame again."""

    is_broken: bool
    path: Any = RectifiedFlow()

    def chunks(self, num: int) -> tuple[range, ...]:
        return tuple(range(start, start + 4) for start in range(0, num, 4))

    def new_cache(self, like: Tensor) -> Cache:
        return Cache()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, *, cache: Any = None, **_: Any) -> Prediction:
        if bool((t == 0).all()):  # a finished chunk enters the cache
            cache.first = x_t[:, :, :1].expand_as(x_t) if cache.first is None else cache.first
            cache.count += 1
            return Prediction.of("x0", x_t, x_t, t, self.path)
        x0 = cache.first if self.is_broken and cache.count >= 6 else x_t
        return Prediction.of("x0", x0, x_t, t, self.path)


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_monitors_of_a_training_ring_for_a_student_that_falls_back(is_broken: bool) -> None:
    conditions = Batch(x0=torch.randn(16, 4, 4, 8, 8))
    sampler = StudentSampler((1.0,), RectifiedFlow(), by_chunk=ByChunk())
    monitor = Monitor(Health(every=1, num=16, long_frames=40), conditions, sampler, None, None, seed=0)
    values = monitor.look(Snapping(is_broken))
    assert [ring.monitor for ring in monitor.rings(values)] == (["sink_rise"] if is_broken else [])
