"""DMD2: its gradient by autograd, its critic by hand, its turns, and what no graph may be kept of."""

import math

import pytest
import scipy.stats
import torch

from fewstep.batch import Batch, Condition
from fewstep.config import ConfigError, check
from fewstep.diffusion import EDM, VP, Prediction, RectifiedFlow, Rng, TrigFlow, rollout, times
from fewstep.diffusion.rollout import start
from fewstep.methods import DMD2, Critic, Nets, Normalizer, StudentSample, Turn, Warmup
from fewstep.methods.dmd2 import surrogate
from fewstep.networks.analytic import GaussianMixture
from fewstep.networks.tiny import TinySpec

F64 = torch.float64
TRIG_LIST = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))
LISTS = {RectifiedFlow(): (1.0, 0.9375, 0.8333333333333334, 0.625), TrigFlow(): TRIG_LIST, EDM(): (80.0, 15.0, 5.0, 5 / 3)}
STUDENT, CRITIC = Turn("student", ("student",)), Turn("critic", ("critic",))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Probe:
    """x0 = gain a x_t / (a^2 + s^2) + 0.1, and a record of every call."""

    def __init__(self, path, gain=0.7):
        self.path, self.calls = path, []
        self.gain = torch.tensor(gain, dtype=F64, requires_grad=True)

    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        a, s, _, _ = (c.reshape(-1, *[1] * (x_t.ndim - 1)) for c in self.path.coefficients(t))
        answer = Prediction.of("x0", self.gain * a * x_t / (a**2 + s**2) + 0.1, x_t, t, self.path)
        self.calls.append((x_t, t, cond, answer.x0.detach(), torch.is_grad_enabled()))
        return answer


def nets(path, critic=0.5, teacher=0.9):
    return Nets({"student": Probe(path), "critic": Probe(path, critic), "teacher": Probe(path, teacher)})


def terms(method, turn, networks, batch, seed=1, step=0, rows=None):
    rng = Rng(seed, step, range(batch.size()) if rows is None else rows)
    (found,) = method.losses(turn, networks, batch, rng)
    return found


# --- the gradient -----------------------------------------------------------------------------------------------------


def vsd(sample, critic, teacher, mask, reduction):
    """The loss of `sample`, and the gradient it stands for."""
    with torch.no_grad():
        gradient = Normalizer()(critic - teacher, sample, teacher, mask)
    return surrogate(sample, gradient, mask, reduction), gradient


def by_autograd(sample, critic, teacher, mask, reduction):
    sample = sample.clone().requires_grad_()
    loss, gradient = vsd(sample, critic, teacher, mask, reduction)
    return torch.autograd.grad(loss, sample)[0], gradient


def test_the_gradient_is_w_times_critic_minus_teacher_over_n():
    """Yin et al. 2024, eq. 7-8: w = 1 / mean|x - x0_teacher|, one per sample; N all elements."""
    sample, critic, teacher = (normal(4, 3, 2, 2, 2, seed=i) for i in range(3))
    w = 1 / (sample - teacher).abs().mean((1, 2, 3, 4), keepdim=True)
    want = w * (critic - teacher)
    for reduction, factor in (("half_mean", 1 / sample.numel()), ("mean", 2 / sample.numel()), ("sum", 2 / 4)):
        found, gradient = by_autograd(sample, critic, teacher, None, reduction)
        torch.testing.assert_close(found, want * factor, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["half_mean", "mean", "sum"])
def test_the_gradient_is_exactly_zero_when_critic_is_teacher(reduction):
    sample, teacher = normal(4, 3), normal(4, 3, seed=1)
    found, gradient = by_autograd(sample, teacher, teacher.clone(), None, reduction)
    assert not found.any() and not gradient.any()


