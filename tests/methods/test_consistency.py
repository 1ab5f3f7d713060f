"""Consistency methods against hand-written losses in float64, and at the true consistency function of a Gaussian.

At that function every loss has no gradient: a sign, a factor or a lost tangent leaves one, and the tests plant such faults.
"""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fewstep.batch import Batch, Condition
from fewstep.config import build_recipe, kind
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, StudentSampler, TrigFlow, on_path, times
from fewstep.diffusion.derivative import Difference, Jvp, disagreement
from fewstep.errors import UserError
from fewstep.methods import (
    DMD2,
    RCM,
    SCM,
    AverageVelocity,
    Consistency,
    Curriculum,
    FlowMap,
    Grid,
    MeanFlow,
    Nets,
    OnPolicy,
    StudentSample,
    Tangent,
    TangentTerm,
    Truncation,
)
from fewstep.networks.analytic import GaussianMixture
from fewstep.networks.roles import Full
from fewstep.networks.tiny import TinySpec
from fewstep.training.loop import train

F64 = torch.float64
MEAN, STD = torch.tensor([[0.6, -0.4]], dtype=F64), 0.7
TEACHER = GaussianMixture(MEAN, STD)
ROWS = 64
FLOW, TRIG = RectifiedFlow(), TrigFlow()
SIGMA = EDM(t_max=1e9)


class TrueMap:
    """Consistency function and flow map of the Gaussian, plus two wrong directions whose shares, 0, are the weights."""

    def __init__(self, path=FLOW):
        self.path, self.module = path, nn.Linear(2, 1, bias=False, dtype=F64)
        nn.init.zeros_(self.module.weight)
        self.mean = MEAN[0]

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        x = x_t.double()
        first, second = self.module.weight[0]
        a, s, _, _ = (c[:, None] for c in self.path.coefficients(t))
        place = (x - a * self.mean) / torch.sqrt(a**2 * STD**2 + s**2)
        if cond.end is None:
            x0 = self.mean + STD * place
            wrong = first * s * torch.cos(x) + second * s * x.flip(1)
            return Prediction.of("x0", x0 + wrong, x, t, self.path)
        b, e, _, _ = (c[:, None] for c in self.path.coefficients(cond.end))
        x_r = b * self.mean + torch.sqrt(b**2 * STD**2 + e**2) * place
        gap = (t - cond.end)[:, None]
        exact = on_path(TEACHER, self.path)(x, t, Condition()).velocity
        average = torch.where(gap > 1e-9, (x - x_r) / gap.clamp(min=1e-9), exact)
        return Prediction(x, t, self.path, average + first * torch.cos(x) + second * gap * x.flip(1))


def data(rows=ROWS, seed=3):
    rng = Rng(seed, 0, range(rows))
    return Batch(x0=MEAN + STD * rng.normal((2,), F64))


def gradient(method, nets, turn_step=0, batch=None, of="student"):
    trained = nets[of]
    trained.module.zero_grad()
    turn = method.turn(turn_step)
    total = 0.0
    for terms in method.losses(turn, Nets(nets), batch or data(), Rng(11, 5, range(ROWS))):
        terms.total.backward()
        total += float(terms.total.detach())
    return total, torch.cat([p.grad.flatten() for p in trained.module.parameters()])


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [FLOW, TRIG], ids=str)
def test_forward_mode_equals_differences_on_the_exact_teacher(path):
    mixture = GaussianMixture([[0.6, -0.4], [-1.0, 0.2]], [0.3, 0.6], path=path)
    rng = Rng(1, 0, range(32))
    x, t, d = rng.normal((2,), F64), 0.05 + 0.9 * rng.uniform() * path.t_max, rng.normal((2,), F64)
    one = torch.ones_like(t)
    function = lambda x, t: mixture(x, t, Condition()).velocity  # noqa: E731
    exact = Jvp().along(function, (x, t), (d, one))
    # Richardson: the h^2 error of two central differences cancels.
    far, near = (Difference(step=h).along(function, (x, t), (d, one)) for h in (2e-3, 1e-3))
    error = (exact - (4 * near - far) / 3).norm() / exact.norm()
    assert float(error) < 1e-6


