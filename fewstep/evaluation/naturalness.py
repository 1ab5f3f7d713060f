"""How far the local statistics of a clip are from those of real clips, without a clip to compare with: the measure of NIQE.

Mittal, Soundararajan & Bovik 2013, "Making a completely blind image quality analyzer". Brightness is divided by its local
deviation; of square patches, at two scales, 18 numbers each describe the law of these coefficients and of the products of
neighbours. NIQE fits a Gaussian to such features of pristine photographs. Here it is fitted to the user's own real clips: no
file of parameters is needed, clips of 64 x 64 are allowed (the published patch has 96 pixels), and a look that the real clips
share, such as that of a game, is no fault. The distance of a clip is that of its mean features,

    sqrt((m - m_real)' S_real^+ (m - m_real))
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.evaluation.features.contract import evenly
from fewstep.evaluation.frechet import Moments
from fewstep.evaluation.score import Clip

FRAMES = 8  # of a clip that are looked at
PATCH, LEAST = 96, 16  # pixels of a patch: the published ones, and the fewest
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours whose products are described

Floats = NDArray[np.float64]


def features(clip: Clip) -> Tensor | None:
    """One row of 36 numbers for each patch of some frames (k, 36); None for frames that are smaller than a patch."""
    import cv2

    side = min(clip.shape[1:3])
    patch = max(LEAST, min(PATCH, side // 4)) // 2 * 2
    if side < patch:
        return None
    rows: list[Floats] = []
    for frame in clip[evenly(FRAMES, len(clip))]:
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float64)
        height, width = (n // patch * patch for n in grey.shape)
        grey = grey[:height, :width]
        half = cv2.resize(grey, (width // 2, height // 2), interpolation=cv2.INTER_AREA).astype(np.float64)
        rows.append(np.concatenate([described(_normalised(grey), patch), described(_normalised(half), patch // 2)], axis=1))
    return torch.from_numpy(np.concatenate(rows))


def distances(clips: Tensor, real: Moments) -> list[float]:
    """The distance of each clip's mean features (n, 36) from the law of the patches of real clips."""
    law = real.compute()
    apart = clips.double() - law.mean
    return (apart @ torch.linalg.pinv(law.covariance, hermitian=True) * apart).sum(dim=1).clamp(min=0).sqrt().tolist()


def _normalised(grey: Floats) -> Floats:
    """Brightness less its local mean, divided by its local deviation (MSCN)."""
    import cv2

    def mean(picture: Floats) -> Floats:
        return cv2.GaussianBlur(picture, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE).astype(np.float64)

    local = mean(grey)
    deviation = np.sqrt(np.abs(mean(grey * grey) - local * local))
    return (grey - local) / (deviation + 1)


def described(picture: Floats, patch: int) -> Floats:
    """The 18 numbers of each patch (k, 18): two of the coefficients, four of each product of neighbours."""
    alpha, left, right = asymmetric(_patches(picture, patch))
    columns = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        products = picture * np.roll(picture, shift, axis=(0, 1))
        alpha, left, right = asymmetric(_patches(products, patch))
        columns += [alpha, (right - left) * _gamma(2 / alpha) / _gamma(1 / alpha), left, right]
    return np.stack(columns, axis=1)


def _patches(picture: Floats, patch: int) -> Floats:
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    return picture.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, patch * patch)


def asymmetric(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Shape, left and right scale of the asymmetric generalised Gaussian with the moments of each row (k, n).

    Lasmar, Stitou & Berthoumieu 2009: the shape is that whose ratio of moments is nearest to the one of the values.
    """
    is_left = values < 0
    squares = values * values

    def spread(mask: NDArray[np.bool_]) -> Floats:
        return np.sqrt((squares * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)) + 1e-9

    left, right = spread(is_left), spread(~is_left & (values != 0))
    ratio = left / right
    moments = np.square(np.abs(values).mean(axis=1)) / (squares.mean(axis=1) + 1e-12)
    target = moments * (ratio**3 + 1) * (ratio + 1) / np.square(ratio**2 + 1)
    shapes, ratios = _table()
    alpha = shapes[np.clip(np.searchsorted(ratios, target), 0, len(shapes) - 1)]
    scale = np.sqrt(_gamma(1 / alpha) / _gamma(3 / alpha))
    return alpha, left * scale, right * scale


@functools.cache
def _table() -> tuple[Floats, Floats]:
    """Shapes from .2 to 10, and their E|x|^2 / E x^2, which grows with the shape."""
    shapes = np.arange(0.2, 10, 0.001)
    return shapes, np.square(_gamma(2 / shapes)) / (_gamma(1 / shapes) * _gamma(3 / shapes))


def _gamma(values: Floats) -> Floats:
    return torch.from_numpy(values).lgamma().exp().numpy()
