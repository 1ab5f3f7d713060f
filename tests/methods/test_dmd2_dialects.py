"""The three published dialects against their formulas, written out in float64 without any of our mathematics.

Formulas: Cosmos-Transfer1 (EDM), Cosmos-Predict2.5 (TrigFlow over rectified flow) and FastGen, each student and critic turn,
loss and gradients to 1e-10. Networks here are raw functions; ours see them through adapters, the references directly.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from fewstep.batch import Batch, Condition
from fewstep.config import check, fields_help, presets
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, TrigFlow
from fewstep.diffusion.prediction import with_clean_frames
from fewstep.methods import DMD2, Gan, Nets, Regression, fastgen, predict25, transfer1
from fewstep.networks.heads import Conv3dSpec, QuerySpec

F64 = torch.float64
TOL = {"rtol": 1e-10, "atol": 1e-13}
SHAPE = (3, 4, 3, 4, 4)
FREE = torch.tensor([[0.0, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=F64)  # 0 where a frame is given


class Raw(nn.Module):
    """F(y, c, text): a hidden layer, whose values are the features, and a way out."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.text, self.leave = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, y, c, text):
        hidden = torch.tanh(self.enter(y.movedim(1, -1)) + (self.text(text) + c[:, None])[:, None, None, None])
        return self.leave(hidden).movedim(-1, 1), hidden.movedim(-1, 1)


class Adapter:
    """Raw as a Denoiser that shows its given frames clean and keeps them."""

    def __init__(self, raw, path, sigma_data=0.5):
        self.raw, self.path, self.sigma_data = raw, path, sigma_data
        self.module = raw

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        x = x_t
        if cond.frame_mask is not None:
            x = torch.where(cond.frame_mask.bool()[:, None, :, None, None], cond.frames, x_t)
        if isinstance(self.path, EDM):
            s, d = t[:, None, None, None, None], self.sigma_data
            raw, features = self.raw(x / (s**2 + d**2).sqrt(), t.log() / 4, cond.text)
            x0 = d**2 / (s**2 + d**2) * x_t + s * d / (s**2 + d**2).sqrt() * raw
            answer = Prediction.of("x0", x0, x_t, t, self.path, (features,) if taps else ())
        else:
            raw, features = self.raw(x, t, cond.text)
            answer = Prediction(x_t, t, self.path, raw, (features,) if taps else ())
        return with_clean_frames(answer, cond.frames, cond.frame_mask)