def test_a_difference_stays_in_its_room_and_is_exact_on_a_line():
    seen = []

    def line(x, t):
        seen.append(t)
        return 3 * x + t[:, None]

    x, t = torch.zeros(3, 1, dtype=F64), torch.tensor([1.0, 0.5, 0.2], dtype=F64)
    change = Difference(step=0.1).along(line, (x, t), (x + 1, torch.ones(3, dtype=F64)), (t - 0.2, 1 - t))
    torch.testing.assert_close(change, torch.full_like(x, 4.0))
    assert max(float(part.max()) for part in seen) <= 1.0 and min(float(part.min()) for part in seen) >= 0.2


def test_a_function_without_a_tangent_is_refused():
    with pytest.raises(UserError, match="derivative=difference"):
        Jvp().along(lambda x: x.detach().clone(), (torch.ones(2, 1),), (torch.ones(2, 1),))

    class HasNone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    with pytest.raises(UserError, match=r"must implement the jvp function.*derivative=difference"):
        Jvp().along(HasNone.apply, (torch.ones(2, 1),), (torch.ones(2, 1),))


def test_a_lost_tangent_is_found():
    class Loses(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, change):
            return torch.zeros_like(change)

    x, d = torch.rand(8, 3), torch.rand(8, 3)
    assert disagreement(Jvp(), lambda x: x.sin() + x, (x,), (d,)) < 1e-3
    assert disagreement(Jvp(), lambda x: Loses.apply(x) + x, (x,), (d,)) > 0.2


class Forgets(torch.autograd.Function):
    """The identity, whose tangent is lost."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, change):
        return torch.zeros_like(change)


@kind("forgetful", group="network")
@dataclass(frozen=True)
class Forgetful(TinySpec):
    """The mixture's small network with a kernel that loses the tangent."""

    def build(self):
        network = super().build()
        for p in network.module.parameters():  # fresh, it would put out almost nothing, and its tangent would be lost already
            nn.init.normal_(p, std=0.5)
        network.module.register_forward_hook(lambda module, inputs, output: (Forgets.apply(output[0]), output[1]))
        return network


