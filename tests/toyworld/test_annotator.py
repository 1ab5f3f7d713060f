"""What the annotator reads from pixels of real toy clips, against the exact depth, masks and keypoints of the renderer."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluation.control import depth_rmse, keypoint_scores, match_masks
from fewstep.toyworld.annotator import ToyAnnotator
from fewstep.toyworld.clips import Clip, clips
from fewstep.toyworld.dataset import depth_range_m, grey_of_depth
from fewstep.toyworld.physics import World

NUM = 24


@pytest.fixture(scope="module")
def real() -> list[Clip]:
    return clips(World(), 7_410_000, range(NUM))


def test_depth_masks_and_keypoints_of_real_clips_are_near_the_exact_ones_and_far_from_those_of_others(real: list[Clip]) -> None:
    annotator = ToyAnnotator()
    depth, masks, points = np.zeros((2, NUM)), np.zeros((2, NUM)), np.zeros((2, NUM))
    for n, clip in enumerate(real):
        assert (
            annotator.suits(clip.rgb, clip.caption)
            and not annotator.suits(clip.rgb, "a cat")
            and not annotator.suits(clip.rgb[:, :16], clip.caption)
        )
        own = annotator.depth(clip.rgb), annotator.seg(clip.rgb), annotator.keypoint(clip.rgb)
        assert own[0] is not None and own[1] is not None and own[2] is not None
        for row, other in enumerate((clip, real[(n + NUM // 2) % NUM])):
            wanted = grey_of_depth(other.depth, *depth_range_m(World()))
            depth[row, n] = depth_rmse(own[0][..., 0] / 255, wanted[..., 0] / 255)
            objects = [(f"{b.colour} {b.shape}", other.segmentation == k + 1) for k, b in enumerate(other.scene.bodies)]
            masks[row, n] = match_masks(own[1], objects).mean_iou
            figures = [list(frame) for frame in other.keypoints.astype(np.float64)]
            points[row, n] = keypoint_scores(own[2], figures, (32, 32)).within
            phrases = {phrase for phrase, _ in own[1]}
            if row == 0:
                assert len(phrases & {phrase for phrase, _ in objects}) >= len(objects) - 1, clip.caption
    print(depth.mean(1), masks.mean(1), points.mean(1))
    assert depth[0].mean() < 0.35 * depth[1].mean()
    assert masks[0].mean() > 0.85 and masks[1].mean() < 0.4
    assert points[0].mean() > 0.85 and points[1].mean() < 0.4
