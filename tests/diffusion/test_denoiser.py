"""on_path: the exact mixture asked through the wrapper equals the mixture built on that path."""

import itertools
import math

import pytest
import torch

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, TrigFlow, on_path
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
PATHS = [
    EDM(),
    EDM(t_max=1000.0),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(0.5),
    VP("linear"),
    VP("cosine"),
    VP(zero_terminal_snr=True),
]
MIXTURE = GaussianMixture([[0.3, -1.2], [1.0, 0.4], [-0.7, 0.9]], [0.4, 0.7, 1.1], [1.0, 2.0, 3.0], labels=[0, 1, 1])
FRACTIONS = torch.tensor([0.0, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0], dtype=F64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def state(path, t):
    """A plausible state at each time."""
    x0 = MIXTURE.means[torch.arange(len(t)) % 3] + 0.5 * normal(len(t), 2)
    return path.add_noise(x0, normal(len(t), 2, seed=1), t)


def ratio(path, t):
    a, s, _, _ = path.coefficients(torch.as_tensor(t, dtype=F64))
    return s / a


@pytest.mark.parametrize("inner, outer", list(itertools.permutations(PATHS, 2)), ids=str)
def test_between_all_pairs(inner, outer):
    """Exact wherever the inner path has a time of the same noise-to-signal ratio, at both ends too."""
    t = FRACTIONS * outer.t_max
    t = t[ratio(outer, t) <= ratio(inner, inner.t_max) * (1 + 1e-12)]
    assert len(t) >= 3 and float(t[0]) == 0.0
    if ratio(outer, outer.t_max) <= ratio(inner, inner.t_max):
        assert float(t[-1]) == outer.t_max
    x_t = state(outer, t)
    got = on_path(MIXTURE.on(inner), outer)(x_t, t, Condition())
    want = MIXTURE.on(outer)(x_t, t, Condition())
    assert got.path == outer and torch.equal(got.t, t) and torch.equal(got.x_t, x_t)
    for name in ("x0", "eps", "velocity"):
        torch.testing.assert_close(got.read(name), want.read(name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inner", [EDM(), VP("linear")], ids=str)
@pytest.mark.parametrize("outer", [RectifiedFlow(), TrigFlow(), TrigFlow(0.5), VP(zero_terminal_snr=True)], ids=str)
def test_beyond_the_end_of_the_inner_path_its_last_answer_is_taken(inner, outer):
    """EDM ends at sigma 80: at pure noise it is asked at 80, on the state scaled to the spread of unit data there."""
    t = torch.full((6,), outer.t_max, dtype=F64)
    x_t = normal(6, 2)  # s is 1, a is 0
    got = on_path(MIXTURE.on(inner), outer)(x_t, t, Condition())
    a, s, _, _ = inner.coefficients(torch.tensor(inner.t_max, dtype=F64))
    asked = MIXTURE.on(inner)(torch.hypot(a, s) * x_t, torch.full((6,), inner.t_max, dtype=F64), Condition()).x0
    torch.testing.assert_close(got.x0, asked, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.eps, x_t, rtol=1e-12, atol=1e-12)  # at pure noise x_t is all that eps can be
    truth = MIXTURE.on(outer)(x_t, t, Condition()).x0  # the mean of the data
    assert float((got.x0 - truth).abs().max()) < 4 * float(a / s)  # as far as one part in sigma_max


def test_the_same_path_is_the_same_object():
    net = MIXTURE.on(TrigFlow(0.5))
    assert on_path(net, TrigFlow(0.5)) is net
    assert on_path(net, TrigFlow()) is not net


def test_the_condition_reaches_the_network():
    t = torch.full((2,), 0.8, dtype=F64)
    x_t, cond = normal(2, 2), Condition(label=torch.tensor([0, 1]))
    got = on_path(MIXTURE.on(EDM()), RectifiedFlow())(x_t, t, cond)
    torch.testing.assert_close(got.x0, MIXTURE(x_t, t, cond).x0, rtol=1e-12, atol=1e-12)
    assert float((got.x0 - MIXTURE(x_t, t, Condition()).x0).abs().max()) > 0.01


def test_every_frame_has_its_own_time():
    video = GaussianMixture(normal(2, 3, 4, 2, 2), [0.4, 0.8], path=EDM())
    t = torch.tensor([[0.0, 0.3, 0.7, 0.9], [0.98, 0.5, 0.0, 0.1]], dtype=F64)
    x_t = normal(2, 3, 4, 2, 2, seed=1)
    got, want = on_path(video, RectifiedFlow())(x_t, t, Condition()), video.on(RectifiedFlow())(x_t, t, Condition())
    for name in ("x0", "eps", "velocity"):
        torch.testing.assert_close(got.read(name), want.read(name), rtol=1e-10, atol=1e-10)


def test_half_precision_is_computed_in_float32():
    t = torch.tensor([0.2, 0.7])
    x_t = normal(2, 2).bfloat16()
    net = on_path(MIXTURE.on(TrigFlow()), RectifiedFlow())
    answer = net(x_t, t, Condition())
    assert answer.velocity.dtype == torch.float32
    assert torch.equal(answer.velocity, net(x_t.float(), t, Condition()).velocity)


def test_predict_2_5_asks_a_flow_teacher_in_trigflow():
    """cosmos.md 2.1: c_in = c_skip = 1/(cos t + sin t), c_noise = s, c_out = -s; x0 = c_skip x_t + c_out v."""
    seen = {}

    class Flow:
        path = RectifiedFlow()

        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            seen.update(x=x_t, t=t, taps=taps, cache=cache)
            return Prediction.of("velocity", torch.sin(3 * x_t), x_t, t, self.path, (x_t,))

    t = torch.tensor([0.3, 1.2, math.pi / 2], dtype=F64)
    x_t = normal(3, 2)
    answer = on_path(Flow(), TrigFlow())(x_t, t, Condition(), taps=(7,))
    c = 1 / (t.cos() + t.sin())[:, None]
    s = (t.sin() / (t.cos() + t.sin()))[:, None]
    torch.testing.assert_close(seen["x"], c * x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["t"], s[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answer.x0, c * x_t - s * torch.sin(3 * c * x_t), rtol=1e-12, atol=1e-12)
    assert seen["taps"] == (7,) and answer.features[0] is seen["x"]