def test_the_normaliser_is_that_of_transfer1():
    """cosmos.md 1.4: s = -eps/sigma, w = sigma / mean|eps' - eps_T|, grad = w (s_fake - s_teacher), on x + sigma eps'."""
    x, eps, sigma = normal(5, 6), normal(5, 6, seed=1), torch.tensor([0.1, 0.5, 2.0, 10.0, 80.0], dtype=F64)[:, None]
    x_t = x + sigma * eps
    fake, teacher = x + normal(5, 6, seed=2), x + normal(5, 6, seed=3)
    eps_fake, eps_teacher = (x_t - fake) / sigma, (x_t - teacher) / sigma
    w = sigma / (eps - eps_teacher).abs().mean(1, keepdim=True)
    want = w * (-eps_fake / sigma + eps_teacher / sigma)
    _, gradient = by_autograd(x, fake, teacher, None, "half_mean")
    torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-8)


def test_conditioning_frames_have_exactly_no_gradient_and_do_not_weigh():
    """cosmos.md 2.3: the weight is the mean over the frames that are not given."""
    sample, critic, teacher = (normal(2, 3, 4, 2, 2, seed=i) for i in range(3))
    frame_mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]])
    free = (1 - frame_mask.double())[:, None, :, None, None]
    found, gradient = by_autograd(sample, critic, teacher, free, "half_mean")
    given = frame_mask.bool()[:, None, :, None, None].expand_as(sample)
    assert not found[given].any() and not gradient[given].any()
    for row, frames in ((0, [1, 2, 3]), (1, [2])):
        part = [tensor[row][:, frames] for tensor in (sample, critic, teacher)]
        w = 1 / (part[0] - part[2]).abs().mean()
        torch.testing.assert_close(found[row][:, frames], w * (part[1] - part[2]) / part[0].numel() / 2)
    noisy = torch.where(given, 99.0, sample)
    assert torch.equal(by_autograd(noisy, critic, teacher, free, "half_mean")[0], found)
    everything, _ = by_autograd(sample, critic, teacher, torch.zeros_like(free), "half_mean")
    assert not everything.any()


def test_a_sample_that_is_the_teachers_answer_does_not_explode():
    sample = normal(2, 3)
    found, _ = by_autograd(sample, sample + 1e-9, sample.clone(), None, "half_mean")
    assert bool(torch.isfinite(found).all()) and float(found.abs().max()) < 1e-3


# --- the student's turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LISTS, ids=str)
@pytest.mark.parametrize("exit_step", ["random", "last"])
def test_the_students_turn_by_hand(path, exit_step):
    """From the records of the three networks: same x_t and t for critic and teacher, the loss and gradient written out."""
    networks = nets(path)
    method = DMD2(student=StudentSample(LISTS[path], exit_step=exit_step), times=times.Shifted(shift=5.0, low=0.05, high=0.95))
    found = terms(method, STUDENT, networks, Batch(x0=normal(64, 3)))
    student, critic, teacher = networks.student.calls, networks.critic.calls, networks.teacher.calls
    assert (
        len(critic) == len(teacher) == 1
        and torch.equal(critic[0][0], teacher[0][0])
        and torch.equal(critic[0][1], teacher[0][1])
    )
    sample, (x_t, t) = student[-1][3], critic[0][:2]
    a, s, _, _ = (c[:, None] for c in path.coefficients(t))
    eps = (x_t - a * sample) / s
    assert scipy.stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3  # fresh unit noise on the student's own sample
    first = student[0][0] / path.coefficients(torch.tensor(path.t_max))[1]
    assert scipy.stats.kstest(first.flatten().numpy(), "norm").pvalue > 1e-3  # which began as pure noise
    assert abs(float(torch.corrcoef(torch.stack([eps.flatten(), first.flatten()]))[0, 1])) < 0.25
    gradient = (critic[0][3] - teacher[0][3]) / (sample - teacher[0][3]).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.watch["vsd_gradient"], gradient.abs().mean(), rtol=1e-8, atol=0)
    (by_gain,) = torch.autograd.grad(found.total, networks.student.gain)
    torch.testing.assert_close(by_gain, (gradient / gradient.numel() * (sample - 0.1) / 0.7).sum(), rtol=1e-7, atol=1e-12)


