"""Noise in the shapes of real batches: what was asked for is there, and the negative differs in text and class only."""

import torch

from fewstep.data.mock import Mock


def test_the_batch_has_what_was_asked_for_and_nothing_else() -> None:
    spec = Mock((4, 3, 8, 6), (7, 12), ("edge",), pooled=10, image=(5, 9), beside=20, num_labels=3, num=4)
    batch = spec.open().batch(torch.tensor([0, 2]))
    cond, negative = batch.cond, batch.negative
    assert negative is not None
    shapes = {name: tuple(value.shape) for name, value in vars(cond).items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "text": (2, 7, 12), "fps": (2,), "pooled": (2, 10), "image": (2, 5, 9), "beside": (2, 20, 3, 8, 6), "label": (2,),
    }  # fmt: skip
    assert tuple(cond.control["edge"].shape) == (2, 4, 3, 8, 6)
    assert set(cond.label.tolist()) <= {0, 1, 2} and negative.label.tolist() == [-1, -1]
    assert not bool(negative.text.any()) and not bool(negative.pooled.any())
    assert torch.equal(negative.image, cond.image) and torch.equal(negative.beside, cond.beside)

    bare = Mock((2,), None, fps=None).open().batch(torch.tensor([0]))
    assert all(value is None for name, value in vars(bare.cond).items() if name != "control")
