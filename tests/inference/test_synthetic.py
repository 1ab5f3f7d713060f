"""Pairs of a teacher that are made in memory: each is its teacher's answer, and only what is read is solved."""

import torch

from fewstep.batch import Condition
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.inference import synthetic
from fewstep.inference.synthetic import TeacherPairs
from fewstep.networks.analytic import MixtureSpec


def test_pairs_are_solved_block_by_block_when_they_are_read(monkeypatch) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK", 4)
    spec = TeacherPairs(MixtureSpec(), num=10, sampler=TeacherSampler("heun", 8, shift=1.0), path_times=(1.0, 0.5))
    data = spec.open()
    assert len(data) == 10 and not data.solved
    batch = data.batch(torch.tensor([1, 2]))
    assert data.solved == {0}
    rows = torch.tensor([9, 0, 5])
    some = data.batch(rows)
    assert data.solved == {0, 1, 2}
    noise = Rng(spec.seed, 0, rows).normal(spec.shape)
    wanted = spec.sampler.trajectory(MixtureSpec().build(), noise, Condition(), at=spec.path_times)
    assert some.noise is not None and torch.equal(some.noise, noise)
    torch.testing.assert_close(some.x0, wanted.x0)
    torch.testing.assert_close(some.path, wanted.states)
    torch.testing.assert_close(some.path_times, wanted.times.expand(3, -1))
    assert batch.x0 is not None and torch.equal(data.batch(torch.tensor([1, 2])).x0, batch.x0)
