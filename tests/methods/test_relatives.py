"""LADD, SiD, phased and reward-weighted DMD: their turns by hand, and the identities they stand on."""

import math
from dataclasses import fields

import pytest
import torch
from torch.nn.functional import softplus

from fewstep.batch import Batch, Condition
from fewstep.config import check, presets
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, TrigFlow
from fewstep.methods import (
    DMD2,
    LADD,
    Critic,
    Gan,
    Nets,
    Normalizer,
    PhasedDMD,
    RewardWeight,
    SiD,
    StudentSample,
    Turn,
    Warmup,
)
from fewstep.methods.phased_dmd import renoised
from fewstep.methods.reward_dmd import Motion, Toward, reward_dmd
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
ONE_STEP = StudentSample((1.0,))
STUDENT, CRITIC = Turn("student", ("student",)), Turn("critic", ("critic",))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Affine:
    """x0 = gain x_t + 0.1, remembered; its feature is x_t."""

    def __init__(self, gain, path=None):
        self.path, self.calls = path or RectifiedFlow(), []
        self.gain = torch.tensor(gain, dtype=F64, requires_grad=True)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        x0 = self.gain * x_t + 0.1
        self.calls.append((x_t, t, x0.detach(), torch.is_grad_enabled()))
        return Prediction.of("x0", x0, x_t, t, self.path, (x_t,) if taps else ())


class FunctionHead:
    taps = (0,)

    def __call__(self, features):
        return features[0][:, :1] ** 2


def roles_on(path=None):
    return {"student": Affine(0.7, path), "teacher": Affine(0.9, path), "critic": Affine(0.5, path), "head": FunctionHead()}


def one(method, turn, roles, batch, step=0):
    (terms,) = method.losses(turn, Nets(roles), batch, Rng(1, step, range(batch.size())))
    return terms


# --- LADD -------------------------------------------------------------------------------------------------------------


def test_ladd_by_hand():
    method, batch = (
        LADD(student=StudentSample((1.0, 0.5)), gan=Gan(weight=0.5, r1_weight=0.2, r1_std=0.3)),
        Batch(x0=normal(8, 3)),
    )
    assert [method.turn(i).trains for i in range(3)] == [("student",), ("head",), ("student",)]
    roles = roles_on()
    terms = one(method, STUDENT, roles, batch)
    ((x_t, _, _, with_grad),) = roles["teacher"].calls
    torch.testing.assert_close(terms.total, 0.5 * softplus(-(x_t[:, 0] ** 2)).mean())
    assert with_grad and not roles["critic"].calls and torch.autograd.grad(terms.total, roles["student"].gain)[0] != 0
    roles = roles_on()
    terms = one(method, method.turn(1), roles, batch)
    (fake, t, _, g0), (real, t_real, _, g1), (moved, t_moved, _, g2) = roles["teacher"].calls
    assert torch.equal(t, t_real) and torch.equal(t_real, t_moved) and not (g0 or g1 or g2)
    assert not roles["student"].calls[-1][3]
    loss = softplus(fake[:, 0] ** 2).mean() + softplus(-(real[:, 0] ** 2)).mean()
    torch.testing.assert_close(terms.total, loss + 0.2 * ((real[:, 0] ** 2 - moved[:, 0] ** 2) ** 2).mean())
    assert [key for key, _ in LADD(student_update_freq=1).problems()] == ["student_update_freq"]
    assert [key for key, _ in LADD(gan=Gan(features="critic")).problems()] == ["gan.features"]


# --- SiD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sid_by_hand(alpha):
    roles, batch = roles_on(), Batch(x0=normal(8, 3))
    method = SiD(student=ONE_STEP, alpha=alpha)
    terms = one(method, STUDENT, roles, batch)
    (x_t, t, _, _), noise = roles["teacher"].calls[0], roles["student"].calls[0][0]
    gain = roles["student"].gain
    sample = gain * noise + 0.1
    eps = ((x_t - (1 - t)[:, None] * sample) / t[:, None]).detach()
    x_t = (1 - t)[:, None] * sample + t[:, None] * eps
    phi, psi = 0.9 * x_t + 0.1, 0.5 * x_t + 0.1
    w = 1 / (sample - phi).abs().mean(1, keepdim=True).detach()
    loss = (w * ((1 - alpha) * (phi - psi) ** 2 + (phi - psi) * (psi - sample))).mean()
    torch.testing.assert_close(terms.total.detach(), loss.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(terms.total, gain)[0], torch.autograd.grad(loss, gain)[0], rtol=1e-8, atol=0)