def test_guidance_is_on_the_teacher_alone():
    mixture = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6], labels=[0, 1])
    batch = Batch(x0=normal(8, 2), cond=Condition(label=torch.arange(8) % 2), negative=Condition(label=-torch.ones(8).long()))
    seen = {}

    class Recording(Probe):
        def __call__(self, x_t, t, cond, **more):
            seen.update(x=x_t, t=t, label=cond.label)
            return super().__call__(x_t, t, cond, **more)

    student, critic = Probe(RectifiedFlow()), Recording(RectifiedFlow(), 0.5)
    found = terms(DMD2(guidance=4.0), STUDENT, Nets({"student": student, "critic": critic, "teacher": mixture}), batch)
    x_t, t, sample, fake = seen["x"], seen["t"], student.calls[-1][3], critic.calls[0][3]
    assert len(x_t) == 8 and torch.equal(seen["label"], batch.cond.label)  # the critic is not guided
    c, u = mixture(x_t, t, batch.cond).x0, mixture(x_t, t, batch.negative).x0
    teacher = c + 3.0 * (c - u)  # Predict2.5: g = 3 is w = 4
    gradient = (fake - teacher) / (sample - teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found.total.detach(), 0.5 * (gradient**2).mean(), rtol=1e-8, atol=0)
    assert DMD2(guidance=4.0).needs == {"x0", "negative"} and DMD2().needs == {"x0"}
    with pytest.raises(ValueError, match="needs a negative"):
        terms(
            DMD2(guidance=4.0),
            STUDENT,
            Nets({"student": student, "critic": critic, "teacher": mixture}),
            Batch(x0=normal(8, 2)),
        )


@pytest.mark.parametrize("turn", [STUDENT, CRITIC], ids=["student", "critic"])
@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
def test_real_data_is_never_passed_off_as_a_roll_out(turn, renoise):
    """x0 gives the shape and nothing else: not even a NaN in it is seen."""
    method = DMD2(student=StudentSample(renoise=renoise))
    found = [
        terms(method, turn, nets(RectifiedFlow()), Batch(x0=x0)).total
        for x0 in (normal(4, 3), torch.full((4, 3), math.nan).double())
    ]
    assert torch.equal(found[0], found[1]) and bool(torch.isfinite(found[0]))


@pytest.mark.parametrize("renoise", ["fresh", "same", "ode"])
def test_only_the_last_call_of_the_student_is_trained(renoise):
    for step in range(12):
        networks = nets(RectifiedFlow())
        terms(DMD2(student=StudentSample(renoise=renoise)), STUDENT, networks, Batch(x0=normal(2, 3)), step=step)
        grads = [call[4] for call in networks.student.calls]
        assert grads == [False] * (len(grads) - 1) + [True]
        assert not networks.critic.calls[0][4] and not networks.teacher.calls[0][4]


def test_the_exit_step_is_shared_by_all_rows_and_ranks_and_even():
    method, counts = DMD2(), []
    for step in range(60):
        calls = set()
        for rows in (range(4), range(4, 8), range(100, 102)):  # three ranks
            for turn in (STUDENT, CRITIC):
                networks = nets(RectifiedFlow())
                terms(method, turn, networks, Batch(x0=normal(len(rows), 1)), step=step, rows=rows)
                calls.add(len(networks.student.calls))
        assert len(calls) == 1
        counts += calls
    found = torch.bincount(torch.tensor(counts), minlength=5)[1:]
    assert scipy.stats.chisquare(found.numpy()).pvalue > 1e-3
    networks = nets(RectifiedFlow())
    terms(DMD2(student=StudentSample(exit_step="last")), STUDENT, networks, Batch(x0=normal(2, 1)))
    assert len(networks.student.calls) == 4


def test_a_row_does_not_depend_on_its_batch():
    """Two halves of a batch, as two ranks or two micro-batches, have the mean loss of the whole."""
    method = DMD2()
    for turn in (STUDENT, CRITIC):
        whole = terms(method, turn, nets(RectifiedFlow()), Batch(x0=normal(8, 3))).total
        parts = [
            terms(method, turn, nets(RectifiedFlow()), Batch(x0=normal(4, 3)), rows=rows).total
            for rows in (range(4), range(4, 8))
        ]
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


def networks_to_train(frames=None):
    spec = TinySpec("dit", channels=3, width=12, depth=2, num_heads=2)
    found = {}
    for seed, role in enumerate(("student", "critic", "teacher")):
        torch.manual_seed(seed)
        found[role] = spec.build()
        for parameter in found[role].module.parameters():  # blocks start as the identity; wake them
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def saved(run):
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sizes