@pytest.mark.parametrize("recipe", ["analytic_scm", "analytic_rcm", "analytic_meanflow", "analytic_flow_map"])
def test_a_kernel_that_loses_the_tangent_stops_a_run_before_its_first_iteration(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    run = build_recipe(recipe)
    maps = recipe in ("analytic_meanflow", "analytic_flow_map")
    part = "velocity" if maps else "consistency"
    run = replace(run, job=replace(run.job, after=()), preview=None, trainer=replace(run.trainer, max_iter=1, batch_size=16))
    run = replace(run, optim=replace(run.optim, warmup_iters=0))
    networks = replace(run.networks, critic=Full(TinySpec(width=8, depth=1), init="random"))
    spoilt = replace(networks, student=Full(Forgetful(width=8, depth=1, end_time=maps), init="random"))
    with pytest.raises(UserError, match="wrong tangent") as stopped:
        train(replace(run, networks=spoilt))
    assert "\n" not in str(stopped.value)
    folder = run.job.folder()
    assert not list((folder / "checkpoints").glob("iter_*")) and (folder / "metrics.jsonl").read_text() == ""
    # Differences need no tangent, and a network without the fault trains: the agreement is printed and recorded.
    term = getattr(run.method, part)
    by_differences = replace(run.method, **{part: replace(term, derivative=Difference(step=1e-4))})
    train(replace(run, job=replace(run.job, name="other"), networks=spoilt, method=by_differences))
    assert "derivative (derivative=difference) differs by" in capsys.readouterr().err
    line = json.loads((run.job.folder().parent / "other" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["derivative_error"] < 0.02


# --- hand-written losses -----------------------------------------------------------------------------------------------


def small(end_time=False, path=FLOW):
    torch.manual_seed(4)
    network = TinySpec(width=8, depth=1, end_time=end_time, path=path).build()
    network.module.double()
    return network


def autograd_of(student, loss):
    student.module.zero_grad()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in student.module.parameters()])


@pytest.mark.parametrize("source", ["teacher", "data"])
@pytest.mark.parametrize("scales", ["all", "state"])
def test_scm_is_the_papers_loss(source, scales):
    student = small()
    tangent = Tangent(warmup_iters=10, scales=scales, norm="rms" if scales == "all" else "l2")
    law = times.LogNormal(-1.0, 1.4)
    method = SCM(TangentTerm(source=source, times=law, tangent=tangent))
    value, found = gradient(method, {"student": student, "teacher": TEACHER}, turn_step=4)

    rng, x0, r = Rng(11, 5, range(ROWS)), data().x0, 0.4
    t = law.draw(rng, TRIG)
    z = rng.normal_like(x0)
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    x = cos * x0 + sin * z
    if source == "data":
        ode = cos * z - sin * x0
    else:  # of the Gaussian, by hand: x0 and eps given x_t
        variance = cos**2 * STD**2 + sin**2
        centred = x - cos * MEAN
        ode = cos * sin * centred / variance - sin * (MEAN + cos * STD**2 * centred / variance)
    network = on_path(student, TRIG)
    change = torch.autograd.functional.jvp(
        lambda x, t: network(x, t, Condition()).velocity, (x, t), (cos * sin * ode, (cos * sin)[:, 0])
    )[1]
    velocity = network(x, t, Condition()).velocity
    still = velocity.detach()
    if scales == "all":
        g = -(cos**2) * (still - ode) - r * (cos * sin * x + change)
        g = g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)
    else:
        g = -cos * torch.sqrt(1 - r**2 * sin**2) * (still - ode) - (r * cos * sin * x + change)
        g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    expected = autograd_of(student, (velocity - still - g).square().mean())
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_the_discrete_loss_is_ects(source):
    student = small()
    method = Consistency(source=source, schedule=Curriculum(stage_iters=10), huber=0.03)
    value, found = gradient(method, {"student": student, "teacher": TEACHER}, turn_step=12)

    rng, x0 = Rng(11, 5, range(ROWS)), data().x0
    upper = torch.exp(-1.1 + 2.0 * rng.normal((), F64)).clamp(max=80.0)
    p = 1 - 1 / 4  # stage 1 of q = 2
    lower = (upper - upper * (1 - p) * (1 + 8 * torch.sigmoid(-upper))).clamp(min=0.0)
    z = rng.normal_like(x0)
    t, r = upper / (1 + upper), lower / (1 + lower)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * z
    if source == "teacher":  # an Euler step of dx/dsigma = eps on x / a = x0 + sigma eps
        eps = TEACHER(x_t, t, Condition()).eps
        x_r = (1 - r)[:, None] * (x_t / (1 - t)[:, None] + (lower - upper)[:, None] * eps)
        end = x_t / (1 - t)[:, None] - upper[:, None] * eps
    else:
        x_r, end = (1 - r)[:, None] * x0 + r[:, None] * z, x0
    with torch.no_grad():
        target = torch.where((lower == 0)[:, None], end, student(x_r, r, Condition()).x0)
    distance = torch.sqrt((student(x_t, t, Condition()).x0 - target).square().sum(1) + 0.03**2) - 0.03
    expected = autograd_of(student, (distance / (upper - lower).clamp(min=1e-8)).mean())
    assert bool((lower == 0).any()) and value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-9, atol=1e-11)


def test_tcm_asks_its_first_stage_below_and_at_the_boundary():
    student, first = small(), small()
    torch.manual_seed(9)
    for p in first.module.parameters():
        nn.init.normal_(p, std=0.5)
    cut = Truncation(t=0.5, boundary_share=0.25, boundary_weight=0.1)
    method = Consistency(source="data", schedule=Grid(num=12, shift=2.0), truncation=cut, huber=0.0, weighting="none")
    value, found = gradient(method, {"student": student, "teacher": first})

    rng, x0 = Rng(11, 5, range(ROWS)), data().x0
    grid = torch.cat([times.shifted(12, 2.0), torch.zeros(1, dtype=F64)])
    place = rng.integers(12)
    t, r = grid[place], grid[place + 1]
    edge = rng.uniform() < 0.25
    t = torch.where(edge, 0.5, t.clamp(min=0.5 * (1 + 1e-6)))
    r = torch.where(edge, 0.5, torch.minimum(r, t))
    z = rng.normal_like(x0)
    x_t, x_r = ((1 - k)[:, None] * x0 + k[:, None] * z for k in (t, r))
    with torch.no_grad():
        answers = torch.where((r <= 0.5)[:, None], first(x_r, r, Condition()).x0, student(x_r, r, Condition()).x0)
        target = torch.where((r == 0)[:, None], x0, answers)
    distance = (student(x_t, t, Condition()).x0 - target).norm(dim=1)
    loss = torch.where(edge, 0.0, distance).mean() / 0.75 + 0.1 * torch.where(edge, distance, 0.0).mean() / 0.25
    expected = autograd_of(student, loss)
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-9, atol=1e-11)


