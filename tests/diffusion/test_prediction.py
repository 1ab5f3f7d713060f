"""x0, eps and velocity from any one of them, against the x0 and eps that made x_t."""

import pytest
import torch

from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, TrigFlow

F64 = torch.float64
PATHS = [
    EDM(),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(0.5),
    VP("linear"),
    VP("scaled_linear", zero_terminal_snr=True),
    VP("cosine"),
]
FRACTIONS = torch.tensor([0.0, 1e-4, 0.01, 0.25, 0.5, 0.75, 0.99, 0.9999, 1.0], dtype=F64)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def constructed(path, t, x0, eps):
    """x_t and dx_t/dt by their definition; test_path.py proves the coefficients."""
    view = (-1, *[1] * (x0.ndim - 1))
    a, s, da, ds = (c.reshape(view) for c in path.coefficients(t))
    return a * x0 + s * eps, da * x0 + ds * eps


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
def test_each_from_any_one(path, kind):
    t = FRACTIONS * path.t_max
    x0, eps = drawn(len(t), 4), drawn(len(t), 4, seed=1)
    x_t, velocity = constructed(path, t, x0, eps)
    answer = Prediction.of(kind, {"x0": x0, "eps": eps, "velocity": velocity}[kind], x_t, t, path)
    a, s, da, ds = (c[:, None] for c in path.coefficients(t))
    # The silent part of an end is read as 0: an x0 at t = 0 says nothing of eps, an eps at pure noise nothing of x0.
    want_x0 = torch.where((a == 0) & (kind == "eps"), 0.0, x0)
    want_eps = torch.where((s == 0) & (kind == "x0"), 0.0, eps)
    torch.testing.assert_close(answer.x0, want_x0, **CLOSE)
    torch.testing.assert_close(answer.eps, want_eps, **CLOSE)
    torch.testing.assert_close(answer.velocity, da * want_x0 + ds * want_eps, **CLOSE)
    for name in ("x0", "eps", "velocity"):
        assert torch.equal(answer.read(name), getattr(answer, name))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_exact_is_the_target_of_denoising(path):
    t = FRACTIONS * path.t_max
    x0, eps = drawn(len(t), 4), drawn(len(t), 4, seed=1)
    truth = Prediction.exact(x0, eps, t, path)
    x_t, velocity = constructed(path, t, x0, eps)
    for got, want in ((truth.x_t, x_t), (truth.x0, x0), (truth.eps, eps), (truth.velocity, velocity)):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
def test_every_frame_has_its_own_time(path, kind):
    t = path.t_max * torch.tensor([[0.0, 0.3, 1.0], [0.9, 0.5, 0.01]], dtype=F64)
    value, x_t = drawn(2, 4, 3, 2, 2), drawn(2, 4, 3, 2, 2, seed=1)
    together = Prediction.of(kind, value, x_t, t, path)
    for frame in range(3):
        alone = Prediction.of(kind, value[:, :, frame], x_t[:, :, frame], t[:, frame], path)
        for name in ("x0", "eps", "velocity"):
            torch.testing.assert_close(together.read(name)[:, :, frame], alone.read(name), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_nan_and_half_precision_is_computed_in_float32(path, kind, dtype):
    t = (FRACTIONS * path.t_max).float()
    value, x_t = drawn(len(t), 4).to(dtype), drawn(len(t), 4, seed=1).to(dtype)
    answer = Prediction.of(kind, value, x_t, t, path)
    same = Prediction.of(kind, value.float(), x_t.float(), t, path)
    for name in ("x0", "eps", "velocity"):
        assert answer.read(name).dtype == torch.float32
        assert bool(torch.isfinite(answer.read(name)).all())
        assert torch.equal(answer.read(name), same.read(name))


def test_sampling_times_next_to_the_ends_stay_exact_in_float32():
    """bfloat16 would make t = 0.999 of 1.0 and lose a of 0.001; the coefficients come from float64 and are cast last."""
    t = torch.tensor([0.999, 1 - 1e-6], dtype=F64)
    x0, eps = drawn(2, 3).float(), drawn(2, 3, seed=1).float()
    answer = Prediction.of("velocity", eps - x0, RectifiedFlow().add_noise(x0, eps, t), t, RectifiedFlow())
    torch.testing.assert_close(answer.x0, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.eps, eps, rtol=0, atol=1e-6)


def test_trigflow_in_the_words_of_cosmos():
    """cosmos.md 2.1: x0 = cos t x_t - sin t F, eps = sin t x_t + cos t F; rectified flow: x0 = z - s v."""
    t = torch.linspace(0.0, 1.5, 5, dtype=F64)
    x_t, raw = drawn(5, 3), drawn(5, 3, seed=1)
    answer = Prediction.of("velocity", raw, x_t, t, TrigFlow())
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    torch.testing.assert_close(answer.x0, cos * x_t - sin * raw, **CLOSE)
    torch.testing.assert_close(answer.eps, sin * x_t + cos * raw, **CLOSE)
    s = torch.linspace(0.0, 1.0, 5, dtype=F64)
    flow = Prediction.of("velocity", raw, x_t, s, RectifiedFlow())
    torch.testing.assert_close(flow.x0, x_t - s[:, None] * raw, **CLOSE)
    torch.testing.assert_close(flow.eps, x_t + (1 - s[:, None]) * raw, **CLOSE)


def test_features_pass_and_a_wrong_kind_is_named():
    feature = torch.zeros(1)
    x = torch.zeros(1, 2)
    for kind in ("x0", "eps", "velocity"):
        assert Prediction.of(kind, x, x, torch.ones(1), EDM(), (feature,)).features[0] is feature
    with pytest.raises(ValueError, match="not 'score'"):
        Prediction.of("score", x, x, torch.ones(1), EDM())  # type: ignore[arg-type]
