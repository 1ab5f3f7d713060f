"""Probes of long clips, as a student that streams makes them: does it drift, and does it fall back onto its beginning?

    drift_by_segments    how far the frames of each segment have moved from those of the first, as a set
    sink_similarity      how much each segment looks like the beginning of its own clip
    largest_rise         of that similarity: a clip that moves on only loses it; one that collapses onto its sink (the first
                         frames, which stay within reach for ever) returns to it, whatever the prompt (LoL, arXiv:2601.16914)

    fewstep evaluate STUDENT --scorer long_run --num-frames 197 ..      rows of the report
    health.long_frames=50                                               the same as monitors of a training, on latents

Frames are vectors here: latents, or frames shrunk to a few cells (`looks`), so that moving objects count and noise does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fewstep.config import kind
from fewstep.errors import UserError
from fewstep.evaluation.bootstrap import half_sampled
from fewstep.evaluation.score import Clip, ClipSet, Record, Score, Scorer


def drift_by_segments(frames: Tensor, num: int) -> list[float]:
    """Of n T d frames in `num` equal segments: for each the distance of its law from that of the first segment, which is 0.

    In each of the d dimensions the shift of the mean, in spreads of the first segment, and the logarithm of the ratio of
    spreads; the root of the mean square over all dimensions. 1 is a shift by one spread everywhere.
    """
    parts = _segments(frames, num)
    mean, spread = parts[0].mean((0, 1)), _spread(parts[0])
    least = 0.01 * spread.max().clamp(min=1e-12)  # where nothing ever moves a shift means nothing
    out: list[float] = []
    for part in parts:
        shift = (part.mean((0, 1)) - mean) / spread.clamp(min=least)
        stretch = (_spread(part).clamp(min=least) / spread.clamp(min=least)).log()
        out.append(float((shift**2 + stretch**2).mean().sqrt()))
    return out


def sink_similarity(frames: Tensor, num: int, sink: int = 1) -> list[float]:
    """Of n T d frames: the mean cosine of each segment's frames with the first `sink` frames of their clip, less the mean of
    all clips, so that what all clips share counts for nothing. 1: the beginning again; 0: as like as another clip."""
    centred = frames - frames.mean((0, 1))
    start = centred[:, :sink].mean(1, keepdim=True)
    cosine = functional.cosine_similarity(centred, start.expand_as(centred), dim=-1)
    return [float(part.mean()) for part in _segments(cosine[..., None], num)]


def largest_rise(similarity: Sequence[float]) -> float:
    """By how much a value exceeds an earlier one at most; 0 where all fall."""
    least = np.minimum.accumulate(similarity)
    return float(np.max(np.asarray(similarity) - least))


def looks(clips: Iterable[Clip], cells: int = 8) -> Tensor:
    """n T d: each frame as the mean colours of cells x cells parts of it, 0..1."""
    rows: list[Tensor] = []
    for clip in clips:
        pictures = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 255
        rows.append(functional.adaptive_avg_pool2d(pictures, cells).flatten(1))
    if len({len(row) for row in rows}) != 1:
        raise UserError(f"these probes compare clips of one length, not of {sorted({len(row) for row in rows})} frames")
    return torch.stack(rows)


def of_latents(latents: Tensor, cells: int = 4) -> Tensor:
    """n T d of latents B C T H W."""
    rows, _, frames = latents.shape[:3]
    flat = latents.float().transpose(1, 2).flatten(0, 1)
    height, width = flat.shape[-2:]
    return functional.adaptive_avg_pool2d(flat, (min(cells, height), min(cells, width))).reshape(rows, frames, -1)


def monitors(latents: Tensor, segment: int) -> dict[str, float]:
    """`long_drift` and `sink_rise` of long latents, in segments of that many frames."""
    frames = of_latents(latents)
    num = max(2, frames.shape[1] // segment)
    return {
        "long_drift": drift_by_segments(frames, num)[-1],
        "sink_rise": largest_rise(sink_similarity(frames, num)),
    }


def _segments(frames: Tensor, num: int) -> list[Tensor]:
    if not 2 <= num <= frames.shape[1]:
        raise UserError(f"{frames.shape[1]} frames cannot be cut into {num} segments: choose 2 or more, of a frame at least")
    return list(frames.double().tensor_split(num, 1))


def _spread(part: Tensor) -> Tensor:
    return part.flatten(0, 1).std(0)


LEGEND = (
    Score("drift", "Drift", "How far the last segment of a clip has moved from the first, in its spreads.", "lower", True),
    Score("drift_middle", "Drift, middle", "The same of the segment in the middle.", "lower"),
    Score("sink_rise", "Sink rise", "Largest return of a clip to the likeness of its beginning.", "lower", True),
    Score("sink_similarity", "Sink similarity", "Likeness of the last segment and the first frame of its clip.", "as real"),
)


@kind("long_run", group="scorer")
@dataclass(frozen=True)
class LongRun(Scorer):
    """Drift and collapse onto the beginning, of clips much longer than those of training."""

    segments: int = 10  # of equal length; a training length each
    sink: int = 1  # first frames of pixels that are the beginning

    min_clips: ClassVar[int] = 2

    @property
    def legend(self) -> Sequence[Score]:
        return LEGEND

    def score(self, samples: ClipSet, reference: Any) -> Record:
        frames = looks(samples.clips)
        scores = {score.name: half_sampled(partial(self._one, score.name), frames) for score in LEGEND}
        drift, similarity = self.curves(frames)
        notes = (f"drift by segments: {_listed(drift)}", f"similarity to the beginning by segments: {_listed(similarity)}")
        return Record(f"long clips in {self.segments} segments", scores, 0, notes)

    def curves(self, frames: Tensor) -> tuple[list[float], list[float]]:
        """Drift and similarity of each segment."""
        return drift_by_segments(frames, self.segments), sink_similarity(frames, self.segments, self.sink)

    def _one(self, name: str, frames: Tensor) -> float:
        return self._scores(frames)[name]

    def _scores(self, frames: Tensor) -> dict[str, float]:
        drift, similarity = self.curves(frames)
        return {
            "drift": drift[-1],
            "drift_middle": drift[len(drift) // 2],
            "sink_rise": largest_rise(similarity),
            "sink_similarity": similarity[-1],
        }


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