@dataclass(frozen=True)
class Moved:
    """A network that reads its condition: its input is moved by it."""

    inner: object

    path = FLOW
    module = property(lambda self: self.inner.module)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        return Prediction(x_t, t, FLOW, self.inner(x_t + cond.text[:, 0], t, cond).velocity)


def test_guidance_from_data_is_the_students_own():
    """eps - x0 is pushed away from the student's velocity under the negative condition, but for samples trained on that one."""
    student, share, w = Moved(small(end_time=True)), 0.25, 3.0
    text = Rng(8, 0, range(ROWS)).normal((1, 2), F64)
    batch = replace(data(), cond=Condition(text=text), negative=Condition(text=-0.5 * torch.ones_like(text)))
    method = MeanFlow(AverageVelocity(source="data", guidance=w, drop_condition=share, power=0.0))
    value, found = gradient(method, {"student": student}, batch=batch)
    assert method.needs == {"x0", "negative"}

    rng, law = Rng(11, 5, range(ROWS)), times.LogitNormal(-0.4, 1.0)
    first, second, instant = law.draw(rng, FLOW), law.draw(rng, FLOW), rng.uniform()
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    r = torch.where(instant < 0.5, t, r)
    z = rng.normal_like(batch.x0)
    x = (1 - t)[:, None] * batch.x0 + t[:, None] * z
    drop = (rng.uniform() < share)[:, None]
    assert 0 < drop.sum() < ROWS
    without = student(x, t, replace(batch.negative, end=t)).velocity.detach()
    v = torch.where(drop, z - batch.x0, (1 - w) * without + w * (z - batch.x0))
    cond = Condition(text=torch.where(drop[..., None], batch.negative.text, text), end=r)
    u = lambda x, t: student(x, t, cond).velocity  # noqa: E731
    change = torch.autograd.functional.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
    expected = autograd_of(student, (u(x, t) - (v - (t - r)[:, None] * change).detach()).square().mean())
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_meanflow_is_the_papers_loss(source):
    student = small(end_time=True)
    law = times.LogitNormal(-0.4, 1.0)
    method = MeanFlow(AverageVelocity(source=source, times=law, share_instant=0.3, power=0.75))
    value, found = gradient(method, {"student": student, "teacher": TEACHER})

    rng, x0 = Rng(11, 5, range(ROWS)), data().x0
    first, second, share = law.draw(rng, FLOW), law.draw(rng, FLOW), rng.uniform()
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    r = torch.where(share < 0.3, t, r)
    z = rng.normal_like(x0)
    x = (1 - t)[:, None] * x0 + t[:, None] * z
    v = z - x0 if source == "data" else TEACHER(x, t, Condition()).velocity
    u = lambda x, t: student(x, t, Condition(end=r)).velocity  # noqa: E731
    change = torch.autograd.functional.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
    target = (v - (t - r)[:, None] * change).detach()
    error = (u(x, t) - target).square().mean(1)
    expected = autograd_of(student, (error / (error.detach() + 1e-3) ** 0.75).mean())
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)


def anyflow_error(student, law, rng, x0, source):
    """AnyFlow's first stage by hand, row by row: with r < t, the log of the loss times the mean of the losses with r = t."""
    first, second, share = law.draw(rng, FLOW), law.draw(rng, FLOW), rng.uniform()
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    r = torch.where(share < 0.5, t, torch.where(share >= 0.75, torch.zeros_like(r), r))
    z = rng.normal_like(x0)
    x = (1 - t)[:, None] * x0 + t[:, None] * z
    v = z - x0 if source == "data" else TEACHER(x, t, Condition()).velocity
    u = lambda x, t: student(x, t, Condition(end=r)).velocity  # noqa: E731
    change = torch.autograd.functional.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
    error = (u(x, t) - (v - (t - r)[:, None] * change).detach()).square().mean(1)
    losses = error * t * torch.sqrt(1 - t) / (4 / 15)  # the mean of the weight is 4 / 15
    instant = [loss for loss, row in zip(losses, r == t, strict=True) if row]
    assert 0 < len(instant) < ROWS
    mean = float(sum(instant).detach()) / len(instant)
    jumps = [loss for loss, row in zip(losses, r == t, strict=True) if not row]
    return (sum(instant) + sum(mean * loss / (loss.detach() + 1e-5) for loss in jumps)) / ROWS


