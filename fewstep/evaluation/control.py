"""Control fidelity as TransferBench (Transfer1, arXiv 2503.14492, and the PAI-Bench code) measures it: whether a clip keeps the
blur, edges, depth and objects of its target, the clip that controlled it. Both go through the same transform and are compared;
each clip has one number, and a table shows the plain mean over clips.

The defaults are the published ones, for clips of 720p and their first 121 frames. They do not fit small clips: at 32 x 32 the
published blur leaves an unrelated clip at .81 and Canny at .42. Scale them (`blur_ssim(..., diameter=5, sigma_color=60,
sigma_space=2)`, `canny_f1(..., low=40, high=90)`), write down which were used, and print three anchors beside every score:
identical clips, the annotator on real clips (the floor), an unrelated clip (chance).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from fewstep.errors import UserError

Clip = np.ndarray | Tensor  # uint8 RGB, T H W 3
Depth = np.ndarray | Tensor  # T H W, positive where known
Masks = Mapping[str, np.ndarray] | Sequence[tuple[str, np.ndarray]] | np.ndarray | Tensor  # see match_masks


class CannyScores(NamedTuple):
    """Edge pixels pooled over all frames of the clip (micro)."""

    f1: float
    precision: float
    recall: float


class KeypointScores(NamedTuple):
    """Figures of two clips, matched one to one in every frame."""

    distance: float  # mean over the points that both have, in shares of the picture's diagonal; nan if there is none
    within: float  # share of the target's visible points whose counterpart is nearer than `radius`


class MaskMatch(NamedTuple):
    """Objects of the two clips matched one to one by the overlap of their space-time tubes."""

    mean_iou: float  # over the pairs; 0 if there is none
    recall: float  # pairs / matched objects: what the mean does not show
    pairs: tuple[tuple[str, str, float], ...]  # (name in the clip, in the target, IoU) of those that overlap
    num: int
    num_target: int


def blur_ssim(
    clip: Clip,
    target: Clip,
    *,
    diameter: int = 30,
    sigma_color: float = 150.0,
    sigma_space: float = 100.0,
    data_range: float | Literal["frame"] = "frame",
) -> float:
    """The mean structural similarity of the two clips after a strong bilateral blur; 1 is equal.

    SSIM (Wang et al. 2004) as scikit-image computes it: 7 x 7 uniform window, unbiased variances, K1 .01, K2 .03, channels
    averaged, but the mean of the *full* map with its mirrored borders (1e-3 to 1e-2 from scikit-image's default, which crops
    them). data_range "frame" is max - min of each blurred target frame, as published; it makes flat frames harsh, and is held
    at 1 grey level for constant ones. `clip` is cut to the length of `target` and resized to its size. 3 s a frame of 720p.
    """
    clip, target = _same_frame(clip, target)
    how = (diameter, sigma_color, sigma_space)
    return ssim(_blurred(clip, *how), _blurred(target, *how), data_range)


def ssim(clip: Iterable[np.ndarray], target: Iterable[np.ndarray], data_range: float | Literal["frame"] = "frame") -> float:
    """The mean structural similarity of two clips of one size, frame by frame; see `blur_ssim`."""
    scores: list[float] = []
    for frame, target_frame in zip(clip, target, strict=True):
        if min(target_frame.shape[:2]) < 7:
            size = " x ".join(map(str, target_frame.shape[:2]))
            raise UserError(f"SSIM's window is 7 x 7, the frames are {size}. Score larger frames.")
        span = max(float(target_frame.max()) - float(target_frame.min()), 1.0) if data_range == "frame" else data_range
        scores.append(float(_ssim_map(frame.astype(np.float64), target_frame.astype(np.float64), span).mean()))
    return float(np.mean(scores))


def canny_f1(clip: Clip, target: Clip, low: float = 100, high: float = 200, tolerance: int = 0) -> float:
    """The F1 score of the Canny edges of `clip` against those of `target`; published models reach .28 to .49."""
    return canny_scores(clip, target, low, high, tolerance).f1


def canny_scores(clip: Clip, target: Clip, low: float = 100, high: float = 200, tolerance: int = 0) -> CannyScores:
    """F1, precision and recall of edge pixels, pooled over the whole clip.

    RGB to grey, then cv2.Canny (aperture 3, L1 gradient). An edge counts as matched if the other clip has one within
    `tolerance` pixels (a square of 2 t + 1); published scores use 0. Published thresholds: 20/50, 50/100, 100/200, 200/300,
    300/400. A target without an edge is an error; a clip without one scores 0.
    """
    if tolerance < 0:
        raise UserError(f"tolerance is a number of pixels, not {tolerance}.")
    clip, target = _same_frame(clip, target)
    edges, target_edges = _edges(clip, low, high), _edges(target, low, high)
    if not target_edges.any():
        raise UserError(
            f"the target has no edge at Canny thresholds {low:g}/{high:g}. Lower them: small clips need 40/90 or less."
        )
    return edge_scores(edges, target_edges, tolerance)


def edge_scores(edges: np.ndarray, target_edges: np.ndarray, tolerance: int = 0) -> CannyScores:
    """`canny_scores` of edges that are already computed, T H W, not 0 where an edge is."""
    import cv2

    near, near_target = edges, target_edges
    if tolerance:
        square = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
        near = np.stack([cv2.dilate(frame, square) for frame in edges])
        near_target = np.stack([cv2.dilate(frame, square) for frame in target_edges])
    precision = _share(edges, near_target)
    recall = _share(target_edges, near)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return CannyScores(f1, precision, recall)


def depth_rmse(clip: Depth, target: Depth, mode: Literal["linear", "log"] = "linear", *, cap: float | None = 10.0) -> float:
    """The scale-invariant root mean square error of depth T H W, mean over frames; 0 is equal up to a factor per frame.

    "linear": each frame of `clip` is scaled by median(target) / median(clip), residuals are clipped to -+ cap. The result has
    the unit of `target`, and TransferBench feeds relative *inverse* depth, so its numbers are not metres.
    "log": sqrt(mean d^2 - mean(d)^2), d = log clip - log target (Eigen et al. 2014, MegaDepth eq. 2), in which the factor
    cancels. The two are not comparable. Pixels that are not positive in both are left out; a frame without any counts as 0,
    as published, and a clip without any is refused.
    """
    if mode not in ("linear", "log"):
        raise UserError(f"mode is 'linear' or 'log', not {mode!r}.")
    own, others = _depth(clip, "clip"), _depth(target, "target")
    own = _cut(own, others)
    if own.shape[1:] != others.shape[1:]:
        own = np.stack([_resized(frame, others.shape[1], others.shape[2]) for frame in own])
    errors = []
    valid = (own > 0) & (others > 0)
    if not valid.any():
        raise UserError("no pixel has positive depth in both clips. Pass depth or inverse depth, not normals or a mask.")
    for a, b, mask in zip(own, others, valid):
        if not mask.any():
            errors.append(0.0)
        elif mode == "linear":
            residual = b[mask] - a[mask] * (np.median(b[mask]) / np.median(a[mask]))
            residual = residual if cap is None else np.clip(residual, -cap, cap)
            errors.append(float(np.sqrt(np.mean(residual**2))))
        else:
            # std about the mean is the same and, unlike a difference of means, never the root of -1e-17
            errors.append(float(np.std(np.log(a[mask]) - np.log(b[mask]))))
    return float(np.mean(errors))


def mean_iou(clip: Masks, target: Masks, *, threshold: float = 0.1) -> float:
    """The mean intersection over union of matched objects; never quote it without `match_masks(...).recall`."""
    return match_masks(clip, target, threshold=threshold).mean_iou


def match_masks(clip: Masks, target: Masks, *, threshold: float = 0.1) -> MaskMatch:
    """Objects matched one to one so that the sum of their IoU over the whole clip is largest; pairs up to `threshold` dropped.

    Masks are boolean tubes T H W: a mapping {phrase: mask}, or pairs (phrase, mask), where masks of one phrase are united; or
    one integer array T H W of labels, 0 being background. Dropping misses raises the mean, hence the recall beside it:
    pairs / matched, where the smaller number of objects is matched. A clip without objects scores 0; a target without
    objects is an error.
    """
    own, others = _tubes(clip, "clip"), _tubes(target, "target")
    if not others:
        raise UserError("the target has no object to find. Leave this clip out, or pass its masks.")
    if not own:
        return MaskMatch(0.0, 0.0, (), 0, len(others))
    shapes = {mask.shape for mask in (*own.values(), *others.values())}
    if len(shapes) > 1:
        raise UserError(f"masks of different shapes {sorted(shapes)}. Cut and resize the clip before segmenting it.")
    overlap = np.array([[_iou(a, b) for b in others.values()] for a in own.values()])
    names, target_names = list(own), list(others)
    matched = assignment(-overlap)
    pairs = tuple((names[i], target_names[j], float(overlap[i, j])) for i, j in matched if overlap[i, j] > threshold)
    mean = sum(iou for _, _, iou in pairs) / len(pairs) if pairs else 0.0
    return MaskMatch(mean, len(pairs) / len(matched), pairs, len(own), len(others))


def keypoint_scores(
    clip: Sequence[Sequence[np.ndarray]],
    target: Sequence[Sequence[np.ndarray]],
    size: tuple[int, int],
    *,
    visible: float = 0.6,
    radius: float = 0.05,
) -> KeypointScores:
    """How far the keypoints of `clip` are from those of `target`, frame by frame.

    Each frame is a list of figures (K, 3): x, y in 0..1 and a score, which must reach `visible` in both clips. Figures with as
    many points are matched so that the sum of their mean distances is smallest. `within` is PCK (Yang & Ramanan 2013): a
    point of the target that has no counterpart counts as missed.
    """
    height, width = size
    to_pixels, diagonal = np.array([width, height], np.float64), float(np.hypot(height, width))
    distances, num_target = list[float](), 0
    for own, others in zip(clip, target, strict=True):
        num_target += sum(int((figure[:, 2] >= visible).sum()) for figure in others)
        if not own or not others:
            continue
        apart = [[_point_distances(a, b, visible, to_pixels / diagonal) for b in others] for a in own]
        cost = np.array([[float(row.mean()) if len(row) else 10.0 for row in rows] for rows in apart])
        for i, j in assignment(cost):
            distances += apart[i][j].tolist()
    if not num_target:
        raise UserError("the target has no visible keypoint. Leave this clip out.")
    near = sum(distance < radius for distance in distances)
    return KeypointScores(float(np.mean(distances)) if distances else float("nan"), near / num_target)


def _point_distances(a: np.ndarray, b: np.ndarray, visible: float, scale: np.ndarray) -> np.ndarray:
    """Distances of the points that both figures show, in shares of the diagonal."""
    if a.shape != b.shape:
        return np.zeros(0)
    both = (a[:, 2] >= visible) & (b[:, 2] >= visible)
    return np.linalg.norm((a[both, :2] - b[both, :2]) * scale, axis=1)


def _same_frame(clip: Clip, target: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, the clip cut to the length of the target and resized to its size."""
    own, others = _pixels(clip, "clip"), _pixels(target, "target")
    own = _cut(own, others)
    if own.shape != others.shape:
        own = np.stack([_resized(frame, others.shape[1], others.shape[2]) for frame in own])
    return own, others