def test_the_score_identity_and_the_gradient_of_the_fisher_divergence():
    """With the exact critic of N(m, c^2): E[(phi - psi)(phi - x)] = E|phi - psi|^2, and d/dm of the loss is Fisher's.

    At alpha = 1/2 the partial derivative, critic held still, is that of the whole 1/2 E|phi - psi|^2 with respect to m.
    """
    t, (m, c) = 0.6, (0.8, 0.5)
    n = 400000
    teacher, critic = GaussianMixture([[0.0]], [1.0]), GaussianMixture([[m]], [c])
    mean = torch.tensor(m, dtype=F64, requires_grad=True)
    x = mean + c * normal(n, 1)
    times_ = torch.full((n,), t, dtype=F64)
    x_t = teacher.path.add_noise(x, normal(n, 1, seed=1), times_)
    phi, psi = (net(x_t, times_, Condition()).x0 for net in (teacher, critic))
    fisher = ((phi - psi) ** 2).mean()
    torch.testing.assert_close(((phi - psi) * (phi - x)).mean().detach(), fisher.detach(), rtol=0.01, atol=0)
    for alpha, share in ((0.5, 0.5), (1.0, 0.0)):
        loss = ((1 - alpha) * (phi - psi) ** 2 + (phi - psi) * (psi - x)).mean()
        torch.testing.assert_close(loss.detach(), share * fisher.detach(), rtol=0.02, atol=2e-3)
    a, s = 1 - t, t
    slope = [a * v**2 / (a**2 * v**2 + s**2) for v in (1.0, c)]  # of phi and psi in x_t
    # phi - psi at the mean of x_t is a m k_phi - m: its square is what moves with m; its spread does not
    want = m * (slope[0] * a - 1) ** 2  # d/dm of half of it
    (grad,) = torch.autograd.grad(0.5 * ((phi - psi) ** 2).mean() + ((phi - psi) * (psi - x)).mean(), mean)
    partial = a * (slope[0] - slope[1]) * (slope[0] * a - 1) * m  # critic held still, of the square
    held = (slope[0] * a - 1) * m * (a * slope[1] - 1)  # of the product
    assert float(grad) == pytest.approx(partial + held, rel=0.02)
    assert partial + held == pytest.approx(want, rel=1e-9)


def test_sid_has_no_setting_without_effect():
    assert not {"gan", "guidance_times", "regression", "sample_weight"} & {field.name for field in fields(SiD)}
    assert SiD().turn(1).name == "critic" and check(SiD()) == []


@pytest.mark.parametrize("over", ["free", "all"])
def test_sids_normaliser_counts_what_it_is_set_to_count(over):
    """Of two frames one is conditioned on: with over=all the mean |x - phi| is half as large, and the loss twice."""
    x0 = normal(4, 2, 2, 1, 1)
    cond = Condition(frames=x0, frame_mask=torch.tensor([[1.0, 0.0]] * 4, dtype=F64))
    method = SiD(student=ONE_STEP, normalizer=Normalizer(over=over))
    free = one(SiD(student=ONE_STEP), STUDENT, roles_on(), Batch(x0=x0, cond=cond)).total
    loss = one(method, STUDENT, roles_on(), Batch(x0=x0, cond=cond)).total
    torch.testing.assert_close(loss, free * (2 if over == "all" else 1))


# --- phased DMD -------------------------------------------------------------------------------------------------------


def test_turns_of_the_phases():
    method = PhasedDMD(steps_per_phase=6, student_update_freq=3, warmup=Warmup(2))
    turns = [method.turn(i) for i in range(20)]
    assert [turn.name for turn in turns[:6]] == ["critic", "critic", "critic", "student", "critic", "critic"]
    assert [turn.phase for turn in turns] == [1] * 6 + [2] * 14  # the last phase has no end
    assert [turn.name for turn in turns[6:10]] == ["critic", "critic", "critic", "student"] and turns[12].name == "student"
    assert turns[9].trains == ("student",) and turns[9].label == "student, phase 2" and CRITIC.label == "critic"


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), EDM()], ids=str)
def test_a_state_above_the_interval_has_the_law_of_noised_data(path):
    """x_t made in two steps is a x0 + s n with unit n; and the targets solve x_t = a x0* + s eps*."""
    end = {RectifiedFlow(): 0.5, TrigFlow(): 0.7, EDM(): 2.0}[path]
    n = 200000
    t = torch.full((n,), {RectifiedFlow(): 0.8, TrigFlow(): 1.2, EDM(): 5.0}[path], dtype=F64)
    sample = normal(n, 1)
    step = renoised(sample, end, t, path, Rng(0, 0, range(n)))
    a, s = (c[0] for c in path.coefficients(t)[:2])
    left = (step.x_t - a * sample) / s
    assert float(left.std()) == pytest.approx(1, abs=0.01) and abs(float((left * sample).mean())) < 0.01
    torch.testing.assert_close(a * step.x0 + s * step.eps, step.sigma * step.x_t)


