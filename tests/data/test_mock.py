"""Mock batches have the fields and shapes they say, and are the same each time."""

import pytest
import torch

from fewstep.config import ConfigError, check
from fewstep.data.mock import Mock


def test_a_batch_has_every_field_that_is_declared_in_its_shape() -> None:
    spec = Mock((4, 3, 6, 8), (5, 7), controls=("edge",), given_frames=1, path_times=(1.0, 0.5), num=9)
    batch = spec.open().batch(torch.tensor([3, 4]))
    assert all(getattr(batch, name) is not None for name in spec.fields)
    assert batch.x0 is not None and batch.noise is not None and batch.path is not None and batch.negative is not None
    assert batch.x0.shape == batch.noise.shape == batch.cond.control["edge"].shape == (2, 4, 3, 6, 8)
    assert batch.path.shape == (2, 2, 4, 3, 6, 8) and batch.cond.text is not None and batch.cond.text.shape == (2, 5, 7)
    assert batch.cond.frame_mask is not None and batch.cond.frame_mask.tolist() == [[1, 0, 0]] * 2
    assert batch.negative.text is not None and not batch.negative.text.any()
    assert batch.negative.frames is batch.cond.frames and batch.negative.control == batch.cond.control
    again = spec.open().batch(torch.tensor([3, 4])).x0
    assert again is not None and torch.equal(again, batch.x0) and len(spec.open()) == 9
    points = Mock((2,), None, fps=None).open().batch(torch.arange(3))
    assert points.x0 is not None and points.x0.shape == (3, 2) and points.cond.text is None


def test_shapes_that_cannot_be_are_refused() -> None:
    for bad, key in ((Mock(()), "shape"), (Mock((4, 2, 0, 3)), "shape"), (Mock((4, 2, 3, 3), given_frames=2), "given_frames")):
        with pytest.raises(ConfigError, match=key):
            check(bad)