class Log(Rng):
    """An Rng that remembers what it drew."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.normals, self.uniforms, self.ints = [], [], []

    @property
    def shared(self):
        if self._shared is None:
            self._shared = Log(self.seed, self.step, ((1 << 48) - 1,))
        return self._shared

    def normal(self, shape=(), dtype=torch.float32):
        self.normals.append(super().normal(shape, dtype))
        return self.normals[-1]

    def uniform(self, shape=()):
        self.uniforms.append(super().uniform(shape))
        return self.uniforms[-1]

    def integers(self, high, shape=()):
        self.ints.append(super().integers(high, shape))
        return self.ints[-1]

    def integer(self, high):
        self.ints.append(super().integer(high))
        return self.ints[-1]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def batch_of(given):
    frames = {"frames": normal(*SHAPE, seed=9), "frame_mask": 1 - FREE} if given else {}
    cond = Condition(text=normal(3, 5, seed=1), **frames)
    return Batch(x0=normal(*SHAPE, seed=9), cond=cond, negative=replace(cond, text=normal(3, 5, seed=2)))


def world(path, head=None):
    raws = {role: Raw(seed) for seed, role in enumerate(("student", "teacher", "critic"))}
    nets = {role: Adapter(raw, path) for role, raw in raws.items()}
    if head is not None:
        torch.manual_seed(7)
        nets["head"] = head.build()
        nets["head"].module.double()
    return raws, nets


def found(method, name, nets, batch, step=0):
    """The weighted sum of the terms of a turn, its gradients by parameter, and the random numbers it drew."""
    rng = Log(3, step, range(3))
    turn = next(method.turn(i) for i in range(20) if method.turn(i).name == name)
    for net in nets.values():
        for parameter in net.module.parameters():
            parameter.grad = None
    for role, net in nets.items():
        net.module.requires_grad_(role in turn.trains)
    total = 0.0
    for terms in method.losses(turn, Nets(nets), batch, rng):
        terms.total.backward()
        total = total + terms.total.detach()
    grads = [p.grad.clone() for role in turn.trains for p in nets[role].module.parameters()]
    for net in nets.values():
        net.module.requires_grad_(True)
    return total, grads, rng


def agree(ours, reference, parameters):
    total, grads, _ = ours
    torch.testing.assert_close(total, reference.detach(), **TOL)
    wanted = torch.autograd.grad(reference, list(parameters))
    assert any(bool(g.any()) for g in wanted)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, **TOL)


def five(t):
    return t[:, None, None, None, None]


def kept(x0, batch):
    mask = batch.cond.frame_mask
    return x0 if mask is None else torch.where(mask.bool()[:, None, :, None, None], batch.cond.frames, x0)


HEAD = Conv3dSpec(taps=(0,), channels=8, hidden=8)


# --- Transfer1 --------------------------------------------------------------------------------------------------------


def edm(raw, x_t, sigma, text, batch):
    """(x0, features), sigma_data 0.5."""
    s = five(sigma)
    y, features = raw(kept(x_t, batch) / torch.sqrt(s**2 + 0.25), 0.25 * torch.log(sigma), text)
    x0 = 0.25 / (s**2 + 0.25) * x_t + 0.5 * s / torch.sqrt(s**2 + 0.25) * y
    return kept(x0, batch), features


def karras_draw(rng, place):
    """A uniform integer in [20, 980] of the 1000-point grid with rho 7, times sqrt(16 latent frames)."""
    index = 20 + rng.ints[place].double()
    return 4.0 * (80 ** (1 / 7) + index / 999 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("step", [0, 5])
def test_transfer1_student(given, step):
    raws, nets = world(EDM(t_max=320.0), HEAD)
    batch = batch_of(given)
    ours = found(transfer1(), "student", nets, batch, step)
    noise, eps = ours[2].normals
    sigma = karras_draw(ours[2], 0)
    text, negative = batch.cond.text, batch.negative.text
    x0g, _ = edm(raws["student"], 80 * noise, torch.full((3,), 80.0, dtype=F64), text, batch)
    x_t = x0g + five(sigma) * eps
    x_c, features = edm(raws["teacher"], x_t, sigma, text, batch)
    x_n, _ = edm(raws["teacher"], x_t, sigma, negative, batch)
    x_f, _ = edm(raws["critic"], x_t, sigma, text, batch)
    eps_c, eps_n, eps_f = ((x_t - x) / five(sigma) for x in (x_c, x_n, x_f))
    eps_t = eps_c + 5 * (eps_c - eps_n)
    w = five(sigma) / (eps - eps_t).abs().mean((1, 2, 3, 4), keepdim=True)
    target = (x0g - w * (-eps_f / five(sigma) + eps_t / five(sigma))).detach()
    loss = 0.5 * ((x0g - target) ** 2).mean() + 1e-3 * softplus(-nets["head"].module([features])).mean()
    agree(ours, loss, raws["student"].parameters())


@pytest.mark.parametrize("given", [False, True])
def test_transfer1_critic(given):
    raws, nets = world(EDM(t_max=320.0), HEAD)
    batch = batch_of(given)
    ours = found(transfer1(), "critic", nets, batch)
    noise, eps, eps_real = ours[2].normals
    sigma, text = karras_draw(ours[2], 0), batch.cond.text
    with torch.no_grad():
        x0g, _ = edm(raws["student"], 80 * noise, torch.full((3,), 80.0, dtype=F64), text, batch)
        x_t = x0g + five(sigma) * eps
        _, fake = edm(raws["teacher"], x_t, sigma, text, batch)
        _, real = edm(raws["teacher"], batch.x0 + five(sigma) * eps_real, sigma, text, batch)
    eps_f = (x_t - edm(raws["critic"], x_t, sigma, text, batch)[0]) / five(sigma)
    head = nets["head"].module
    loss = ((eps - eps_f) ** 2).mean() + softplus(head([fake])).mean() + softplus(-head([real])).mean()
    agree(ours, loss, [*raws["critic"].parameters(), *head.parameters()])


# --- Predict2.5 -------------------------------------------------------------------------------------------------------

TIMES = [math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)]


def trig(raw, x_t, t, text, batch):
    """x0 of a rectified-flow network asked on TrigFlow: c_in = c_skip = 1/(cos + sin), c_noise = s, c_out = -s."""
    c = 1 / (torch.cos(t) + torch.sin(t))
    s = torch.sin(t) * c
    v, features = raw(kept(five(c) * x_t, batch), s, text)
    return kept(five(c) * x_t - five(s) * v, batch), features


def backward_simulation(raw, noise, steps, batch):
    x = noise
    for i in range(steps):
        t = torch.full((3,), TIMES[i], dtype=F64)
        with torch.set_grad_enabled(i == steps - 1):
            x0, _ = trig(raw, x, t, batch.cond.text, batch)
        if i < steps - 1:
            x = math.cos(TIMES[i + 1]) * x0 + math.sin(TIMES[i + 1]) * noise  # the initial noise, again
    return x0


def shift5(u):
    s = 5 * u / (1 + 4 * u)
    return torch.atan(s / (1 - s))


def free_mean(value, given):
    """Per sample, over what is not conditioned."""
    free = (FREE if given else torch.ones_like(FREE))[:, None, :, None, None].expand_as(value)
    return (value * free).sum((1, 2, 3, 4)) / free.sum((1, 2, 3, 4))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("step", range(4))
def test_predict25_student(given, step):
    raws, nets = world(RectifiedFlow())
    batch = batch_of(given)
    ours = found(predict25(), "student", nets, batch, step)
    rng, text = ours[2], batch.cond.text
    noise, eps = rng.normals
    sample = backward_simulation(raws["student"], noise, 1 + int(rng.shared.ints[0]), batch)
    t = shift5(rng.uniforms[0])
    x_t = five(torch.cos(t)) * sample + five(torch.sin(t)) * eps
    with torch.no_grad():
        c, u, fake = (
            trig(raws["teacher"], x_t, t, text, batch)[0],
            trig(raws["teacher"], x_t, t, batch.negative.text, batch)[0],
            trig(raws["critic"], x_t, t, text, batch)[0],
        )
        teacher = c + 3 * (c - u)
        weight = free_mean((sample - teacher).abs(), given).clamp(min=1e-5)
        g = (fake - teacher) / five(weight)
        if given:
            g = g * FREE[:, None, :, None, None]
    loss = ((sample - (sample - g).detach()) ** 2).mean()
    agree(ours, loss, raws["student"].parameters())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("with_gan", [False, True])
def test_predict25_critic(given, with_gan):
    """(G - x0)^2 / sin^2 t over what is free; with the optional head: BCE on critic features, real with the same eps and t."""
    raws, nets = world(RectifiedFlow(), QuerySpec(taps=(0,), channels=8, hidden=8, num_heads=2) if with_gan else None)
    batch = batch_of(given)
    gan = Gan(features="critic", form="bce", real_noise="same") if with_gan else None
    ours = found(replace(predict25(), gan=gan), "critic", nets, batch, step=2)
    rng, text = ours[2], batch.cond.text
    noise, eps = rng.normals
    with torch.no_grad():
        sample = backward_simulation(raws["student"], noise, 1 + int(rng.shared.ints[0]), batch)
    t = shift5(rng.uniforms[0])
    x_t = five(torch.cos(t)) * sample + five(torch.sin(t)) * eps
    x0, fake = trig(raws["critic"], x_t, t, text, batch)
    loss = free_mean((sample - x0) ** 2 / five(torch.sin(t) ** 2), given).mean()
    parameters = list(raws["critic"].parameters())
    if with_gan:
        head = nets["head"].module
        _, real = trig(raws["critic"], five(torch.cos(t)) * batch.x0 + five(torch.sin(t)) * eps, t, text, batch)
        bce = nn.functional.binary_cross_entropy_with_logits
        one = torch.ones(3, 1, dtype=F64)
        loss = loss + bce(head([real]), one) + bce(head([fake]), 0 * one)
        parameters += list(head.parameters())
    agree(ours, loss, parameters)


# --- FastGen ----------------------------------------------------------------------------------------------------------

LIST = [0.999, 0.937, 0.833, 0.624]
GUIDED = {"guidance": 5.0}  # its Wan recipes; d + (g - 1)(d - d_neg)


def flow(raw, x_t, t, text, batch):
    v, features = raw(kept(x_t, batch), t, text)
    return kept(x_t - five(t) * v, batch), features


def u_to_t(u):
    u = 0.001 + 0.998 * u
    return 5 * u / (1 + 4 * u)


def fastgen_sample(raw, rng, batch, renoise, one_step):
    if one_step:
        x = LIST[0] * rng.normals[0]
        return flow(raw, x, torch.full((3,), LIST[0], dtype=F64), batch.cond.text, batch)[0]
    t = torch.tensor(LIST, dtype=F64)[rng.ints[0]]
    return flow(raw, five(1 - t) * batch.x0 + five(t) * rng.normals[0], t, batch.cond.text, batch)[0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_fastgen_student(given, one_step, renoise):
    raws, nets = world(RectifiedFlow(), HEAD)
    batch = batch_of(given)
    student = replace(fastgen().student, renoise=renoise)
    if one_step:
        student = replace(student, t_list=(LIST[0],))
    method = replace(fastgen(), student=student, **GUIDED)
    ours = found(method, "student", nets, batch)
    rng, text = ours[2], batch.cond.text
    sample = fastgen_sample(raws["student"], rng, batch, renoise, one_step)
    t, eps = u_to_t(rng.uniforms[-1]), rng.normals[-1]
    x_t = five(1 - t) * sample + five(t) * eps
    real, features = flow(raws["teacher"], x_t, t, text, batch)
    with torch.no_grad():
        real = real + 4 * (real - flow(raws["teacher"], x_t, t, batch.negative.text, batch)[0])
        fake, _ = flow(raws["critic"], x_t, t, text, batch)
        w = 1 / ((sample - real).abs().mean((1, 2, 3, 4), keepdim=True) + 1e-6)
        grad = w * (fake - real)
        if given:  # its hook restores given frames: nothing to learn there, whatever guidance says
            grad = grad * FREE[:, None, :, None, None]
    loss = 0.5 * ((sample - (sample - grad).detach()) ** 2).mean()
    loss = loss + 1e-3 * softplus(-nets["head"].module([features])).mean()
    agree(ours, loss, raws["student"].parameters())


@pytest.mark.parametrize("r1", [0.0, 0.3])
@pytest.mark.parametrize("same", [False, True])
def test_fastgen_critic(r1, same):
    """With R1 as it should be: the real sample is moved, then both are noised with one t and one eps."""
    raws, nets = world(RectifiedFlow(), HEAD)
    batch = batch_of(False)
    gan = Gan(real_noise="same" if same else "independent", r1_weight=r1, r1_std=0.1)
    ours = found(replace(fastgen(), gan=gan, **GUIDED), "critic", nets, batch)
    rng, text = ours[2], batch.cond.text
    with torch.no_grad():
        sample = fastgen_sample(raws["student"], rng, batch, "fresh", False)
        t, eps = u_to_t(rng.uniforms[1]), rng.normals[1]
        x_t = five(1 - t) * sample + five(t) * eps
        fake = flow(raws["teacher"], x_t, t, text, batch)[1]
        t_real, eps_real = (t, eps) if same else (u_to_t(rng.uniforms[2]), rng.normals[2])
        real = flow(raws["teacher"], five(1 - t_real) * batch.x0 + five(t_real) * eps_real, t_real, text, batch)[1]
        moved = batch.x0 + 0.1 * rng.normals[-1]
        moved = flow(raws["teacher"], five(1 - t_real) * moved + five(t_real) * eps_real, t_real, text, batch)[1]
    head = nets["head"].module
    loss = ((flow(raws["critic"], x_t, t, text, batch)[0] - sample) ** 2).mean()
    loss = loss + softplus(head([fake])).mean() + softplus(-head([real])).mean()
    if r1:
        loss = loss + r1 * ((head([real]) - head([moved])) ** 2).mean()
    agree(ours, loss, [*raws["critic"].parameters(), *head.parameters()])


# --- given frames -----------------------------------------------------------------------------------------------------


class Free(nn.Module):
    """A student whose answer is its parameter, given frames included: it keeps nothing by itself."""

    def __init__(self, path):
        super().__init__()
        self.answer, self.path = nn.Parameter(normal(*SHAPE, seed=4)), path
        self.__dict__["module"] = self

    def forward(self, x_t, t, cond, *, taps=(), cache=None):
        return Prediction.of("x0", self.answer, x_t, t, self.path)


@pytest.mark.parametrize("features", ["teacher", "critic"])
@pytest.mark.parametrize(
    ("method", "path"),
    [(transfer1(), EDM(t_max=320.0)), (predict25(), TrigFlow()), (fastgen(), RectifiedFlow())],
    ids=["transfer1", "predict25", "fastgen"],
)
def test_conditioning_frames_contribute_exactly_nothing(method, path, features):
    """All terms on, a head that looks at every frame, and a student that does not keep what it was given."""
    method = replace(method, gan=Gan(weight=0.5, features=features), regression=Regression(weight=0.7, source="data"))
    _, nets = world(RectifiedFlow() if isinstance(path, TrigFlow) else path, HEAD)
    nets["student"] = Free(path)
    total, (grad,), _ = found(method, "student", nets, batch_of(True))
    given = (1 - FREE).bool()[:, None, :, None, None].expand_as(grad)
    assert bool(torch.isfinite(total)) and not grad[given].any() and bool((grad[~given] != 0).all())


def test_a_dialect_is_a_dmd2_whose_settings_are_explained():
    """The comment on the line where a setting is declared."""
    said = {row.key: row.comment for row in fields_help(transfer1())}
    assert "Transfer1 g 5" in said["guidance"] and said["normalizer.over"].startswith("all: conditioning frames")
    assert all(said[key] for key in ("student.t_list", "critic.space", "gan.weight", "regression"))
    for make in (transfer1, predict25, fastgen):
        assert type(make()) is DMD2 and presets("method")[f"dmd2_{make.__name__}"] is make and check(make()) == []