@pytest.mark.parametrize("space", ["x0", "eps", "velocity"])
def test_the_critics_target_is_the_score_of_the_interval(space):
    """The best constant-slope answer to it is the exact one for x_k ~ N(m_k, c_k^2), though no x0 was ever shown."""
    n, end, c = 400000, 0.5, 0.3
    path, t = RectifiedFlow(), torch.full((400000,), 0.7, dtype=F64)
    sample = 0.4 + c * normal(n, 1)
    step = renoised(sample, end, t, path, Rng(0, 0, range(n)))
    design = torch.cat([step.x_t, torch.ones_like(step.x_t)], 1)
    target = {"x0": step.x0, "eps": step.eps, "velocity": step.eps - step.x0}[space] / step.sigma
    fitted = design @ torch.linalg.lstsq(design, target).solution
    exact = GaussianMixture([[0.4]], [c])(step.x_t, t, Condition()).read(space)
    assert float((fitted - exact).abs().mean()) < 0.01


def test_a_phase_by_hand():
    method, batch = PhasedDMD(t_list=(1.0, 0.6), steps_per_phase=5, student_update_freq=2), Batch(x0=normal(6, 3))
    for phase, calls in ((1, 1), (2, 2)):
        roles = roles_on()
        terms = one(method, Turn("student", ("student",), phase), roles, batch)
        assert [asked[3] for asked in roles["student"].calls] == [False] * (calls - 1) + [True]
        (_, t, fake, g), (_, t_teacher, real, _) = roles["critic"].calls[0], roles["teacher"].calls[0]
        assert torch.equal(t, t_teacher) and not g and float(t.min()) >= (0.6 if phase == 1 else 0.0)
        sample = roles["student"].calls[-1][2]
        gradient = (fake - real) / (sample - real).abs().mean(1, keepdim=True)
        torch.testing.assert_close(terms.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-9, atol=0)
        roles = roles_on()
        terms = one(method, Turn("critic", ("critic",), phase), roles, batch)
        assert not roles["teacher"].calls and bool(torch.isfinite(terms.total))
        assert torch.autograd.grad(terms.total, roles["critic"].gain)[0] != 0
    # the last phase is DMD2's own last call: same critic loss, in the eps form
    last = PhasedDMD(t_list=(1.0,), critic=Critic("eps"))
    roles = roles_on()
    terms = one(last, Turn("critic", ("critic",), 1), roles, batch)
    (x_t, t, made, _), sample = roles["critic"].calls[0], roles["student"].calls[0][2]
    error = ((x_t - (1 - t)[:, None] * made) - (x_t - (1 - t)[:, None] * sample)) / t[:, None]
    torch.testing.assert_close(terms.total.detach(), (error**2).mean(), rtol=1e-8, atol=0)


def test_phased_has_no_setting_without_effect():
    assert check(PhasedDMD()) == [] and PhasedDMD().sampler(RectifiedFlow()).renoise == "fresh"
    assert not {"renoise", "exit_step", "student", "gan", "guidance_times"} & {field.name for field in fields(PhasedDMD)}
    wrong = PhasedDMD(t_list=(0.5, 1.0), steps_per_phase=0)
    assert [key for key, _ in wrong.problems()] == ["t_list", "steps_per_phase"]


# --- reward -----------------------------------------------------------------------------------------------------------


def test_the_weight_by_hand():
    roles, batch = roles_on(), Batch(x0=normal(8, 2))
    weight = RewardWeight(Toward(direction=(1.0, -2.0)), beta=0.5, baseline=0.2, max_weight=4.0)
    method = DMD2(student=ONE_STEP, sample_weight=weight)
    terms = one(method, STUDENT, roles, batch)
    sample, fake, real = roles["student"].calls[0][2], roles["critic"].calls[0][2], roles["teacher"].calls[0][2]
    weight = torch.exp((sample[:, 0] - 2 * sample[:, 1] - 0.2) / 0.5).clamp(max=4.0)
    gradient = weight[:, None] * (fake - real) / (sample - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(terms.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-9, atol=0)
    assert float(weight.max()) == 4.0 and float(weight.min()) < 1


def test_rewards():
    clip = normal(2, 3, 4, 2, 2)
    still = clip[:, :, :1].expand(-1, -1, 4, -1, -1)
    found = Motion()(torch.cat([clip, still]), Condition())
    torch.testing.assert_close(found, torch.cat([clip.diff(dim=2).abs().mean((1, 2, 3, 4)), torch.zeros(2, dtype=F64)]))
    torch.testing.assert_close(Toward((0.0, 1.0, 0.0))(clip, Condition()), clip[:, 1].mean((1, 2, 3)))
    with pytest.raises(ValueError, match="two latent frames"):
        Motion()(normal(2, 3), Condition())
    with pytest.raises(ValueError, match="1 entries for data of 3 channels"):
        Toward()(normal(2, 3), Condition())
    assert [key for key, _ in RewardWeight(beta=-1.0, max_weight=0.0).problems()] == ["beta", "max_weight"]
    assert math.isinf(RewardWeight(max_weight=math.inf).max_weight) and DMD2().roles == reward_dmd().roles
    assert check(reward_dmd()) == [] and presets("method")["reward_dmd"] is reward_dmd