def rolled_out(student, noise, num_jumps, shift, choices, places):
    """Row by row: N jumps with one alone, those before and after it as one each; no jump of no length."""
    rows = []
    for x, choice, place in zip(noise, choices, places, strict=True):
        num = num_jumps[int(choice)]
        even = [1 - i / num for i in range(num + 1)]
        grid = [shift * u / (1 + (shift - 1) * u) for u in even]
        at, x = int(place * num), x[None]
        for t, r in zip(stops := sorted({1.0, grid[at], grid[at + 1], 0.0}, reverse=True), stops[1:]):
            t, r = (torch.tensor([time], dtype=F64) for time in (t, r))
            x = x - (t - r)[:, None] * student(x, t, Condition(end=r)).velocity
        rows.append(x)
    return torch.cat(rows)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_both_stages_of_a_flow_map_are_anyflows(source):
    """The first by the identity; the second adds DMD2's term at the end of each row's own roll-out, and a critic of it."""
    student, critic = small(end_time=True), small()
    law, around, jumps = times.Shifted(shift=3.0), times.Shifted(shift=2.0), (1, 2, 5)
    velocity = AverageVelocity(source=source, times=law, share_whole=0.25, derivative=Jvp(), weighting="anyflow")
    nets = {"student": student, "teacher": TEACHER}
    value, found = gradient(FlowMap(velocity), nets)
    expected = autograd_of(student, anyflow_error(student, law, Rng(11, 5, range(ROWS)), data().x0, source))
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)

    nets["critic"] = critic
    matching = OnPolicy(num_jumps=jumps, velocity_weight=0.3, times=around)
    method = FlowMap(velocity, matching, shift=3.0)
    value, found = gradient(method, nets, turn_step=0)
    rng, x0 = Rng(11, 5, range(ROWS)), data().x0
    first = 0.3 * anyflow_error(student, law, rng, x0, source)
    drawn = (rng.uniform() * len(jumps), rng.uniform())
    sample = rolled_out(student, rng.normal_like(x0), jumps, 3.0, *drawn)
    t = around.draw(rng, FLOW)
    x_t = ((1 - t)[:, None] * sample + t[:, None] * rng.normal_like(x0)).detach()
    real, fake = (network(x_t, t, Condition()).x0.detach() for network in (TEACHER, critic))
    scale = (sample.detach() - real).abs().mean(1, keepdim=True)
    pull = (fake - real) / scale
    # The surrogate's value is half the mean square of the pull; its gradient is the pull's.
    second = (pull * sample).mean()
    expected = autograd_of(student, first + second)
    assert value == pytest.approx(float(first.detach()) + 0.5 * float(pull.square().mean()), rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)

    value, found = gradient(method, nets, turn_step=1, of="critic")
    rng = Rng(11, 5, range(ROWS))
    drawn = (rng.uniform() * len(jumps), rng.uniform())
    sample = rolled_out(student, rng.normal_like(x0), jumps, 3.0, *drawn).detach()
    t, eps = around.draw(rng, FLOW), rng.normal_like(x0)
    answer = critic((1 - t)[:, None] * sample + t[:, None] * eps, t, Condition()).velocity
    expected = autograd_of(critic, (answer - (eps - sample)).square().mean())
    assert value == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)


def test_rcm_is_both_terms_of_one_turn():
    """Its gradient is the sum of sCM's and DMD2's, each computed alone with the draws it has in the whole."""
    student, critic = small(), small()
    term = TangentTerm(tangent=Tangent(warmup_iters=4, scales="state", norm="l2"), reduction="sum", weight=100.0)
    dmd = DMD2(student=StudentSample((math.pi / 2, 1.1)), path=TRIG, student_update_freq=2, reduction="sum")
    nets = {"student": student, "teacher": TEACHER, "critic": critic}
    value, found = gradient(RCM(term, dmd), nets, turn_step=4)

    student.module.zero_grad()
    rng, total = Rng(11, 5, range(ROWS)), 0.0
    for terms in (term(2, Nets(nets), data(), rng), *dmd.losses(dmd.turn(4), Nets(nets), data(), rng)):
        terms.total.backward()
        total += float(terms.total.detach())
    expected = torch.cat([p.grad.flatten() for p in student.module.parameters()])
    assert value == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert [RCM(term, dmd).turn(step).name for step in range(4)] == ["student", "critic"] * 2


# --- stationary at the truth -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faulty:
    """A derivative with a planted fault."""

    is_exact = True
    factor: float

    def along(self, function, inputs, direction, room=None):
        return self.factor * Jvp().along(function, inputs, direction, room)