@pytest.mark.parametrize("path", [None, TrigFlow()], ids=str)
def test_no_graph_of_teacher_or_critic_is_kept_in_the_students_turn(path):
    """What autograd saves is what the student's last call and the loss need; nothing else gets a gradient."""
    roles = networks_to_train()
    t_list = LISTS[path or RectifiedFlow()]
    method, batch = DMD2(path=path, student=StudentSample(t_list, exit_step="last")), Batch(x0=normal(2, 3, 2, 2, 2).float())
    found, kept = saved(lambda: terms(method, STUDENT, Nets(roles), batch))
    found.total.backward()
    for role in ("teacher", "critic"):
        assert all(parameter.grad is None for parameter in roles[role].module.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in roles["student"].module.parameters())

    def alone():
        from fewstep.diffusion import on_path

        student, rng = on_path(roles["student"], path or RectifiedFlow()), Rng(1, 0, range(2))
        x = start(student.path, rng.normal_like(batch.x0), t_list[0])
        sample = rollout(student, x, t_list, Condition(), rng=rng, with_grad=True).x0
        return vsd(sample, torch.zeros_like(sample), torch.ones_like(sample), None, "half_mean")

    _, kept_alone = saved(alone)
    assert len(kept) == len(kept_alone) > 10 and sorted(kept) == sorted(kept_alone)


def test_the_critics_turn_trains_the_critic_alone():
    roles = networks_to_train()
    terms(DMD2(), CRITIC, Nets(roles), Batch(x0=normal(2, 3, 2, 2, 2).float())).total.backward()
    for role, trained in (("student", False), ("teacher", False), ("critic", True)):
        assert any(parameter.grad is not None for parameter in roles[role].module.parameters()) is trained


def test_conditioning_frames_end_to_end():
    """A network that keeps its given frames: their x0 moves no loss, and the gradient to the sample is exactly 0 there."""
    roles = networks_to_train()
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    frames = normal(2, 3, 3, 2, 2).float()
    for turn in (STUDENT, CRITIC):
        found = []
        for noise_there in (0.0, 100.0):  # what is under a mask that is 0 must not matter either
            junk = torch.where(mask.bool()[:, None, :, None, None], frames, frames + noise_there)
            batch = Batch(x0=frames, cond=Condition(frames=junk, frame_mask=mask))
            found.append(terms(DMD2(), turn, Nets(roles), batch).total.detach())
        assert torch.equal(found[0], found[1]) and bool(torch.isfinite(found[0]))


# --- the critic's turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*LISTS, VP(zero_terminal_snr=True)], ids=str)
@pytest.mark.parametrize("space", ["x0", "eps", "velocity"])
def test_the_critics_loss_by_hand(path, space):
    networks = nets(path)
    law = times.Shifted(shift=2.0, low=0.1, high=0.9)
    method = DMD2(student=StudentSample((path.t_max,)), critic=Critic(space, times=law))
    found = terms(method, CRITIC, networks, Batch(x0=normal(16, 3)))
    sample, (x_t, t, _, made, _) = networks.student.calls[-1][3], networks.critic.calls[0]
    assert not networks.teacher.calls and not networks.student.calls[-1][4]
    a, s, da, ds = (c[:, None] for c in path.coefficients(t))
    eps, made_eps = (x_t - a * sample) / s, (x_t - a * made) / s
    error = {"x0": made - sample, "eps": made_eps - eps, "velocity": da * (made - sample) + ds * (made_eps - eps)}[space]
    torch.testing.assert_close(found.total.detach(), (error**2).mean(), rtol=1e-7, atol=0)
    u = RectifiedFlow().time_of(s / a)
    assert float(u.min()) > 2 * 0.1 / 1.1 - 1e-9 and float(u.max()) < 2 * 0.9 / 1.9 + 1e-9


