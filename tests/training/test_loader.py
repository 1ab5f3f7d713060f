"""The loader: an undisturbed run's order after any stop, on any number of ranks and workers; bad samples are counted."""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.data.contract import BadSamples, OnDisk
from fewstep.data.loader import Batches, Loader, first_batch
from fewstep.data.order import samples_at

NUM = 37


@dataclass
class Numbers:
    """Samples that are their own number; some of them cannot be read."""

    num: int = NUM
    bad: frozenset[int] = frozenset()
    max_bad: int = 0
    slow_s: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num

    def batch(self, index: Tensor) -> Batch:
        time.sleep(self.slow_s * random.random())
        self.asked += index.tolist()
        wrong = {row: f"sample {n} is damaged" for row, n in enumerate(index.tolist()) if n in self.bad}
        if wrong:
            raise BadSamples(wrong)
        return Batch(x0=index.double()[:, None], index=index)


def rows_of(batch_size: int, grad_accum: int, size: int, rank: int) -> list[Tensor]:
    """As the loop divides the batch of a step (`_rows`)."""
    return [torch.arange(batch_size) + (micro * size + rank) * batch_size for micro in range(grad_accum)]


@dataclass
class Stage:
    """Some iterations on some ranks: what each sample number's position was."""

    first: int
    steps: int
    size: int = 1
    batch_size: int = 4
    grad_accum: int = 1
    workers: int = 0
    ahead: int = 2

    @property
    def per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.size

    def run(self, data: Numbers, end: int = 10**9, stop_after: int | None = None) -> dict[int, int]:
        """Position -> sample; ends after `stop_after` steps with batches read ahead and thrown away, as a kill does."""
        found: dict[int, int] = {}
        for rank in range(self.size):
            rows = rows_of(self.batch_size, self.grad_accum, self.size, rank)
            with Batches(data, rows, self.per_step, 3, end, Loader(self.workers, self.ahead)) as batches:
                for step in range(self.steps if stop_after is None else stop_after):
                    samples = self.first + step * self.per_step
                    for micro in range(self.grad_accum):
                        fed = batches.take(samples, micro)
                        assert fed.share == 1 and fed.batch.index is not None
                        for row, number in zip(fed.rows.tolist(), fed.batch.index.tolist(), strict=True):
                            assert samples + row not in found
                            found[samples + row] = number
        return found


def undisturbed(num_positions: int) -> dict[int, int]:
    order = samples_at(torch.arange(num_positions), NUM, 3)
    return dict(enumerate(order.tolist()))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_is_that_of_one_process_without_workers(workers: int) -> None:
    data = Numbers(slow_s=0.002)
    found = Stage(0, 30, size=2, batch_size=3, grad_accum=2, workers=workers, ahead=4).run(data)
    assert found == undisturbed(360)