def continuous(derivative):
    return SCM(TangentTerm(tangent=Tangent(warmup_iters=0), derivative=derivative))


def average(derivative):
    return MeanFlow(AverageVelocity(share_instant=0.3, derivative=derivative))


MAP = AverageVelocity(share_whole=0.25, derivative=Jvp())
STATIONARY = {
    "scm": continuous(Jvp()),
    "scm, not normalised": SCM(TangentTerm(tangent=Tangent(warmup_iters=0, constant=0.0, scales="state"))),
    "rcm": RCM(continuous(Jvp()).consistency, DMD2(student=StudentSample((math.pi / 2, 1.1)), path=TRIG)),
    "meanflow": average(Jvp()),
    "meanflow, difference": average(Difference(step=1e-4)),
    "flow_map": FlowMap(MAP),
    "flow_map on policy": FlowMap(MAP, OnPolicy()),
}


@pytest.mark.parametrize("method", [v for k, v in STATIONARY.items() if "not normalised" not in k], ids=lambda m: m.kind)
def test_the_true_function_is_a_stationary_point(method):
    """The identity holds at the truth, so that its loss has no gradient in either wrong direction."""
    value, found = gradient(method, {"student": TrueMap(), "teacher": TEACHER, "critic": TEACHER})
    assert float(found.norm()) < 1e-6 and value < 1e-6


def test_the_discrete_loss_is_stationary_where_its_step_is_short():
    """Each Euler step errs by its square; with 1 / (t - r) the gradient vanishes with the step."""
    norms = []
    for num in (200, 800):
        method = Consistency(schedule=Grid(num=num, shift=1.0), huber=0.1, weighting="gap", path=FLOW)
        norms.append(float(gradient(method, {"student": TrueMap(), "teacher": TEACHER})[1].norm()))
    assert norms[1] < 0.4 * norms[0] < 0.05


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5], ids=["zero", "sign", "factor"])
@pytest.mark.parametrize("make", [continuous, average], ids=["scm", "meanflow"])
def test_a_wrong_derivative_moves_the_truth(make, factor):
    _, found = gradient(make(Faulty(factor)), {"student": TrueMap(), "teacher": TEACHER})
    assert float(found.norm()) > 1e-3


# --- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 5])
def test_jumps_of_the_true_map_are_exact_for_any_number_of_steps(num):
    sampler = MeanFlow().sampler(FLOW).with_steps(num)
    noise = Rng(2, 0, range(16)).normal((2,), F64)
    made = sampler(TrueMap(), noise, Condition(), Rng(3, 0, range(16)))
    torch.testing.assert_close(made, TEACHER.ode_map(noise, torch.ones(16, dtype=F64)), rtol=1e-10, atol=1e-10)


def test_other_students_keep_their_number_of_steps():
    with pytest.raises(UserError, match="takes 2 steps"):
        StudentSampler((1.0, 0.5), FLOW).with_steps(4)


def test_a_flow_map_starts_as_the_network_it_is_made_from():
    """At r = t, and with r left out, the answer is that of the network without a second time."""
    plain, mapped = TinySpec(width=8, depth=1).build(), TinySpec(width=8, depth=1, end_time=True).build()
    mapped.module.load_state_dict(mapped.own_weights(plain.module.state_dict()))
    x, t = torch.randn(5, 2), torch.rand(5, dtype=F64)
    expected = plain(x, t, Condition()).velocity
    torch.testing.assert_close(mapped(x, t, Condition(end=t)).velocity, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapped(x, t, Condition()).velocity, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for p in mapped.module.end.parameters():
            p.add_(0.3)
    assert not torch.allclose(mapped(x, t, Condition(end=0 * t)).velocity, expected, atol=1e-3)


def test_the_end_of_a_jump_is_converted_with_the_path():
    student = TrueMap(TRIG)
    x, t, r = torch.randn(6, 2, dtype=F64), torch.full((6,), 0.8, dtype=F64), torch.full((6,), 0.3, dtype=F64)
    seen = {}

    class Records(TrueMap):
        def __call__(self, x_t, t, cond, *, taps=(), cache=None):
            seen.update(t=t, end=cond.end)
            return super().__call__(x_t, t, replace(cond, end=None))

    on_path(Records(TRIG), FLOW)(x, t, Condition(end=r))
    for name, value in (("t", t), ("end", r)):
        a, s, _, _ = FLOW.coefficients(value)
        torch.testing.assert_close(seen[name], TRIG.time_of(s / a))
    assert student.path == TRIG
