"""KD: what the student is shown, and which state belongs to which time."""

import math

import pytest
import torch

from fewstep.batch import Batch, Condition
from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, Rng, TrigFlow
from fewstep.diffusion.sampling import student_times
from fewstep.methods import KD, Nets
from fewstep.networks.analytic import GaussianMixture

F64 = torch.float64
FLOW_LIST = (1.0, 0.9375, 0.8333333333333334, 0.625)
TRIG_LIST = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Probe:
    def __init__(self, path, gain=0.5):
        self.path, self.calls = path, []
        self.gain = torch.tensor(gain, dtype=F64, requires_grad=True)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        self.calls.append((x_t, t, cond))
        return Prediction.of("x0", self.gain * torch.tanh(x_t), x_t, t, self.path)


class OdeStudent:
    """The perfect student: the teacher's own ODE, in closed form."""

    def __init__(self, teacher):
        self.teacher, self.path = teacher, teacher.path

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        return Prediction.of("x0", self.teacher.ode_map(x_t, t), x_t, t, self.path)


def loss_of(method, net, batch, seed=1, step=0):
    (terms,) = method.losses(method.turn(0), Nets({"student": net}), batch, Rng(seed, step, range(batch.size())))
    assert set(terms.values) == {"kd"}
    return terms.total


@pytest.mark.parametrize("path, scale", [(EDM(), 80.0), (RectifiedFlow(), 1.0), (TrigFlow(0.5), 1.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "half_mean", "sum"])
def test_one_step_is_shown_pure_noise_of_the_right_size(path, scale, reduction):
    """cosmos.md 1.3: 1/2 mean (G(80 noise) - x0)^2."""
    noise, x0, net = normal(6, 3), normal(6, 3, seed=1), Probe(path)
    loss = loss_of(KD(t_list=(path.t_max,), reduction=reduction), net, Batch(x0=x0, noise=noise))
    x_t, t, _ = net.calls[0]
    torch.testing.assert_close(x_t, scale * noise, rtol=1e-14, atol=0)
    assert bool((t == path.t_max).all()) and t.dtype == F64
    error = (0.5 * torch.tanh(scale * noise) - x0) ** 2
    want = {"mean": error.mean(), "half_mean": error.mean() / 2, "sum": error.sum(1).mean()}[reduction]
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)


def test_one_step_at_a_time_that_is_not_noise_is_refused():
    """The time of a flow, put on EDM."""
    with pytest.raises(ValueError, match=r"t = 1 is not pure noise on EDM.*80"):
        loss_of(KD(t_list=(1.0,)), Probe(EDM()), Batch(x0=normal(2, 3), noise=normal(2, 3)))


def states(path, teacher, x, times):
    """The exact ODE's states at `times` (B, K): every axis keeps its place in units of its spread."""
    mean, std = teacher.means[0], teacher.stds[0]
    x0 = teacher.ode_map(x, torch.full((len(x),), path.t_max, dtype=F64))
    a, s, _, _ = (c[..., None] for c in path.coefficients(times))
    return x0, a * mean + torch.sqrt(a**2 * std**2 + s**2) * ((x0 - mean) / std)[:, None]


@pytest.mark.parametrize(
    "path, t_list", [(RectifiedFlow(), FLOW_LIST), (TrigFlow(), TRIG_LIST), (EDM(), (80.0, 5.0, 1.0))], ids=str
)
def test_the_exact_map_has_no_loss_and_permuted_pairs_have(path, t_list):
    """cosmos.md A.5.2."""
    teacher = GaussianMixture([[0.5, -1.0]], [0.7], path=path)
    noise = normal(8, 2)
    start = path.coefficients(torch.tensor(path.t_max))[1] * noise
    stored = torch.tensor(t_list, dtype=F64).expand(8, -1)
    x0, on_path = states(path, teacher, start, stored)
    shuffled = x0.roll(1, 0)
    one, more = KD(t_list=t_list[:1]), KD(student_sample_steps=len(t_list), t_list=t_list)
    for method, batch in (
        (one, Batch(x0=x0, noise=noise)),
        (more, Batch(x0=x0, path=on_path, path_times=stored)),
    ):
        assert float(loss_of(method, OdeStudent(teacher), batch)) < 1e-20
        assert float(loss_of(method, OdeStudent(teacher), Batch(**{**vars(batch), "x0": shuffled}))) > 0.05


