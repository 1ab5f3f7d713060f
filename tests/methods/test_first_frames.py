"""First frames given while training: shares, what is shown, and that they never enter the loss."""

import pytest
import torch

from fewstep.batch import Batch, Condition, first_frames
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng
from fewstep.diffusion.prediction import with_clean_frames
from fewstep.diffusion.times import LogNormal
from fewstep.methods import Finetune
from fewstep.methods.contract import Nets
from fewstep.methods.first_frames import with_first_frames


def batch(num: int) -> Batch:
    torch.manual_seed(0)
    x0 = torch.randn(num, 2, 4, 1, 1, dtype=torch.float64)
    return Batch(x0=x0, cond=Condition(text=torch.zeros(num, 1, 1)), negative=Condition(text=torch.ones(num, 1, 1)))


def test_shares_are_kept_and_shown_to_both_conditions() -> None:
    num = 20_000
    some = with_first_frames(batch(num), (0.5, 0.2, 0.3), Rng(0, 0, torch.arange(num)))
    assert some.cond.frame_mask is not None and some.negative is not None
    shown = some.cond.frame_mask.sum(1)
    counts = torch.stack([(shown == k).double().mean() for k in range(3)])
    # One share of 20,000 draws is known to sqrt(.25 / 20000) = .0035: four of these.
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), atol=0.014, rtol=0)
    assert torch.equal(some.cond.frame_mask, some.negative.frame_mask)  # pyright: ignore[reportArgumentType]
    assert some.cond.frames is some.x0
    # Always the first ones: a mask never rises along time.
    assert bool((some.cond.frame_mask.diff(dim=1) <= 0).all())


def test_no_shares_change_nothing_and_draw_nothing() -> None:
    rng, again = Rng(0, 0, torch.arange(4)), Rng(0, 0, torch.arange(4))
    some = batch(4)
    assert with_first_frames(some, (), rng) is some
    assert torch.equal(rng.uniform(), again.uniform())


def test_first_frames_by_hand() -> None:
    assert first_frames(torch.tensor([0, 2]), 3).tolist() == [[False, False, False], [True, True, False]]


def test_noise_on_given_frames_has_the_published_level_and_scale() -> None:
    """(x0 + a n) / sqrt(a^2 + sd^2), with ln a ~ N(-3, 2): what the network receives; x0 stays what the answer keeps."""
    num, law = 60_000, LogNormal(mean=-3.0, std=2.0)
    x0 = 0.5 * torch.randn(num, 2, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rng = Rng(0, 0, torch.arange(num))
    some = with_first_frames(Batch(x0=x0, negative=Condition()), (0.0, 0.0, 1.0), rng, law, EDM(sigma_data=0.5))
    noisy = some.cond.noisy_frames
    assert noisy is not None and some.negative is not None and torch.equal(noisy, some.negative.noisy_frames)  # pyright: ignore[reportArgumentType]
    assert some.cond.frames is x0
    # At any level the spread is that of the data: .5, known from 360,000 numbers to .0006.
    assert float(noisy.std()) == pytest.approx(0.5, abs=0.004)
    # x0 and what is shown correlate by E[.5 / sqrt(a^2 + .25)], here integrated over the law.
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
    wanted = torch.trapezoid(density * 0.5 / (torch.exp(2 * (2 * z - 3)) + 0.25).sqrt(), z)
    assert float((x0 * noisy).sum() / (x0 * x0).sum()) == pytest.approx(float(wanted), abs=0.008)
    again = with_first_frames(Batch(x0=x0), (0.0, 0.0, 1.0), Rng(0, 0, torch.arange(num)))
    assert again.cond.noisy_frames is None


class Wrong:
    """A network that is wrong by a known amount in every frame it makes."""

    path = RectifiedFlow()

    def __init__(self, truth: torch.Tensor):
        self.offset = torch.ones_like(truth, requires_grad=True)
        self.truth = truth

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        answer = Prediction.of("x0", self.truth + self.offset, x_t, t, self.path)
        return with_clean_frames(answer, cond.frames, cond.frame_mask)


def test_conditioning_frames_have_no_loss_and_no_gradient() -> None:
    some = batch(64)
    assert some.x0 is not None
    net = Wrong(some.x0)
    method = Finetune(space="x0", first_frames=(0.4, 0.3, 0.3))
    (terms,) = method.losses(method.turn(0), Nets({"student": net}), some, Rng(0, 0, torch.arange(64)))
    # The error is 1 wherever frames are to be made, and given ones do not count: the mean is exactly 1.
    torch.testing.assert_close(terms.total, torch.ones((), dtype=torch.float64))
    terms.total.backward()
    mask = with_first_frames(some, method.first_frames, Rng(0, 0, torch.arange(64))).cond.frame_mask
    assert mask is not None and net.offset.grad is not None
    given = mask[:, None, :, None, None].bool().expand_as(net.offset.grad)
    assert not net.offset.grad[given].any() and bool((net.offset.grad[~given] > 0).all())


def test_shares_must_sum_to_one() -> None:
    assert [key for key, _ in Finetune(first_frames=(0.5, 0.4)).problems()] == ["first_frames"]
    with pytest.raises(StopIteration):
        next(iter(Finetune(first_frames=(0.5, 0.5)).problems()))