def test_predict_2_5_is_the_velocity_form_on_trigflow():
    """cosmos.md 2.3: mean((G - x0)^2 / sin^2 t). On TrigFlow F = (cos t x_t - x0) / sin t, so that is the error of F."""
    networks = nets(TrigFlow())
    method = DMD2(student=StudentSample(TRIG_LIST), critic=Critic("velocity"), times=times.Shifted(shift=5.0))
    found = terms(method, CRITIC, networks, Batch(x0=normal(16, 3)))
    sample, (_, t, _, made, _) = networks.student.calls[-1][3], networks.critic.calls[0]
    want = ((sample - made) ** 2 / t.sin()[:, None] ** 2).mean()
    torch.testing.assert_close(found.total.detach(), want, rtol=1e-7, atol=0)
    eps_form = terms(
        DMD2(student=StudentSample(TRIG_LIST), critic=Critic("eps")), CRITIC, nets(TrigFlow()), Batch(x0=normal(16, 3))
    )
    assert float(eps_form.total.detach()) != pytest.approx(float(want), rel=0.1)  # that would be / tan^2 t


def test_transfer1_is_the_eps_form_on_edm():
    """cosmos.md 1.4: mean(eps' - eps_fake)^2, which is (G - x0)^2 / sigma^2."""
    networks = nets(EDM())
    method = DMD2(student=StudentSample((80.0,)), critic=Critic("eps"), times=times.KarrasIndex(scale=4.0))
    found = terms(method, CRITIC, networks, Batch(x0=normal(16, 3)))
    sample, (_, t, _, made, _) = networks.student.calls[-1][3], networks.critic.calls[0]
    torch.testing.assert_close(found.total.detach(), ((sample - made) ** 2 / t[:, None] ** 2).mean(), rtol=1e-6, atol=0)


# --- turns and settings -----------------------------------------------------------------------------------------------


def turns(method, num=16):
    return "".join(method.turn(step).name[0] for step in range(num))


def test_turn_tables():
    """cosmos.md 1.4, 2.3 and A.5.4: iterations 0, 5, 10, .. are the student's, with a warm-up of 1 too."""
    assert turns(DMD2()) == "sccccsccccsccccs"
    assert turns(DMD2(warmup=Warmup(1, "student"))) == "sccccsccccsccccs"
    assert turns(DMD2(warmup=Warmup(7, "student"))) == "sssssssccc" + "sccccs"
    assert turns(DMD2(warmup=Warmup(7, "critic"))) == "cccccccccc" + "sccccs"
    assert turns(DMD2(warmup=Warmup(1, "critic"))) == "cccccsccccsccccs"
    assert turns(DMD2(student_update_freq=2), 6) == "scscsc"
    assert turns(DMD2(student_update_freq=1), 4) == "ssss"
    for step in range(8):
        turn = DMD2().turn(step)
        assert turn.trains == (turn.name,)


def test_a_list_for_another_path_is_refused():
    with pytest.raises(ValueError, match="not pure noise on EDM"):
        terms(DMD2(), STUDENT, nets(EDM()), Batch(x0=normal(2, 3)))


def test_its_sampler_is_its_roll_out():
    sampler = DMD2(path=TrigFlow(), student=StudentSample(TRIG_LIST, "same")).sampler(RectifiedFlow())
    assert (sampler.path, sampler.times, sampler.renoise) == (TrigFlow(), TRIG_LIST, "same")
    assert DMD2().sampler(RectifiedFlow()).path == RectifiedFlow()


def test_problems_are_named():
    assert [key for key, _ in StudentSample(()).problems()] == ["t_list"]
    assert [key for key, _ in StudentSample((0.5, 1.0)).problems()] == ["t_list"]
    assert [key for key, _ in StudentSample(exit_step="last", input="data").problems()] == ["warn:exit_step"]
    assert check(DMD2()) == []
    with pytest.raises(ConfigError, match=r"^student\.t_list: must descend.*\ncritic\.draws: must be at least 1"):
        check(DMD2(student=StudentSample(()), critic=Critic(draws=0)))
    assert [key for key, _ in DMD2(student_update_freq=0).problems()] == ["student_update_freq"]
    assert [key for key, _ in DMD2(student_update_freq=1).problems()] == ["warn:student_update_freq"]
    assert not list(DMD2().problems())
