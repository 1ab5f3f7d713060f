"""Against double loops over the definitions, scipy's assignment, and clips whose score is known by construction."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.optimize
import torch

from fewstep.evaluation import blur_ssim, canny_f1, depth_rmse, mean_iou
from fewstep.evaluation.control import assignment, canny_scores, match_masks

cv2.setNumThreads(1)


def soft_clip(seed: int, num: int = 3, height: int = 20, width: int = 26) -> np.ndarray:
    rng = np.random.default_rng(seed)
    clip = rng.integers(0, 256, (num, height, width, 3)).astype(np.uint8)
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in clip])


def ssim_by_loops(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004 with a 7 x 7 uniform window at every pixel, the image mirrored about its border."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    total = []
    for channel in range(3):
        x, y = (np.pad(image[:, :, channel].astype(float), 3, mode="symmetric") for image in (a, b))
        for i in range(a.shape[0]):
            for j in range(a.shape[1]):
                p, q = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
                both = np.cov(p, q)  # divides by 48
                total.append(
                    (2 * p.mean() * q.mean() + c1)
                    * (2 * both[0, 1] + c2)
                    / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (both[0, 0] + both[1, 1] + c2))
                )
    return float(np.mean(total))


@pytest.mark.parametrize("how", [(30, 150.0, 100.0), (5, 60.0, 2.0)])
def test_blur_ssim_against_loops(how: tuple[int, float, float]) -> None:
    """Once compared with scikit-image 0.26 (full=True, channel_axis=2) on other clips: equal to 2e-12 in both settings."""
    wanted = soft_clip(0, 2, 12, 14)
    made = (0.6 * wanted + 0.4 * soft_clip(1, 2, 12, 14)).astype(np.uint8)
    scores = []
    for a, b in zip(made, wanted):
        a, b = cv2.bilateralFilter(a, *how), cv2.bilateralFilter(b, *how)
        scores.append(ssim_by_loops(a, b, float(b.max()) - float(b.min())))
    got = blur_ssim(made, wanted, diameter=how[0], sigma_color=how[1], sigma_space=how[2])
    assert got == pytest.approx(np.mean(scores), abs=1e-10)
    assert got < 0.98


def test_blur_ssim_of_equal_flat_and_noisy_clips() -> None:
    clip = soft_clip(2)
    assert blur_ssim(clip, clip) == pytest.approx(1, abs=1e-12)
    assert blur_ssim(torch.from_numpy(clip), clip) == pytest.approx(1, abs=1e-12)
    flat = np.full_like(clip, 100)
    assert blur_ssim(flat, flat) == pytest.approx(1, abs=1e-12)  # no 0 / 0
    assert 0 <= blur_ssim(clip, flat) < blur_ssim(clip, flat, data_range=255.0) < 1
    noise = np.random.default_rng(0).integers(-25, 26, clip.shape)
    mild = np.clip(clip + noise, 0, 255).astype(np.uint8)
    assert blur_ssim(soft_clip(3), clip) < blur_ssim(mild, clip) < 1


def test_the_made_clip_is_cut_and_resized_to_the_wanted_one() -> None:
    wanted = np.stack([cv2.resize(frame, (52, 40)) for frame in soft_clip(4)])
    longer = np.concatenate([wanted, wanted])
    larger = np.stack([cv2.resize(frame, (104, 80)) for frame in wanted])
    assert blur_ssim(longer, wanted) == pytest.approx(1, abs=1e-12)
    assert blur_ssim(larger, wanted, diameter=5) > 0.98
    with pytest.raises(ValueError, match=r"clip has 2 frames and target has 3.*target\[:2\]"):
        blur_ssim(wanted[:2], wanted)


def squares(*corners: tuple[int, int], size: int = 40) -> np.ndarray:
    """One frame for each corner: a white 12 x 12 square there."""
    clip = np.zeros((len(corners), size, size, 3), np.uint8)
    for frame, (row, column) in zip(clip, corners):
        frame[row : row + 12, column : column + 12] = 255
    return clip


def edge_pixels(clip: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    grey = [(0.299 * f[..., 0] + 0.587 * f[..., 1] + 0.114 * f[..., 2]).round().astype(np.uint8) for f in clip]
    return np.stack([cv2.Canny(frame, low, high) for frame in grey]) > 0


def test_canny_pools_over_the_frames() -> None:
    """Frame 0 agrees, frame 1 is elsewhere: pooled F1 is the share of pixels in agreement, not a mean of frames."""
    wanted = squares((5, 5), (5, 5))
    made = squares((5, 5), (24, 24))
    made[0, 25:37, 25:37] = 255  # one more square in frame 0
    ours, theirs = edge_pixels(made), edge_pixels(wanted)
    hits = (ours & theirs).sum()
    got = canny_scores(made, wanted)
    assert got.precision == pytest.approx(hits / ours.sum()) and got.recall == pytest.approx(hits / theirs.sum())
    assert got.recall == pytest.approx(0.5) and got.precision == pytest.approx(1 / 3, abs=0.01)
    assert canny_f1(made, wanted) == got.f1 == pytest.approx(2 * hits / (ours.sum() + theirs.sum()))
    assert canny_scores(wanted, wanted) == (1, 1, 1)


def test_canny_tolerance_is_in_pixels() -> None:
    wanted, made = squares((5, 5)), squares((5, 7))
    exact, near = canny_f1(made, wanted), canny_f1(made, wanted, tolerance=1)
    assert exact < near < canny_f1(made, wanted, tolerance=2) == 1.0


def test_canny_sees_grey_and_not_swapped_channels() -> None:
    """A blue square of 200 is grey 23, below the threshold; read as BGR it would be grey 60 and have edges."""
    blue = np.zeros((1, 40, 40, 3), np.uint8)
    blue[0, 10:22, 10:22, 2] = 200
    assert not edge_pixels(blue).any()
    with pytest.raises(ValueError, match="no edge at Canny thresholds 100/200"):
        canny_f1(squares((5, 5)), blue)
    assert canny_f1(blue, squares((5, 5))) == 0  # a student that draws nothing scores nothing
    assert canny_f1(blue, blue, low=20, high=40) == 1


def depth_clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 3, (4, 9, 11))


def test_depth_ignores_a_factor_per_frame_and_nothing_else() -> None:
    wanted = depth_clip(0)
    factors = np.array([0.1, 1, 3, 20]).reshape(4, 1, 1)
    for mode in ("linear", "log"):
        assert depth_rmse(wanted * factors, wanted, mode) == pytest.approx(0, abs=1e-12)
        assert depth_rmse(wanted + 1, wanted, mode) > 0.05
        assert depth_rmse(torch.tensor(wanted).float(), wanted, mode) < 1e-6


def test_depth_against_loops() -> None:
    made, wanted = depth_clip(1), depth_clip(2)
    made[0, :3] = 0  # unknown
    wanted[1, 4:] = 0
    made[3] = 0  # a whole frame without a valid pixel counts as 0
    linear, log = [], []
    for a, b in zip(made, wanted):
        pairs = [(p, q) for p, q in zip(a.ravel().tolist(), b.ravel().tolist()) if p > 0 and q > 0]
        if not pairs:
            linear.append(0.0)
            log.append(0.0)
            continue
        scale = sorted(q for _, q in pairs), sorted(p for p, _ in pairs)
        ratio = np.median(scale[0]) / np.median(scale[1])
        linear.append(np.mean([(q - ratio * p) ** 2 for p, q in pairs]) ** 0.5)
        d = [np.log(p) - np.log(q) for p, q in pairs]
        log.append((np.mean(np.square(d)) - np.mean(d) ** 2) ** 0.5)
    assert depth_rmse(made, wanted) == pytest.approx(np.mean(linear), rel=1e-12)
    assert depth_rmse(made, wanted, "log") == pytest.approx(np.mean(log), rel=1e-9)


def test_depth_caps_and_resizes() -> None:
    wanted = np.ones((1, 10, 10))
    made = wanted.copy()
    made[0, 0, 0] = 1001
    assert depth_rmse(made, wanted) == pytest.approx((10**2 / 100) ** 0.5)
    assert depth_rmse(made, wanted, cap=None) == pytest.approx((1000**2 / 100) ** 0.5)
    assert depth_rmse(np.ones((3, 20, 20)), wanted) == pytest.approx(0)


def box(rows: slice, columns: slice, shape: tuple[int, int, int] = (2, 10, 10)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[:, rows, columns] = True
    return mask


def test_masks_matched_by_hand() -> None:
    wanted = {
        "ball": box(slice(0, 4), slice(0, 5)),
        "cup": box(slice(6, 10), slice(6, 10)),
        "far": box(slice(0, 2), slice(8, 10)),
    }
    made = {"a cup": wanted["cup"], "a ball": box(slice(0, 4), slice(0, 10)), "none": np.zeros((2, 10, 10), bool)}
    match = match_masks(made, wanted)
    assert match.pairs == (("a cup", "cup", 1.0), ("a ball", "ball", 0.5))
    assert match.mean_iou == mean_iou(made, wanted) == 0.75
    assert match.recall == 1.0 and (match.num, match.num_target) == (2, 3)


def test_dropped_misses_raise_the_mean_and_show_in_the_recall() -> None:
    wanted = {"a": box(slice(0, 5), slice(0, 10)), "b": box(slice(5, 10), slice(0, 10))}
    made = {"a": wanted["a"], "b": box(slice(5, 6), slice(0, 5))}  # IoU 0.1: dropped, since not above it
    match = match_masks(made, wanted)
    assert match.mean_iou == 1.0 and match.recall == 0.5
    assert match_masks(made, wanted, threshold=0.0).mean_iou == pytest.approx(0.55)


def test_tubes_are_spacetime_and_phrases_are_united() -> None:
    still, late = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    still[0, :2], late[1, :2] = True, True
    assert mean_iou({"x": still}, {"x": late}) == 0  # the same place at another time is no overlap
    assert mean_iou([("x", still), ("x", late)], {"x": still | late}) == 1


def test_label_arrays() -> None:
    labels = np.zeros((2, 6, 6), np.int64)
    labels[:, :3, :3], labels[:, 3:, 3:] = 1, 7
    swapped = np.where(labels == 1, 7, np.where(labels == 7, 1, 0))
    assert mean_iou(labels, swapped) == 1  # labels are names, not classes
    assert match_masks(torch.from_numpy(labels), labels).pairs == (("1", "1", 1.0), ("7", "7", 1.0))
    assert match_masks(np.zeros_like(labels), labels) == (0.0, 0.0, (), 0, 2)


def test_assignment_against_scipy() -> None:
    rng = np.random.default_rng(0)
    for trial in range(400):
        shape = rng.integers(1, 9, 2)
        cost = rng.integers(0, 4, shape).astype(float) if trial % 2 else rng.normal(size=shape)
        pairs = assignment(cost)
        assert len(pairs) == min(shape) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
        best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
        assert sum(cost[i, j] for i, j in pairs) == pytest.approx(best, abs=1e-9)


def test_matching_is_the_best_overall_and_not_greedy() -> None:
    """Overlaps x-p .6, x-q .5, y-p .5, y-q 0: greedy takes x-p and leaves y with nothing; the best sum is .5 + .5."""
    wide = slice(0, 10)
    wanted = {"p": box(slice(0, 6), wide), "q": box(slice(5, 10), wide)}
    made = {"x": box(slice(0, 10), wide), "y": box(slice(0, 3), wide)}
    assert match_masks(made, wanted).pairs == (("x", "q", 0.5), ("y", "p", 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blur_ssim(np.zeros((2, 9, 9, 3)), np.zeros((2, 9, 9, 3), np.uint8)), "clip must be uint8 RGB"),
        (lambda: canny_f1(np.zeros((2, 3, 9, 9), np.uint8), np.zeros((2, 9, 9, 3), np.uint8)), r"\(T, H, W, 3\)"),
        (lambda: blur_ssim(soft_clip(0, 1, 6, 9), soft_clip(0, 1, 6, 9)), "7 x 7"),
        (lambda: canny_f1(squares((1, 1)), squares((1, 1)), tolerance=-1), "tolerance"),
        (lambda: depth_rmse(np.ones((2, 3)), np.ones((2, 3))), "depth of shape"),
        (lambda: depth_rmse(np.full((1, 2, 2), np.nan), np.ones((1, 2, 2))), "finite depth"),
        (lambda: depth_rmse(np.zeros((1, 2, 2)), np.ones((1, 2, 2))), "no pixel has positive depth"),
        (lambda: depth_rmse(np.ones((1, 2, 2)), np.ones((1, 2, 2)), "squared"), "'linear' or 'log'"),  # type: ignore[arg-type]
        (lambda: mean_iou({"a": np.ones((1, 2, 2), bool)}, {}), "no object to find"),
        (lambda: mean_iou({"a": np.ones((1, 2, 2))}, {"a": np.ones((1, 2, 3))}), "different shapes"),
        (lambda: mean_iou({"a": np.full((1, 2, 2), 0.5)}, {"a": np.ones((1, 2, 2))}), "boolean T H W"),
        (lambda: mean_iou(np.zeros((2, 2)), np.ones((1, 2, 2), int)), "label array"),
    ],
)
def test_wrong_use_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
