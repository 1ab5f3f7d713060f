"""The small networks: their preconditioning with an exact raw module, given frames, taps, conditions, saving."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.batch import Condition
from fewstep.diffusion import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.errors import UserError
from fewstep.networks.analytic import GaussianMixture
from fewstep.networks.tiny import Tiny, TinySpec
from fewstep.networks.weights.addresses import load_into

F64 = torch.float64
NONE = Condition()
PATHS = [EDM(), RectifiedFlow(), TrigFlow(), TrigFlow(0.5), VP("linear"), VP("cosine"), VP(zero_terminal_snr=True)]
DIT = TinySpec("dit", channels=3, width=24, depth=3, num_heads=2, text_dim=5, num_labels=2)
MLP = TinySpec("mlp", channels=2, width=16, depth=2, num_labels=3)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def awake(spec, seed=0):
    """A network in float64 whose zero-initialised parts are not zero."""
    net = spec.build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    net.module.double()
    return net


class Exact(nn.Module):
    """The raw output that is right: the mixture's velocity in TrigFlow's own time, whatever path the network is on."""

    def __init__(self, mixture, sigma_data):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64))
        self.net, self.seen = mixture.on(TrigFlow(sigma_data)), []

    def forward(self, y, phi, cond, taps):
        self.seen.append((y, phi))
        return self.net(y, phi, cond).velocity, ()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_an_exact_module_gives_the_exact_answer_on_every_path(path, sigma_data):
    mixture = GaussianMixture([[0.3, -1.2], [1.0, 0.4]], [0.4, 0.7])
    t = path.t_max * torch.tensor([0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=F64)
    x_t = path.add_noise(mixture.means[torch.arange(7) % 2] + 0.3 * normal(7, 2), normal(7, 2, seed=1), t)
    got = Tiny(Exact(mixture, sigma_data), path, sigma_data)(x_t, t, NONE)
    want = mixture.on(path)(x_t, t, NONE)
    for name in ("x0", "eps", "velocity"):
        torch.testing.assert_close(got.read(name), want.read(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_module_sees_unit_variance(path):
    """Data N(0, sigma_d^2): var y = (a^2 sigma_d^2 + s^2) / scale^2 = 1, and phi is 0 at clean, at most pi/2."""
    module = Exact(GaussianMixture([[0.0]], [0.5]), 0.5)
    t = path.t_max * torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=F64)
    a, s, _, _ = path.coefficients(t)
    spread = torch.sqrt(a**2 * 0.25 + s**2)[:, None]  # a state one standard deviation out
    Tiny(module, path, 0.5)(spread, t, NONE)
    y, phi = module.seen[0]
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-12, atol=1e-12)
    assert float(phi[0]) == 0 and bool((phi.diff() > 0).all()) and float(phi[-1]) <= torch.pi / 2
    torch.testing.assert_close(phi[:-1].tan(), (s / a / 0.5)[:-1], rtol=1e-12, atol=1e-12)


def video(rows=2, frames=4, size=(2, 3), seed=0):
    return normal(rows, 3, frames, *size, seed=seed)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_given_frames_are_kept_and_shown_clean(path):
    """x0 is the frame, whatever x_t held there; the module sees the frame at time 0, the others at their own."""
    mixture = GaussianMixture(video(2, seed=3), [0.5, 0.8])
    module = Exact(mixture, 0.5)
    net, frames = Tiny(module, path, 0.5), video(seed=1)
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]])
    t = path.t_max * torch.tensor([0.4, 1.0], dtype=F64)
    cond = Condition(frames=frames, frame_mask=mask)
    answer = net(video(seed=2), t, cond)
    given = mask.bool()[:, None, :, None, None].expand(2, 3, 4, 2, 3)
    torch.testing.assert_close(answer.x0[given], frames[given], rtol=1e-11, atol=1e-11)
    y, phi = module.seen[0]
    torch.testing.assert_close(y[given], frames[given] / 0.5)
    assert phi.shape == (2, 4) and bool((phi[mask.bool()] == 0).all())
    free = ~mask.bool()
    torch.testing.assert_close(phi[free], phi.amax(1, keepdim=True).expand(2, 4)[free])
    # ... and x_t of a given frame is not looked at, but for the way to the frame: eps leads there.
    noisy = video(seed=2)
    noisy[given] = 7.0
    again = net(noisy, t, cond)
    torch.testing.assert_close(again.x0, answer.x0, rtol=1e-10, atol=1e-10)
    a, s, _, _ = (c[:, None, None, None, None] for c in path.coefficients(t))
    torch.testing.assert_close(a * again.x0 + s * again.eps, noisy, rtol=1e-10, atol=1e-10)


def test_per_frame_times_meet_given_frames():
    module = Exact(GaussianMixture(video(1, seed=3), [0.5]), 1.0)
    t = torch.tensor([[0.2, 0.4, 0.6, 0.8], [0.1, 0.3, 0.5, 0.7]], dtype=F64)
    mask = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    Tiny(module, TrigFlow(), 1.0)(video(), t, Condition(frames=video(seed=1), frame_mask=mask))
    torch.testing.assert_close(module.seen[0][1], t * (1 - mask))


def test_given_frames_carry_no_gradient():
    net = awake(DIT)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    cond = Condition(frames=video(seed=1), frame_mask=mask, text=normal(2, 6, 5))
    x0 = net(video(seed=2), torch.tensor([0.5, 1.0], dtype=F64), cond).x0
    given = mask.bool()[:, None, :, None, None].expand_as(x0)
    gradients = torch.autograd.grad(x0[given].sum(), list(net.module.parameters()), retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    gradients = torch.autograd.grad(x0[~given].sum(), list(net.module.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


def cond_of(**change):
    fields = {"text": normal(2, 6, 5, seed=5), "label": torch.tensor([0, 1]), **change}
    return Condition(**fields)


T = torch.tensor([0.3, 0.8], dtype=F64)


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_taps_are_the_outputs_of_the_blocks(spec):
    net = awake(spec)
    x = normal(2, 2) if spec is MLP else video()
    outputs = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    assert [id(block) for block in net.blocks] == [id(block) for block in net.module.blocks]
    last = len(net.blocks) - 1
    answer = net(x, T, cond_of() if spec is DIT else NONE, taps=(last, 0))
    for feature, block in zip(answer.features, (last, 0), strict=True):
        if spec is DIT:  # B C T H W; the tokens are in the order of frames, rows, columns
            assert feature.shape == (2, 24, 4, 2, 3)
            feature = feature.permute(0, 2, 3, 4, 1).reshape(2, 24, 24)
        assert torch.equal(feature, outputs[block])
    assert net(x, T, cond_of() if spec is DIT else NONE).features == ()


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_a_tap_that_does_not_exist_is_named(spec):
    x = normal(2, 2) if spec is MLP else video()
    with pytest.raises(ValueError, match=rf"tap 9.*0 \.\. {spec.depth - 1}"):
        awake(spec)(x, T, cond_of() if spec is DIT else NONE, taps=(9,))


@torch.no_grad()
def test_every_part_of_the_condition_matters_and_only_to_its_row():
    net, x = awake(DIT), video()
    base = net(x, T, cond_of()).velocity
    text = cond_of().text.clone()
    text[0, 2] += 1.0
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = False
    changes = {
        "text": cond_of(text=text),
        "text_mask": cond_of(text_mask=mask),
        "label": cond_of(label=torch.tensor([1, 1])),
        "no label": cond_of(label=torch.tensor([-1, 1])),
        "frames": cond_of(frames=video(seed=9), frame_mask=torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])),
    }
    for name, cond in changes.items():
        other = net(x, T, cond).velocity
        assert float((other[0] - base[0]).abs().max()) > 1e-4, name
        torch.testing.assert_close(other[1], base[1], rtol=1e-10, atol=1e-10)
    # A masked token says nothing, whatever it holds.
    torch.testing.assert_close(
        net(x, T, cond_of(text=text, text_mask=mask)).velocity, net(x, T, cond_of(text_mask=mask)).velocity
    )
    none = net(x, T, cond_of(text_mask=torch.zeros(2, 6, dtype=torch.bool))).velocity
    assert bool(torch.isfinite(none).all())  # an empty prompt
    torch.testing.assert_close(
        net(x, T, cond_of(label=None)).velocity, net(x, T, cond_of(label=-torch.ones(2).long())).velocity
    )


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_a_label_that_is_no_class_is_refused(spec):
    x = normal(2, 2) if spec is MLP else video()
    for wrong in (spec.num_labels, spec.num_labels + 1, -2):
        with pytest.raises((IndexError, ValueError)):
            awake(spec)(x, T, Condition(label=torch.tensor([0, wrong]), text=normal(2, 6, 5)))


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_data_of_another_shape_are_refused_by_their_shape(spec):
    points = normal(2, spec.channels)
    for wrong in (normal(2, spec.channels + 1), points[..., None], video()[:, :1], points if spec is DIT else video()):
        with pytest.raises(UserError, match=rf"works on .* of {spec.channels} channels, but was given \[{wrong.shape[1]}"):
            awake(spec)(wrong, T, cond_of())


def test_heads_that_do_not_divide_the_width_are_a_problem_of_its_setting():
    assert [key for key, _ in TinySpec("dit", width=8, num_heads=3).problems()] == ["num_heads"]
    assert not list(TinySpec("dit", width=8, num_heads=4).problems())


@pytest.mark.parametrize("frames, size", [(1, (1, 1)), (5, (3, 2)), (8, (4, 4))])
def test_dit_runs_any_size_and_each_row_alone(frames, size):
    net, x = awake(DIT), video(2, frames, size)
    t = torch.linspace(0.1, 1.0, 2 * frames, dtype=F64).reshape(2, frames)
    together = net(x, t, cond_of()).velocity
    assert together.shape == x.shape and bool(torch.isfinite(together).all())
    for row in range(2):
        alone = net(x[row : row + 1], t[row : row + 1], cond_of().rows(slice(row, row + 1))).velocity
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_tokens_know_their_place():
    """Without positions a shuffled video would give the shuffled answer."""
    net, x = awake(DIT), video()
    for axis in (2, 3, 4):
        flipped = net(x.flip(axis), T, cond_of()).velocity.flip(axis)
        assert float((flipped - net(x, T, cond_of()).velocity).abs().max()) > 1e-3


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
@torch.no_grad()
def test_the_answer_depends_on_time(spec):
    x = normal(2, 2) if spec is MLP else video()
    net, cond = awake(spec), cond_of() if spec is DIT else NONE
    module = net.module
    early, late = (module(x, torch.full((2,), phi, dtype=F64), cond, ())[0] for phi in (0.2, 1.3))
    assert float((early - late).abs().max()) > 1e-3


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_saved_and_loaded_it_answers_the_same(spec, tmp_path):
    net, other = awake(spec, 1), awake(spec, 2)
    x, cond = (normal(2, 2), NONE) if spec is MLP else (video(), cond_of())
    save_file(net.module.state_dict(), tmp_path / "w.safetensors")
    assert not torch.equal(other(x, T, cond).velocity, net(x, T, cond).velocity)
    assert load_into(other.module, load_file(tmp_path / "w.safetensors"), "w") == len(net.module.state_dict())
    assert torch.equal(other(x, T, cond).velocity, net(x, T, cond).velocity)


@pytest.mark.parametrize("spec", [MLP, DIT], ids=["mlp", "dit"])
def test_the_network_computes_in_its_own_precision_times_and_states_do_not(spec):
    net = spec.build()
    net.module.bfloat16()
    x, cond = (normal(2, 2).float(), NONE) if spec is MLP else (video().float(), cond_of())
    close, end = torch.tensor([0.999, 0.999]), torch.tensor([1.0, 1.0])
    answer = net(x, close, cond)
    assert answer.velocity.dtype == torch.float32 and answer.x_t.dtype == torch.float32 and torch.equal(answer.t, close)
    # bfloat16 holds neither 0.999 nor a = 0.001: the conversion around the network must.
    assert bool(torch.isfinite(answer.eps).all()) and not torch.equal(answer.x0, net(x, end, cond).x0)
    torch.testing.assert_close(0.001 * answer.x0 + 0.999 * answer.eps, x, rtol=1e-5, atol=1e-5)
    assert net(x.bfloat16(), close, cond).velocity.dtype == torch.float32


def test_it_is_not_causal_and_says_so():
    with pytest.raises(ValueError, match="not causal"):
        DIT.build().new_cache(video())
