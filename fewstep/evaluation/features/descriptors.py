"""Classical descriptors of colour, texture and motion: no network and no weights, for any clip.

Each clip becomes 58 numbers, of frames scaled to a short side of 64 pixels:

    colour     mean and deviation of luma and two colour differences; histogram of luma (8); the same means of a 2 x 2 grid
    texture    log energy of four octaves of a Laplacian pyramid; histogram of gradient directions (8), weighted by size
    motion     log energy of first and second differences in time at three scales; optical flow (Farneback): mean, deviation
               over time, ninth decile, histogram of its directions (8) and drift; correlation of neighbouring frames
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import kind
from fewstep.evaluation.features.contract import Extractor, evenly, resized

Floats = NDArray[np.float64]
SIDE = 64  # pixels of the short side


@kind("descriptors", group="features")
@dataclass(frozen=True)
class Descriptors(Extractor):
    """Histograms of colour, gradients and motion; no network."""

    label = "classical descriptors"

    @property
    def fingerprint(self) -> str:
        return f"v1-{SIDE}px"

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.stack([_described(clip) for clip in clips])).float()[:, None]


def _described(clip: NDArray[np.uint8]) -> Floats:
    height, width = clip.shape[1:3]
    scale = SIDE / min(height, width)
    clip = resized(clip, max(8, round(height * scale)), max(8, round(width * scale)))
    rgb = clip.astype(np.float64) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    opponent = np.stack([luma, rgb[..., 0] - rgb[..., 1], 0.5 * (rgb[..., 0] + rgb[..., 1]) - rgb[..., 2]], axis=-1)
    return np.concatenate([_colour(opponent, luma), _texture(luma), _motion(clip, luma)])


def _colour(opponent: Floats, luma: Floats) -> Floats:
    half_h, half_w = luma.shape[1] // 2, luma.shape[2] // 2
    quarters = [opponent[:, y, x].mean(axis=(0, 1, 2)) for y in (slice(half_h), slice(half_h, None)) for x in
                (slice(half_w), slice(half_w, None))]  # fmt: skip
    histogram = np.histogram(luma, bins=8, range=(0, 1))[0] / luma.size
    return np.concatenate([opponent.mean(axis=(0, 1, 2)), opponent.std(axis=(0, 1, 2)), histogram, *quarters])


def _texture(luma: Floats) -> Floats:
    import cv2

    energies: list[list[float]] = []
    directions = np.zeros(8)
    for frame in luma[evenly(8, len(luma))]:
        level, own = frame.astype(np.float32), list[float]()
        for _ in range(4):
            below = cv2.pyrDown(level)
            band = level - cv2.pyrUp(below, dstsize=(level.shape[1], level.shape[0]))
            own.append(_log_energy(band))
            level = below
        energies.append(own)
        dx, dy = cv2.Sobel(frame, cv2.CV_64F, 1, 0), cv2.Sobel(frame, cv2.CV_64F, 0, 1)
        directions += np.histogram(np.arctan2(dy, dx) % np.pi, bins=8, range=(0, np.pi), weights=np.hypot(dx, dy))[0]
    return np.concatenate([np.mean(energies, axis=0), directions / max(directions.sum(), 1e-9)])


def _motion(clip: NDArray[np.uint8], luma: Floats) -> Floats:
    import cv2

    scales = [luma]
    for _ in range(2):
        scales.append(np.stack([cv2.pyrDown(frame) for frame in scales[-1]]))
    differences: list[float] = []
    for level in scales:
        first = np.diff(level, axis=0)
        second = np.diff(first, axis=0)
        differences += [_log_energy(first), _log_energy(second)]
    return np.concatenate([differences, _flow(clip), [_correlation(luma)]])


def _flow(clip: NDArray[np.uint8]) -> Floats:
    """Mean length, its deviation over time, ninth decile, histogram of directions and mean vector of the flow, in pixels."""
    import cv2

    if len(clip) < 2:
        return np.zeros(13)
    lengths, deciles, vectors, directions = list[float](), list[float](), list[Floats](), np.zeros(8)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    for place in evenly(12, len(clip) - 1):
        flow = flow_between(grey[place], grey[place + 1])
        length = np.hypot(flow[..., 0], flow[..., 1])
        lengths.append(float(length.mean()))
        deciles.append(float(np.quantile(length, 0.9)))
        vectors.append(flow.mean(axis=(0, 1)))
        angle = np.arctan2(flow[..., 1], flow[..., 0]) % (2 * np.pi)
        directions += np.histogram(angle, bins=8, range=(0, 2 * np.pi), weights=length)[0]
    shares = directions / max(directions.sum(), 1.0)
    drift = np.stack(vectors).mean(axis=0)
    return np.array([np.mean(lengths), np.std(lengths), np.mean(deciles), *shares, *drift], np.float64)


def flow_between(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Floats:
    """The dense optical flow (H, W, 2) from one grey picture to the next, in pixels (Farneback 2003)."""
    import cv2

    start = np.zeros((*before.shape, 2), np.float32)
    return cv2.calcOpticalFlowFarneback(before, after, start, 0.5, 3, 11, 3, 5, 1.1, 0).astype(np.float64)


def _correlation(luma: Floats) -> float:
    """The mean correlation of neighbouring frames."""
    if len(luma) < 2:
        return 1.0
    rows = luma.reshape(len(luma), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1)
    return float(np.mean((rows[1:] * rows[:-1]).sum(axis=1) / np.maximum(norms[1:] * norms[:-1], 1e-9)))


def _log_energy(values: Floats | NDArray[np.float32]) -> float:
    return float(np.log10(1e-8 + np.square(values).mean())) if values.size else -8.0
