"""Every sample exactly once per epoch, whoever draws it and in whatever portions; and the place where a resumed run goes on."""

import pytest
import torch

from fewstep.data.order import samples_at
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import Finetune
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.parallel import World
from fewstep.training.loop import _rows
from fewstep.training.run import Job, Run, Trainer


def drawn(num: int, batch_size: int, grad_accum: int, size: int, iterations: int, first: int = 0) -> torch.Tensor:
    """The samples of all ranks and micro-batches, in the order of the iterations."""
    run = Run(
        job=Job(),
        method=Finetune(),
        networks=Networks(student=Full(TinySpec(), init="random")),
        data=MixtureSamples(),
        trainer=Trainer(batch_size=batch_size, grad_accum=grad_accum),
    )
    found = []
    for i in range(iterations):
        position = first + i * batch_size * grad_accum * size
        for micro in range(grad_accum):
            for rank in range(size):
                rows = _rows(run, World(rank, size, torch.device("cpu"), None), micro)
                found.append(samples_at(position + rows, num, seed=3))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("batch_size", "grad_accum", "size"), [(1, 1, 1), (7, 1, 1), (4, 3, 1), (2, 1, 5), (5, 2, 3), (150, 1, 2), (64, 2, 2)]
)
def test_every_sample_once_per_epoch(batch_size: int, grad_accum: int, size: int) -> None:
    num, epochs = 101, 3
    per_iteration = batch_size * grad_accum * size
    order = drawn(num, batch_size, grad_accum, size, -(-num * epochs // per_iteration))
    for epoch in range(epochs):
        part = order[epoch * num : (epoch + 1) * num]
        assert torch.equal(part.sort().values, torch.arange(num))
    assert not torch.equal(order[:num], order[num : 2 * num])  # and each epoch in another order
    one_by_one = drawn(num, 1, 1, 1, num * epochs)
    assert torch.equal(order[: num * epochs], one_by_one)  # in the same order, however it is divided


def test_a_run_goes_on_where_it_was_with_another_layout() -> None:
    """10 iterations on 2 ranks, the rest on 3: together what one process would have drawn."""
    before = drawn(50, 4, 1, 2, 10)
    after = drawn(50, 2, 2, 3, 10, first=80)
    assert torch.equal(torch.cat([before, after]), drawn(50, 1, 1, 1, 200))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        samples_at(torch.arange(3), 0, 0)
