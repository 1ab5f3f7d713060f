"""The adversarial terms: forms, approximate R1, noise of the real branch; and what else DMD2's turns can hold."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Prediction, RectifiedFlow, Rng, times
from fewstep.methods import DMD2, LADD, Critic, Gan, Nets, Normalizer, PhasedDMD, Regression, SiD, StudentSample, Turn
from fewstep.networks.analytic import GaussianMixture
from fewstep.networks.heads import AttentionSpec
from fewstep.networks.tiny import TinySpec

F64 = torch.float64
ONE_STEP = StudentSample((1.0,))
STUDENT, CRITIC = Turn("student", ("student",)), Turn("critic", ("critic", "head"))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class IdentityTrunk:
    """A trunk whose feature is x_t itself, and a record of what it was asked."""

    path = RectifiedFlow()

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        self.calls.append((x_t, t, torch.is_grad_enabled()))
        return Prediction(x_t, t, self.path, torch.zeros_like(x_t), (x_t,))


class FunctionHead:
    """A head that is a function of x_t."""

    taps = (0,)

    def __init__(self, function):
        self.function = function

    def __call__(self, features):
        return self.function(features[0])


def head_terms(gan, head, trunk, rows=6, dim=3, **more):
    x0, eps, t = normal(rows, dim), normal(rows, dim, seed=1), torch.linspace(0.1, 0.9, rows, dtype=F64)
    fake = [normal(rows, dim, seed=2)]
    law = times.Shifted(shift=1.0)
    rng = Rng(0, 0, range(rows))
    return gan.head_terms(FunctionHead(head), trunk, fake, x0, eps, t, law, trunk.path, Condition(), rng, **more), (
        x0,
        eps,
        t,
        fake,
    )


def test_forms():
    """softplus is BCE with logits under another name, in value and gradient; hinge is flat once it can tell."""
    fake, real = normal(5, 2).requires_grad_(), normal(5, 2, seed=1).requires_grad_()
    ones, zeros = torch.ones(5, 2, dtype=F64), torch.zeros(5, 2, dtype=F64)
    for form in ("softplus", "bce"):
        gan = Gan(form=form)
        torch.testing.assert_close(gan.head_loss(fake, real), bce(fake, zeros) + bce(real, ones), rtol=1e-13, atol=0)
        torch.testing.assert_close(gan.student_loss(fake), bce(fake, ones), rtol=1e-13, atol=0)
        ours = torch.autograd.grad(gan.head_loss(fake, real), (fake, real))
        for grad, want in zip(ours, torch.autograd.grad(bce(fake, zeros) + bce(real, ones), (fake, real)), strict=True):
            torch.testing.assert_close(grad, want)
    hinge, fake, real = Gan(form="hinge"), fake.detach(), real.detach()
    assert float(hinge.head_loss(fake * 0 - 1, real * 0 + 1)) == 0 and float(hinge.head_loss(fake * 0, real * 0)) == 2
    torch.testing.assert_close(hinge.student_loss(fake), -fake.mean())


@pytest.mark.parametrize("noise", ["same", "own", "independent"])
def test_noise_of_the_real_branch(noise):
    trunk = IdentityTrunk()
    terms, (x0, eps, t, fake) = head_terms(Gan(real_noise=noise), lambda x: x.sum(1, keepdim=True), trunk)
    ((x_t, real_t, with_grad),) = trunk.calls
    found = (x_t - (1 - real_t)[:, None] * x0) / real_t[:, None]
    assert torch.equal(real_t, t) is (noise != "independent")
    assert torch.allclose(found, eps) is (noise == "same") and not with_grad
    want = torch.nn.functional.softplus(fake[0].sum(1)).mean() + torch.nn.functional.softplus(-x_t.sum(1)).mean()
    torch.testing.assert_close(terms.values["head"], want)
    torch.testing.assert_close(terms.watch["logit_real"], x_t.sum(1).mean())


def test_r1_perturbs_the_real_sample_and_noises_both_alike():
    trunk = IdentityTrunk()
    head_terms(Gan(r1_weight=1.0, r1_std=0.2, real_noise="independent"), lambda x: x[:, :1], trunk)
    (real, t, _), (moved, t_moved, _) = trunk.calls
    assert torch.equal(t, t_moved)
    n = (moved - real) / (1 - t)[:, None] / 0.2  # what is left of the difference is (1 - t) 0.2 n: no noise of its own
    assert 0.6 < float(n.std()) < 1.4


def test_r1_tends_to_the_squared_gradient():
    """(D(x) - D(x + s n))^2 / s^2 -> |grad D|^2 in the mean over n; and it vanishes with s, whatever the noise level is."""
    rows, weights = 40000, torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    head = lambda x: torch.tanh(x @ weights)[:, None]  # noqa: E731
    found = []
    for std in (0.01, 1e-6):
        terms, (x0, eps, t, _) = head_terms(Gan(r1_weight=1.0, r1_std=std, real_noise="same"), head, IdentityTrunk(), rows)
        found.append(float(terms.values["r1"]))
    x0 = x0.requires_grad_()
    (grad,) = torch.autograd.grad(head((1 - t)[:, None] * x0 + t[:, None] * eps).sum(), x0)
    assert found[0] / 1e-4 == pytest.approx(float((grad**2).sum(1).mean()), rel=0.03)
    assert found[1] < 1e-10


def test_a_critic_as_trunk_is_trained_by_the_head_and_a_teacher_is_not():
    for features in ("teacher", "critic"):
        roles, method = tiny_roles(), DMD2(student=ONE_STEP, gan=Gan(features=features))
        count = 0
        for terms in method.losses(CRITIC, Nets(roles), Batch(x0=normal(4, 2).float()), Rng(1, 0, range(4))):
            terms.total.backward()
            count += 1
        assert count == (2 if features == "teacher" else 1)  # teacher: the critic's graph is gone before the head's begins
        for role in ("student", "teacher"):
            assert all(p.grad is None for p in roles[role].module.parameters())
        for role in ("critic", "head"):
            assert all(p.grad is not None for p in roles[role].module.parameters() if p.requires_grad), role
        alone = DMD2(student=ONE_STEP)
        reference = tiny_roles()
        for terms in alone.losses(
            Turn("critic", ("critic",)), Nets(reference), Batch(x0=normal(4, 2).float()), Rng(1, 0, range(4))
        ):
            terms.total.backward()
        same = torch.equal(roles["critic"].blocks[0].first.weight.grad, reference["critic"].blocks[0].first.weight.grad)
        assert same is (features == "teacher")


def tiny_roles():
    found = {}
    for seed, role in enumerate(("student", "teacher", "critic")):
        torch.manual_seed(seed)
        found[role] = TinySpec(width=8, depth=2).build()
    found["teacher"].module.requires_grad_(False)
    torch.manual_seed(9)
    found["head"] = AttentionSpec(taps=(1,), channels=8, hidden=8, num_heads=2).build()
    return found


def test_the_score_and_the_features_are_one_call():
    calls = []

    class Counting(IdentityTrunk):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            calls.append((self.name, tuple(taps), torch.is_grad_enabled()))
            return super().__call__(x_t, t, cond, taps=taps)

    roles = {name: Counting(name) for name in ("student", "teacher", "critic")} | {"head": FunctionHead(lambda x: x[:, :1])}
    cond = Condition(label=torch.zeros(4).long())
    batch = Batch(x0=normal(4, 2), cond=cond, negative=cond)
    for features, want in (
        ("teacher", [("critic", (), False), ("teacher", (0,), True), ("teacher", (), False)]),  # the negative: no graph
        ("critic", [("critic", (0,), True), ("teacher", (), False)]),
    ):
        calls.clear()
        list(
            DMD2(student=ONE_STEP, gan=Gan(features=features), guidance=2.0).losses(
                STUDENT, Nets(roles), batch, Rng(1, 0, range(4))
            )
        )
        assert calls[1:] == want


# --- the other terms of DMD2 ------------------------------------------------------------------------------------------


class Affine(IdentityTrunk):
    """x0 = gain x_t + label / 10, remembered."""

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.tensor(gain, dtype=F64, requires_grad=True)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        label = 0 if cond.label is None else cond.label[:, None] / 10
        x0 = self.gain * x_t + label
        self.calls.append((x_t.detach(), t, cond.label, x0.detach()))
        return Prediction.of("x0", x0, x_t, t, self.path)


def affine_roles():
    return {"student": Affine(0.7), "teacher": Affine(0.9), "critic": Affine(0.5)}


def one(method, turn, roles, batch, step=0):
    (terms,) = method.losses(turn, Nets(roles), batch, Rng(1, step, range(batch.size())))
    return terms


def labelled(rows=8):
    cond, negative = Condition(label=torch.ones(rows).long()), Condition(label=-torch.ones(rows).long())
    return Batch(x0=normal(rows, 3), cond=cond, negative=negative)


def test_decoupled_guidance_by_hand():
    """(critic - cond) at one noise, (w - 1)(cond - uncond) at another, each over its own distance."""
    roles, batch = affine_roles(), labelled()
    method = DMD2(
        student=ONE_STEP,
        guidance=4.0,
        guidance_times=times.Uniform(low=0.6, high=0.9),
        times=times.Uniform(low=0.1, high=0.5),
    )
    terms = one(method, STUDENT, roles, batch)
    sample = roles["student"].calls[-1][3]
    (_, t1, label, cond1), (_, t2, label2, both) = roles["teacher"].calls
    fake = roles["critic"].calls[0][3]
    assert float(t1.max()) <= 0.5 and float(t2.min()) >= 0.6 and len(label) == 8 and len(label2) == 16
    cond2, uncond2 = both.chunk(2)
    guided = uncond2 + 4 * (cond2 - uncond2)
    gradient = (fake - cond1) / (sample - cond1).abs().mean(1, keepdim=True)
    gradient = gradient - 3 * (cond2 - uncond2) / (sample - guided).abs().mean(1, keepdim=True)
    torch.testing.assert_close(terms.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-9, atol=0)
    outside = DMD2(
        student=ONE_STEP, guidance=4.0, guidance_times=times.Uniform(low=0.6, high=0.9), guidance_interval=(0.0, 0.5),
        times=times.Uniform(low=0.1, high=0.5),
    )  # fmt: skip
    roles = affine_roles()
    terms = one(outside, STUDENT, roles, batch)
    sample, cond1, fake = roles["student"].calls[-1][3], roles["teacher"].calls[0][3], roles["critic"].calls[0][3]
    alone = (fake - cond1) / (sample - cond1).abs().mean(1, keepdim=True)
    torch.testing.assert_close(terms.total.detach(), 0.5 * (alone**2).mean(), rtol=1e-9, atol=0)


def test_the_two_parts_of_decoupled_dmd_add_up_to_the_coupled_one():
    """At one noise and over one distance: critic - guided = (critic - cond) - (w - 1)(cond - uncond)."""
    critic, cond, uncond, sample = (normal(4, 3, seed=i) for i in range(4))
    guided = uncond + 5 * (cond - uncond)
    whole = Normalizer()(critic - guided, sample, guided, None)
    parts = Normalizer()(critic - cond, sample, guided, None) + Normalizer()(-4 * (cond - uncond), sample, guided, None)
    torch.testing.assert_close(whole, parts)


def test_guidance_on_an_interval():
    roles, batch = affine_roles(), labelled(64)
    method = DMD2(student=ONE_STEP, guidance=4.0, guidance_interval=(0.3, 0.6), times=times.Uniform(low=0.1, high=0.9))
    terms = one(method, STUDENT, roles, batch)
    sample, fake = roles["student"].calls[-1][3], roles["critic"].calls[0][3]
    both, t = roles["teacher"].calls[0][3], roles["teacher"].calls[0][1][:64]
    cond, uncond = both.chunk(2)
    w = torch.where((t >= 0.3) & (t <= 0.6), 4.0, 1.0)[:, None].double()
    guided = uncond + w * (cond - uncond)
    gradient = (fake - guided) / (sample - guided).abs().mean(1, keepdim=True)
    torch.testing.assert_close(terms.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-9, atol=0)


def test_the_regression_term():
    noise, x0 = normal(4, 3, seed=3), normal(4, 3)
    pairs = DMD2(student=StudentSample((1.0, 0.5), "same", "last"), regression=Regression(0.25))
    roles = affine_roles()
    terms = one(pairs, STUDENT, roles, Batch(x0=x0, noise=noise))
    assert pairs.needs == {"x0", "noise"} and torch.equal(roles["student"].calls[0][0], noise)
    want = ((0.7 * (0.5 * 0.7 * noise + 0.5 * noise) - x0) ** 2).mean()
    torch.testing.assert_close(terms.values["regression"].detach(), want)
    assert terms.weights["regression"] == 0.25
    data = DMD2(student=ONE_STEP, regression=Regression(0.25, source="data"))
    roles = affine_roles()
    terms = one(data, STUDENT, roles, Batch(x0=x0))
    torch.testing.assert_close(terms.values["regression"].detach(), ((roles["student"].calls[0][3] - x0) ** 2).mean())
    warm = DMD2(student=ONE_STEP, regression=Regression(0.25, source="data", warmup_steps=3))
    assert [warm.turn(i).name for i in range(6)] == ["regression"] * 3 + ["critic"] * 2 + ["student"]
    roles = affine_roles()
    terms = one(warm, warm.turn(0), roles, Batch(x0=x0))
    assert set(terms.values) == {"regression"} and not roles["teacher"].calls and not roles["critic"].calls
    terms.total.backward()
    assert roles["student"].gain.grad is not None


def test_one_sample_may_serve_several_draws_of_a_critic_turn():
    roles, method = affine_roles(), DMD2(student=ONE_STEP, critic=Critic(draws=3))
    found = list(method.losses(Turn("critic", ("critic",)), Nets(roles), Batch(x0=normal(4, 3)), Rng(1, 0, range(4))))
    assert len(found) == 3 and len(roles["student"].calls) == 1
    assert len({float(t[0]) for _, t, _, _ in roles["critic"].calls}) == 3
    total = sum(float(terms.total.detach()) for terms in found)
    assert total == pytest.approx(sum(float(terms.values["critic"].detach()) for terms in found) / 3)


@pytest.mark.parametrize("make", [DMD2, LADD, PhasedDMD, SiD])
def test_all_roles_are_conditioned_on_the_same_first_frames(make):
    """Shares 0, 1: every sample is shown its first frame, in every call of the turn."""

    class Video(Affine):
        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            masks.append(cond.frame_mask)
            frames.append(cond.frames)
            return Prediction.of("x0", self.gain * x_t, x_t, t, self.path, (x_t.flatten(1),) if taps else ())

    x0, masks, frames = normal(2, 3, 4, 2, 2), [], []
    roles = {name: Video(0.5) for name in ("student", "teacher", "critic")} | {"head": FunctionHead(lambda x: x[:, :1])}
    method = make(first_frames=(0.0, 1.0))
    for step in (0, 1):
        list(method.losses(method.turn(step), Nets(roles), Batch(x0=x0), Rng(1, step, range(2))))
    want = torch.tensor([[1.0, 0, 0, 0]] * 2, dtype=F64)
    assert len(masks) >= 4 and all(torch.equal(m, want) and f is x0 for m, f in zip(masks, frames, strict=True))
    assert [key for key, _ in make(first_frames=(0.5, 0.4)).problems()] == ["first_frames"]


def test_noised_data_as_the_students_input():
    roles, batch = affine_roles(), Batch(x0=normal(256, 3))
    method = DMD2(student=StudentSample(input="data"))
    one(method, STUDENT, roles, batch)
    ((x_t, t, _, _),) = roles["student"].calls
    assert set(t.tolist()) == set(method.student.t_list)
    noise = (x_t - (1 - t)[:, None] * batch.x0) / t[:, None]
    assert abs(float(noise.std()) - 1) < 0.1


def test_problems_of_the_new_fields():
    keys = lambda method: [key for key, _ in method.problems()]  # noqa: E731
    assert keys(Critic(draws=0)) == ["draws"] and keys(Regression(weight=0.0)) == ["weight"]
    assert keys(DMD2(regression=Regression())) == ["regression.source"]
    assert not keys(DMD2(student=ONE_STEP, regression=Regression()))
    assert keys(DMD2(student=StudentSample(renoise="ode", input="data"), regression=Regression())) == ["student.input"]
    assert keys(DMD2(guidance_times=times.Uniform())) == ["warn:guidance_times"]
    assert [key for key, _ in Gan(weight=0.0).problems()] == ["weight"]
    assert [key for key, _ in Gan(r1_weight=1.0, r1_std=0.0).problems()] == ["r1_std"]
    assert DMD2(gan=Gan()).roles == ("student", "teacher", "critic", "head")
    assert DMD2(gan=Gan()).turn(1).trains == ("critic", "head") and DMD2(gan=Gan()).turn(0).trains == ("student",)


def test_a_mixture_without_features_is_refused():
    roles = tiny_roles() | {"teacher": GaussianMixture([[0.0, 0.0]], [1.0])}
    with pytest.raises(ValueError, match="no blocks to tap"):
        one(DMD2(student=ONE_STEP, gan=Gan()), STUDENT, roles, Batch(x0=normal(4, 2).float()))
    terms = one(DMD2(student=ONE_STEP, gan=Gan(features="critic")), STUDENT, roles, Batch(x0=normal(4, 2).float()))
    assert math.isfinite(float(terms.total.detach()))