def _pixels(clip: Clip, name: str) -> np.ndarray:
    array = clip.detach().cpu().numpy() if isinstance(clip, Tensor) else np.asarray(clip)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise UserError(
            f"{name} must be uint8 RGB of shape (T, H, W, 3), not {array.dtype} of shape {array.shape}. "
            "Scale to 0..255, round, and move the channels last."
        )
    return array


def _depth(depth: Depth, name: str) -> np.ndarray:
    array = depth.detach().cpu().numpy() if isinstance(depth, Tensor) else np.asarray(depth)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(
            f"{name} must be finite depth of shape (T, H, W), not {array.dtype} of shape {array.shape}. "
            "Set unknown pixels to 0."
        )
    return array.astype(np.float64)


def _cut(clip: np.ndarray, target: np.ndarray) -> np.ndarray:
    if len(clip) < len(target):
        raise UserError(
            f"clip has {len(clip)} frames and target has {len(target)}. Generate as many, or pass target[:{len(clip)}]."
        )
    return clip[: len(target)]


def _resized(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    import cv2

    shrinks = height * width < frame.shape[0] * frame.shape[1]
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _blurred(clip: np.ndarray, diameter: int, sigma_color: float, sigma_space: float) -> Iterable[np.ndarray]:
    import cv2

    return (cv2.bilateralFilter(np.ascontiguousarray(f), diameter, sigma_color, sigma_space) for f in clip)


def _ssim_map(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """SSIM per pixel and channel of two float64 images; the window is mirrored at the border, edge pixel included."""
    import cv2

    def mean(image: np.ndarray) -> np.ndarray:
        return cv2.blur(image, (7, 7), borderType=cv2.BORDER_REFLECT)

    unbiased = 49 / 48
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    both = unbiased * (mean(a * b) - mean_a * mean_b)
    return (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _edges(clip: np.ndarray, low: float, high: float) -> np.ndarray:
    import cv2

    # Canny on RGB would take the strongest channel, and on BGR by habit a different grey.
    return np.stack([cv2.Canny(cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY), low, high) for f in clip])


def _share(edges: np.ndarray, near: np.ndarray) -> float:
    """The share of `edges` that lie on `near`; 0 without edges."""
    num = np.count_nonzero(edges)
    return np.count_nonzero((edges > 0) & (near > 0)) / num if num else 0.0


def _tubes(masks: Masks, name: str) -> dict[str, np.ndarray]:
    """Boolean tubes by phrase; a phrase without a pixel is no object."""
    if isinstance(masks, (np.ndarray, Tensor)):
        labels = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
        if labels.dtype.kind not in "iu" or labels.ndim != 3:
            raise UserError(
                f"{name}: a label array is integer T H W, not {labels.dtype} of shape {labels.shape}. Or pass {{phrase: mask}}."
            )
        return {str(label): labels == label for label in np.unique(labels) if label != 0}
    out: dict[str, np.ndarray] = {}
    for phrase, mask in list(masks.items()) if isinstance(masks, Mapping) else masks:
        array = np.asarray(mask)
        if array.ndim != 3 or not (array.dtype == bool or np.isin(array, (0, 1)).all()):
            raise UserError(f"{name}: the mask of {phrase!r} must be boolean T H W, not {array.dtype} of shape {array.shape}.")
        tube = array.astype(bool)
        if phrase in out and out[phrase].shape != tube.shape:
            raise UserError(f"{name}: masks of {phrase!r} have shapes {out[phrase].shape} and {tube.shape}. Make them equal.")
        out[phrase] = out[phrase] | tube if phrase in out else tube
    return {phrase: tube for phrase, tube in out.items() if tube.any()}


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


def assignment(cost: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (row, column), min(rows, columns) of them, of least total cost: shortest augmenting paths, O(n^3).

    Jonker & Volgenant 1987. Rows enter one by one; `row_price` and `column_price` keep all reduced costs >= 0, so that Dijkstra
    finds the cheapest way to make room for the new row.
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((i, j) for j, i in assignment(cost.T))
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for new in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)  # from `new` to each column; the column before it
        reached = np.zeros(columns, bool)
        row, column, travelled = new, -1, 0.0
        while True:
            step = travelled + cost[row] - row_price[row] - column_price
            shorter = ~reached & (step < distance)
            distance[shorter], before[shorter] = step[shorter], column
            column = int(np.argmin(np.where(reached, np.inf, distance)))
            travelled = distance[column]
            reached[column] = True
            if row_of[column] < 0:
                break
            row = row_of[column]
        tree = reached.copy()
        tree[column] = False
        row_price[new] += travelled
        row_price[row_of[tree]] += travelled - distance[tree]
        column_price[tree] -= travelled - distance[tree]
        while column >= 0:
            row_of[column] = row_of[before[column]] if before[column] >= 0 else new
            column = before[column]
    return sorted((int(i), j) for j, i in enumerate(row_of) if i >= 0)