def test_the_state_is_looked_up_by_its_time_in_any_order():
    """Each row's states in another order, and more of them than the student uses."""
    rows, kept = 400, (0.3, 1.0, 0.8333333333333334, 0.9375, 0.1, 0.625)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(rows)])
    path_times = torch.tensor(kept, dtype=F64)[order]
    path = path_times[..., None] * torch.arange(1, rows + 1)[:, None, None]  # a state that tells row and time
    net = Probe(RectifiedFlow())
    batch = Batch(x0=normal(rows, 1), path=path, path_times=path_times.float())
    loss_of(KD(student_sample_steps=4, t_list=FLOW_LIST), net, batch)
    x_t, t, _ = net.calls[0]
    assert set(t.tolist()) == set(FLOW_LIST)  # the student's own time, not the rounded one of the file
    torch.testing.assert_close(x_t[:, 0], t * torch.arange(1, rows + 1), rtol=1e-12, atol=0)
    counts = torch.tensor([int((t == value).sum()) for value in FLOW_LIST])
    assert int(counts.min()) > 60  # each about a hundred times


@pytest.mark.parametrize("steps", [2, 4])
def test_a_list_that_does_not_align_is_refused_with_both_lists(steps):
    """FastGen picks by place; here 0.9 has no state, whatever its place."""
    path_times = torch.tensor(FLOW_LIST, dtype=F64).repeat(3, 1)
    batch = Batch(x0=normal(3, 2), path=normal(3, 4, 2), path_times=path_times)
    method = KD(student_sample_steps=steps, t_list=(1.0, 0.9, 0.8, 0.5)[:steps])
    with pytest.raises(ValueError) as refusal:
        loss_of(method, Probe(RectifiedFlow()), batch)
    assert "1.0, 0.9" in str(refusal.value) and "[1.0, 0.9375, 0.833333, 0.625]" in str(refusal.value)


def test_the_row_that_does_not_align_is_the_one_that_is_shown():
    path_times = torch.tensor(FLOW_LIST, dtype=F64).repeat(3, 1)
    path_times[2] = torch.tensor([0.9, 0.7, 0.5, 0.3])
    batch = Batch(x0=normal(3, 2), path=normal(3, 4, 2), path_times=path_times)
    with pytest.raises(ValueError, match=r"\[0\.9, 0\.7, 0\.5, 0\.3\] \(row 2"):
        loss_of(KD(student_sample_steps=4, t_list=FLOW_LIST), Probe(RectifiedFlow()), batch)


def test_on_another_path_than_the_networks_own():
    """t_list and the stored states are in the time of `path`; the network is asked in its own."""
    teacher = GaussianMixture([[0.5, -1.0]], [0.7], path=TrigFlow())
    stored = torch.tensor(TRIG_LIST, dtype=F64).expand(8, -1)
    x0, on_trig = states(TrigFlow(), teacher, normal(8, 2), stored)
    method = KD(student_sample_steps=4, t_list=TRIG_LIST, path=TrigFlow())
    student = OdeStudent(teacher.on(RectifiedFlow()))
    assert float(loss_of(method, student, Batch(x0=x0, path=on_trig, path_times=stored))) < 1e-20
    assert method.sampler(RectifiedFlow()).path == TrigFlow() and method.sampler(RectifiedFlow()).times == TRIG_LIST


