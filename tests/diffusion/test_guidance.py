"""guided against two separate calls, and against Cosmos' convention."""

import pytest
import torch

from fewstep.batch import Condition
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, TrigFlow, guided
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
MIXTURE = GaussianMixture([[1.0, 0.3], [-0.8, -0.5], [0.2, 1.4]], [0.3, 0.6, 0.2], labels=[0, 1, 1])
PATHS = [EDM(), RectifiedFlow(), TrigFlow(0.5)]
COND = Condition(label=torch.tensor([0, 1, 0, 1, 1]))
NEGATIVE = Condition(label=torch.full((5,), -1))


class Counting:
    def __init__(self, inner):
        self.inner, self.path, self.rows = inner, inner.path, []

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        self.rows.append(len(x_t))
        answer = self.inner(x_t, t, cond)
        return Prediction(answer.x_t, answer.t, answer.path, answer.velocity, tuple(cond.label * tap for tap in taps))


def asked(path):
    t = path.t_max * torch.tensor([0.05, 0.3, 0.6, 0.9, 1.0], dtype=F64)
    return torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(1)), t


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("w", [0.0, 0.5, 4.0])
def test_is_uncond_plus_w_times_the_difference(path, w):
    net, (x_t, t) = Counting(MIXTURE.on(path)), asked(path)
    got = guided(net, NEGATIVE, w)(x_t, t, COND)
    assert net.rows == [10]  # one call for both
    c, u = MIXTURE.on(path)(x_t, t, COND), MIXTURE.on(path)(x_t, t, NEGATIVE)
    for name in ("x0", "eps", "velocity"):
        want = u.read(name) + w * (c.read(name) - u.read(name))
        torch.testing.assert_close(got.read(name), want, rtol=1e-10, atol=1e-10)
    assert torch.equal(got.x_t, x_t) and torch.equal(got.t, t) and got.path == path


def test_cosmos_writes_g_which_is_w_minus_1():
    """cosmos.md 0.1: cond + g (cond - uncond), in eps for Transfer1 and in x0 for Predict2.5."""
    x_t, t = asked(EDM())
    net, g = MIXTURE.on(EDM()), 5.0
    c, u = net(x_t, t, COND), net(x_t, t, NEGATIVE)
    got = guided(net, NEGATIVE, g + 1)(x_t, t, COND)
    torch.testing.assert_close(got.eps, c.eps + g * (c.eps - u.eps), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.x0, c.x0 + g * (c.x0 - u.x0), rtol=1e-10, atol=1e-9)


def test_w_1_is_the_same_object_and_needs_no_negative():
    assert guided(MIXTURE, None, 1.0) is MIXTURE
    assert guided(MIXTURE, NEGATIVE, 1.0) is MIXTURE


def test_outside_the_interval_w_is_1_row_by_row():
    path = RectifiedFlow()
    net, (x_t, t) = Counting(MIXTURE), asked(path)
    got = guided(net, NEGATIVE, 3.0, interval=(0.3, 0.9))(x_t, t, COND).velocity
    plain, full = MIXTURE(x_t, t, COND).velocity, guided(MIXTURE, NEGATIVE, 3.0)(x_t, t, COND).velocity
    inside = torch.tensor([False, True, True, True, False])  # both ends belong to it
    torch.testing.assert_close(got, torch.where(inside[:, None], full, plain), rtol=1e-12, atol=1e-12)
    assert float((full - plain).abs().min()) > 1e-3
    guided(net, NEGATIVE, 3.0, interval=(0.95, 0.96))(x_t, t, COND)
    assert net.rows == [10, 5]  # nothing to guide: the second pass is not made


def test_per_frame_times_in_the_interval():
    video = GaussianMixture(torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)), [0.5, 0.7], labels=[0, 1])
    x_t = torch.randn(2, 1, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([[0.1, 0.5, 0.9], [0.5, 0.5, 0.1]], dtype=F64)
    cond, negative = Condition(label=torch.tensor([0, 1])), Condition(label=torch.tensor([-1, -1]))
    got = guided(video, negative, 3.0, interval=(0.4, 0.6))(x_t, t, cond).velocity
    c, u = video(x_t, t, cond).velocity, video(x_t, t, negative).velocity
    w = torch.where((t >= 0.4) & (t <= 0.6), 3.0, 1.0)[:, None, :, None, None]
    torch.testing.assert_close(got, u + w * (c - u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_lin_et_al(rescale):
    """arXiv:2305.08891 eq. 15-16 on x0: x std(cond)/std(x), then mixed with x by `rescale`."""
    x_t, t = torch.randn(3, 8, dtype=F64, generator=torch.Generator().manual_seed(2)), torch.tensor([0.2, 0.5, 0.9])
    wide = GaussianMixture(torch.randn(2, 8, generator=torch.Generator().manual_seed(3)), [0.5, 0.8], labels=[0, 1])
    cond, negative = Condition(label=torch.tensor([0, 1, 0])), Condition(label=torch.tensor([-1, -1, -1]))
    got = guided(wide, negative, 5.0, rescale=rescale)(x_t, t, cond)
    c, u = wide(x_t, t, cond).x0, wide(x_t, t, negative).x0
    x = u + 5.0 * (c - u)
    scaled = torch.stack([x[i] * c[i].std() / x[i].std() for i in range(3)])
    torch.testing.assert_close(got.x0, rescale * scaled + (1 - rescale) * x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.eps, (x_t - (1 - t[:, None].double()) * got.x0) / t[:, None].double(), rtol=1e-9, atol=1e-9)


def test_features_are_those_of_cond():
    x_t, t = asked(RectifiedFlow())
    answer = guided(Counting(MIXTURE), NEGATIVE, 3.0)(x_t, t, COND, taps=(2, 5))
    assert torch.equal(answer.features[0], 2 * COND.label) and torch.equal(answer.features[1], 5 * COND.label)


def test_half_precision_is_computed_in_float32():
    x_t, t = asked(RectifiedFlow())
    net = guided(MIXTURE, NEGATIVE, 3.0, rescale=0.5)
    answer = net(x_t.half(), t, COND)
    assert answer.velocity.dtype == torch.float32
    assert torch.equal(answer.velocity, net(x_t.half().float(), t, COND).velocity)


def test_what_is_missing_is_named():
    x_t, t = asked(RectifiedFlow())
    with pytest.raises(ValueError, match=r"w = 4\.0 needs a negative condition"):
        guided(MIXTURE, None, 4.0)
    with pytest.raises(ValueError, match="do not match in 'label'"):
        guided(MIXTURE, Condition(), 4.0)(x_t, t, COND)
    edge, none = Condition(control={"edge": x_t}), Condition(control={"depth": x_t})
    with pytest.raises(ValueError, match="do not match in 'control'"):
        guided(MIXTURE, none, 4.0)(x_t, t, edge)
    text, longer = Condition(text=torch.zeros(5, 4, 3)), Condition(text=torch.zeros(5, 6, 3))
    with pytest.raises(ValueError, match=r"'text'.*\(5, 4, 3\).*\(5, 6, 3\)"):
        guided(MIXTURE, longer, 4.0)(x_t, t, text)