def test_ten_kills_at_random_and_other_workers_each_time() -> None:
    """Each life begins at the last checkpoint, some steps before the kill; what was read ahead is forgotten."""
    draw, position, total, found = random.Random(0), 0, 120 * 4, dict[int, int]()
    for life in range(11):
        left = (total - position) // 4
        steps = left if life == 10 else draw.randint(1, max(left // 4, 1))
        stage = Stage(position, steps, workers=draw.choice([0, 1, 2, 3]), ahead=draw.randint(1, 5))
        found |= stage.run(Numbers(slow_s=0.001), end=total)
        saved = steps if life == 10 else draw.randint(0, steps)  # the rest is lost, and done again
        position += 4 * saved
    assert found == undisturbed(total)


def test_one_two_one_ranks_each_sample_once_per_epoch() -> None:
    """4 a step on one rank, 8 on two, 4 on one again, in the midst of epochs; and with other micro-batches."""
    found, position = dict[int, int](), 0
    for size, steps, workers, accum in ((1, 7, 2, 1), (2, 9, 1, 1), (1, 4, 3, 2), (3, 5, 2, 2), (1, 11, 0, 1)):
        stage = Stage(position, steps, size=size, workers=workers, grad_accum=accum)
        found |= stage.run(Numbers())
        position += steps * stage.per_step
    assert found == undisturbed(position)
    for epoch in range(position // NUM):
        assert Counter(found[p] for p in range(epoch * NUM, (epoch + 1) * NUM)) == Counter(range(NUM))


def test_a_roll_back_is_a_position_like_any_other() -> None:
    with Batches(Numbers(), rows_of(4, 1, 1, 0), 4, 3, 400, Loader(2, 3)) as batches:
        first = [batches.take(step * 4, 0).batch.index.tolist() for step in range(8)]  # type: ignore[union-attr]
        again = [batches.take(step * 4, 0).batch.index.tolist() for step in range(3, 8)]  # type: ignore[union-attr]
    assert again == first[3:]


def test_nothing_is_read_beyond_the_end_and_no_thread_stays() -> None:
    data = Numbers()
    with Batches(data, rows_of(4, 1, 1, 0), 4, 3, 12, Loader(2, 5)) as batches:
        for step in range(3):
            batches.take(step * 4, 0)
        time.sleep(0.1)  # a read that was begun wrongly gets done, instead of being called off at the end
        assert len(data.asked) == 12
        batches.take(12, 0)  # what is asked for is read
    assert len(data.asked) == 16
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


# ---- bad samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_weighed_and_counted(workers: int) -> None:
    said: list[str] = []
    data = Numbers(bad=frozenset({5, 11, 12}), max_bad=3, slow_s=0.001)
    assert isinstance(data, OnDisk)
    seen, weight = Counter[int](), 0.0
    with Batches(data, rows_of(4, 1, 1, 0), 4, 3, 4 * NUM, Loader(workers, 3), said.append) as batches:
        for step in range(NUM):  # four epochs
            fed = batches.take(step * 4, 0)
            assert fed.batch.index is not None and fed.batch.x0 is not None
            assert fed.share == len(fed.rows) / 4 or fed.share == 0
            wanted = samples_at(step * 4 + fed.rows, NUM, 3)
            assert torch.equal(wanted, fed.batch.index)  # the noise goes with the place, not with what is left
            if fed.share:
                seen.update(fed.batch.index.tolist())
            weight += fed.share * 4
    assert seen == Counter({n: 4 for n in range(NUM) if n not in data.bad})  # once per epoch, no other in their place
    assert weight == pytest.approx(4 * (NUM - 3))
    assert batches.num_bad == 3 and len(said) == 3 and "1 of data.max_bad=3" in said[0] and "damaged" in said[0]


def test_a_batch_with_none_left_weighs_nothing() -> None:
    with Batches(Numbers(bad=frozenset({5}), max_bad=1), rows_of(1, 1, 1, 0), 1, 3, NUM, Loader(0)) as batches:
        fed = [batches.take(step, 0) for step in range(NUM)]
    shares = [one.share for one in fed]
    assert sorted(shares) == [0.0] + [1.0] * (NUM - 1)
    stand_in = fed[shares.index(0.0)]
    assert stand_in.batch.index is not None and stand_in.batch.index.tolist() != [5] and len(stand_in.rows) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_may_be_ends_the_run(workers: int) -> None:
    for max_bad, words in (
        (0, r"sample \d+ is damaged\nTo leave such samples out"),
        (1, "2 samples cannot be read, more than"),
    ):
        data = Numbers(bad=frozenset({5, 11}), max_bad=max_bad)
        batches = Batches(data, rows_of(4, 1, 1, 0), 4, 3, 400, Loader(workers))
        with batches, pytest.raises(ValueError, match=words):
            for step in range(NUM):
                batches.take(step * 4, 0)
            pytest.fail("it went on")


def test_ranks_learn_of_one_anothers_bad_samples() -> None:
    data = [Numbers(bad=frozenset({5, 11}), max_bad=2) for _ in range(2)]
    readers = [Batches(one, rows_of(4, 1, 2, rank), 8, 3, 400, Loader(0)) for rank, one in enumerate(data)]
    for step in range(5):  # one epoch and a bit: each of the two was met by one rank
        for batches in readers:
            batches.take(step * 8, 0)
    told = [batches.bad_samples() for batches in readers]
    for batches in readers:
        batches.leave_out(told)
    assert [batches.num_bad for batches in readers] == [2, 2]
    before = [Counter(one.asked) for one in data]
    for step in range(5, 15):
        for batches in readers:
            batches.take(step * 8, 0)
    for one, earlier in zip(data, before, strict=True):
        assert all(one.asked.count(n) == earlier[n] for n in one.bad), "tried again"


def test_the_first_batch_does_without_bad_ones() -> None:
    first = first_batch(Numbers(bad=frozenset({0, 2, 4}), max_bad=3), 4).index
    assert first is not None and set(first.tolist()) <= {1, 3, 5, 6, 7} and len(first) >= 3
    with pytest.raises(ValueError, match="sample 0 is damaged"):
        first_batch(Numbers(bad=frozenset({0})), 4)


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_the_share_of_waiting_is_measured() -> None:
    """Reading takes about as long as a step: without workers half the time is waiting, with two nearly none."""

    class Slow(Numbers):
        def batch(self, index: Tensor) -> Batch:
            time.sleep(0.01)
            return super().batch(index)

    shares = {}
    for workers in (0, 2):
        with Batches(Slow(), rows_of(4, 1, 1, 0), 4, 3, 4000, Loader(workers, 3)) as batches:
            batches.take(0, 0)
            batches.metrics()
            for step in range(1, 25):
                time.sleep(0.011)  # the trainer at work
                batches.take(step * 4, 0)
            shares[workers] = batches.metrics()["data/wait_share"]
    assert 0.3 < shares[0] < 0.7, shares
    assert shares[2] < 0.3 * shares[0], shares
