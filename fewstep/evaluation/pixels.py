"""Scores of one clip from its pixels: whether it moves, flickers, tears and is sharp, and how close it is to another one.

None of the scores in time means anything alone. A frozen clip has no flicker and no warping error; so they stand beside the
amount of motion, and all of them beside the same scores of real clips.

    motion          mean length of the optical flow (Farneback) between neighbouring frames, in percent of the diagonal
    motion_peak     mean length of the fastest twentieth of the pixels, likewise
    warping_error   mean difference of a frame and its successor, moved back along the flow; where flow there and back agree
    flicker         second difference in time of the mean brightness of 4 x 4 areas; steady motion and light have none
    sharpness       decimal logarithm of the mean squared Laplacian of brightness
    psnr            of a clip against the one it should equal, in dB over the whole clip, at most 100
    ssim            mean structural similarity (Wang et al. 2004) likewise, grey values 0 to 255
    given_psnr      psnr of the frames that the model received as the beginning of the clip
    seam            step from the last given frame to the first new one, over the median step of the new ones
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError
from fewstep.evaluation.control import ssim
from fewstep.evaluation.features.contract import evenly, resized
from fewstep.evaluation.features.descriptors import flow_between
from fewstep.evaluation.score import Clip, Score

SIDE = 128  # pixels of the short side at which motion is measured, at the most
PAIRS = 16  # of neighbouring frames whose flow is computed, spread evenly

LEGEND = (
    Score("motion", "Motion", "Mean optical flow between frames, in percent of the picture's diagonal.", "as real", True),
    Score("motion_peak", "Fastest motion", "Optical flow of the fastest twentieth of the pixels, likewise.", "as real"),
    Score("warping_error", "Warping error", "What differs between neighbouring frames beyond motion, of 255.", "as real"),
    Score("flicker", "Flicker", "Unsteadiness of brightness from frame to frame, of 255; 0 for a frozen clip.", "as real"),
    Score("sharpness", "Sharpness", "Logarithm of the energy of the finest details.", "as real"),
)
PAIRED = (
    Score("psnr", "PSNR", "Closeness to the clip it should equal, in decibels.", "higher", True),
    Score("ssim", "SSIM", "Structural similarity to the clip it should equal.", "higher", True),
    Score("lpips", "LPIPS", "Perceptual difference from the clip it should equal.", "lower", True),
)
GIVEN = (
    Score("given_psnr", "PSNR of given frames", "Closeness of the first frames to those that the model received.", "higher"),
    Score("seam", "Seam", "Jump from the last given frame to the first new one, in usual steps; 1 is none.", "as real"),
)


def in_time(clip: Clip) -> dict[str, float]:
    """The scores of one clip T H W 3; those in time are nan for a picture."""
    import cv2

    height, width = clip.shape[1:3]
    scale = min(1.0, SIDE / min(height, width))
    small = resized(clip, max(8, round(height * scale)), max(8, round(width * scale)))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    out = {"sharpness": float(np.mean([_sharpness(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY)) for f in clip[evenly(8, len(clip))]]))}
    if len(clip) < 2:
        return dict.fromkeys((score.name for score in LEGEND), math.nan) | out
    diagonal = math.hypot(*grey[0].shape)
    motions, peaks, errors = list[float](), list[float](), list[float]()
    for place in evenly(PAIRS, len(grey) - 1):
        flow = flow_between(grey[place], grey[place + 1])
        length = np.hypot(flow[..., 0], flow[..., 1])
        fastest = np.partition(length.ravel(), -max(1, length.size // 20))[-max(1, length.size // 20) :]
        motions.append(100 * float(length.mean()) / diagonal)
        peaks.append(100 * float(fastest.mean()) / diagonal)
        errors.append(warping_error(grey[place], grey[place + 1], flow))
    return out | {
        "motion": float(np.mean(motions)),
        "motion_peak": float(np.mean(peaks)),
        "warping_error": float(np.nanmean(errors)) if not np.isnan(errors).all() else math.nan,
        "flicker": flicker(np.stack(grey)),
    }


def warping_error(before: NDArray[np.uint8], after: NDArray[np.uint8], flow: NDArray[np.float64]) -> float:
    """The mean |before - after moved back along the flow|, in grey values, where the flow back agrees within a pixel."""
    import cv2

    height, width = before.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    to_x, to_y = x + flow[..., 0].astype(np.float32), y + flow[..., 1].astype(np.float32)
    moved = cv2.remap(after, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    back = cv2.remap(flow_between(after, before).astype(np.float32), to_x, to_y, cv2.INTER_LINEAR)
    is_inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    agrees = is_inside & (np.hypot(flow[..., 0] + back[..., 0], flow[..., 1] + back[..., 1]) < 1)
    return float(np.abs(before.astype(np.float64) - moved)[agrees].mean()) if agrees.any() else math.nan


def flicker(grey: NDArray[np.uint8]) -> float:
    """Mean |second difference in time| of the mean brightness of 4 x 4 areas, of grey T H W; nan for less than three frames."""
    import cv2

    if len(grey) < 3:
        return math.nan
    areas = np.stack([cv2.resize(frame.astype(np.float64), (4, 4), interpolation=cv2.INTER_AREA) for frame in grey])
    return float(np.abs(np.diff(areas, n=2, axis=0)).mean())


def _sharpness(grey: NDArray[np.uint8]) -> float:
    import cv2

    return math.log10(1e-2 + float(np.square(cv2.Laplacian(grey.astype(np.float64), cv2.CV_64F)).mean()))


def psnr(clip: Clip, truth: Clip) -> float:
    """The peak signal-to-noise ratio of the whole clip in dB, 100 at the most (equal clips)."""
    clip, truth = same_size(clip, truth)
    error = float(np.square(clip.astype(np.float64) - truth).mean())
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def closeness(clip: Clip, truth: Clip) -> dict[str, float]:
    """PSNR and SSIM of a clip against the one it should equal."""
    clip, truth = same_size(clip, truth)
    return {"psnr": psnr(clip, truth), "ssim": ssim(clip, truth, data_range=255.0) if min(clip.shape[1:3]) >= 7 else math.nan}


def of_given(clip: Clip, beginning: Clip) -> dict[str, float]:
    """How well a clip keeps the frames it was given, and how it goes on from them."""
    num = len(beginning)
    scores = {"given_psnr": psnr(clip[:num], beginning), "seam": math.nan}
    steps = np.abs(np.diff(clip.astype(np.float64), axis=0)).mean(axis=(1, 2, 3))
    if len(steps) > num:
        scores["seam"] = float(steps[num - 1]) / max(float(np.median(steps[num:])), 1e-3)
    return scores


def same_size(clip: Clip, truth: Clip) -> tuple[Clip, Clip]:
    """Both, cut to the shorter; refuses different sizes of frames, since resizing either would be scored."""
    if clip.shape[1:] != truth.shape[1:]:
        own, other = (" x ".join(map(str, part.shape[1:3])) for part in (clip, truth))
        raise UserError(f"a clip of {own} cannot be compared pixel by pixel with one of {other}: make both in one size")
    num = min(len(clip), len(truth))
    return clip[:num], truth[:num]