def test_conditioning_frames_contribute_exactly_nothing():
    noise, x0 = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=1)
    cond = Condition(frames=x0, frame_mask=torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
    given = cond.frame_mask.bool()[:, None, :, None, None].expand_as(x0)
    found = []
    for target in (x0, torch.where(given, 99.0, x0)):
        net = Probe(RectifiedFlow())
        loss = loss_of(KD(), net, Batch(x0=target, noise=noise, cond=cond))
        found.append((loss, torch.autograd.grad(loss, net.gain)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]) and float(found[0][0].detach()) > 0


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_perfect_student_sampled_as_the_method_says_gives_the_data(num_steps):
    """Fresh noise on x0 ~ data has the law of x_t, from which the student's map leads back to the data."""
    teacher, rows = GaussianMixture([[0.5, -1.0]], [0.7]), 20000
    t_list = FLOW_LIST[:num_steps]

    def spread(method):
        rng = Rng(1, rows=range(rows))
        made = method.sampler(RectifiedFlow())(OdeStudent(teacher), rng.normal((2,), F64), Condition(), rng)
        torch.testing.assert_close(made.mean(0), teacher.means[0], rtol=0, atol=4 * 0.7 / rows**0.5)
        return made.std(0)

    method = KD(student_sample_steps=num_steps, t_list=t_list)
    torch.testing.assert_close(spread(method), torch.full((2,), 0.7, dtype=F64), rtol=0.02, atol=0)
    if num_steps == 4:  # a DDIM step with the END of the ODE as x0 leaves the curve: 0.94 where 0.7 is right
        off = spread(KD(student_sample_steps=4, t_list=t_list, renoise="ode"))
        assert float(off.min()) > 0.9


def test_needs_and_problems():
    assert KD().needs == {"x0", "noise"}
    assert KD(student_sample_steps=4, t_list=FLOW_LIST).needs == {"x0", "path", "path_times"}
    assert [key for key, _ in KD(student_sample_steps=4, t_list=(1.0,)).problems()] == ["t_list"]
    assert [key for key, _ in KD(student_sample_steps=0, shift=0.0).problems()] == ["student_sample_steps", "shift"]
    assert [key for key, _ in KD(student_sample_steps=2, t_list=(0.5, 1.0)).problems()] == ["t_list"]
    assert [key for key, _ in KD(student_sample_steps=2, t_list=(1.0, 0.0)).problems()] == ["t_list"]
    assert not list(KD(student_sample_steps=4, t_list=FLOW_LIST).problems())


def test_times_of_a_number_of_steps_are_those_of_its_pairs():
    """s u / (1 + (s - 1) u) written out; on EDM from sigma 80; the same as `pairs --path-times N`, so that states align."""
    flow = KD(student_sample_steps=4, shift=5.0).sampler(RectifiedFlow())
    assert flow.times == pytest.approx([1.0, 15 / 16, 5 / 6, 5 / 8], rel=0, abs=1e-15)
    assert KD(student_sample_steps=4, shift=3.0).times_on(RectifiedFlow()) == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-15)
    assert KD().times_on(EDM()) == (80.0,) and KD().times_on(RectifiedFlow()) == (1.0,) and KD().times_on(VP()) == (1.0,)
    for path in (RectifiedFlow(), EDM(), VP("linear")):
        assert KD(student_sample_steps=4).times_on(path) == student_times(4, path, 5.0)


def test_conditioning_frames_are_shown_clean_and_asked_of_nobody():
    """Transfer1 shows 0, 1 or 2 of the clip's own frames; what is given is no part of the mean."""
    noise, x0, net = normal(4, 2, 3, 2, 2), normal(4, 2, 3, 2, 2, seed=1), Probe(EDM())
    loss = loss_of(KD(t_list=(80.0,), first_frames=(0.0, 0.0, 1.0)), net, Batch(x0=x0, noise=noise))
    cond = net.calls[0][2]
    assert torch.equal(cond.frames, x0) and cond.frame_mask.tolist() == [[1, 1, 0]] * 4
    error = (0.5 * torch.tanh(80 * noise) - x0)[:, :, 2:] ** 2
    torch.testing.assert_close(loss, error.mean() / 2, rtol=1e-9, atol=0)
    shown = set()
    for step in range(8):
        loss_of(KD(t_list=(80.0,), first_frames=(1 / 3, 1 / 3, 1 / 3)), net, Batch(x0=x0, noise=noise), step=step)
        shown |= set(net.calls[-1][2].frame_mask.sum(1).tolist())
    assert shown == {0, 1, 2}
    assert [key for key, text in KD(first_frames=(0.5,)).problems() if "must sum to 1" in text] == ["first_frames"]
