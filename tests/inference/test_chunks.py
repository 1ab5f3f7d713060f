"""The chunks that a long clip is made in."""

import numpy as np
import pytest

from fewstep.inference.chunks import chunks_of


@pytest.mark.parametrize(("num", "window", "overlap"), [(9, 9, 1), (17, 9, 1), (18, 9, 1), (33, 9, 5), (10, 9, 8), (5, 9, 1)])
def test_every_frame_is_made_once(num: int, window: int, overlap: int) -> None:
    frames = np.arange(num)
    chunks = chunks_of(num, window, overlap)
    seen = np.concatenate([chunk.of(frames)[chunk.overlap :] for chunk in chunks])
    np.testing.assert_array_equal(seen[:num], frames)
    assert all(len(chunk.of(frames)) == min(window, num) for chunk in chunks)
    assert set(seen[num:].tolist()) <= {num - 1}  # beyond the end the last frame stands still
    if len(chunks) > 1:
        assert num - (chunks[-1].first + overlap) > 0  # no chunk whose frames are all thrown away


def test_a_chunk_that_makes_nothing_is_refused() -> None:
    for overlap in (0, 9):
        with pytest.raises(ValueError, match=r"of 9 frames at a time, 1 \.\. 8"):
            chunks_of(17, 9, overlap)
