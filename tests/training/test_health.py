"""Each monitor on a case built for it, and what the alarms do to a run."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import check, kind
from fewstep.diffusion import EDM, Prediction, RectifiedFlow, Rng, StudentSampler
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import Nets, Terms, Turn
from fewstep.networks.analytic import GaussianMixture, MixtureSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read_tensors
from fewstep.training.checkpoint import read_progress
from fewstep.training.errors import TrainingError
from fewstep.training.health import Alarm, Health, Monitor, compare
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

SPEC = MixtureSpec(means=((1.4, 0.0), (-1.4, 0.7)), stds=(0.2, 0.3))


@dataclass(frozen=True)
class Answer:
    """A one-step student that gives what `answer` makes of its noise."""

    answer: Any
    path: Any

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, **_: Any) -> Prediction:
        return Prediction.of("x0", self.answer(x_t), x_t, t, self.path)


def monitor_of(student_times: tuple[float, ...] = (1.0,), critic: Any = None, chunk: int = 64, **changes: Any) -> Monitor:
    config = Health(every=1, num=256, reference_calls=32, **changes)
    conditions = Batch(x0=SPEC.build().sample(Rng(3, 0, range(256))))
    sampler = StudentSampler(student_times, RectifiedFlow(), renoise="ode")
    return Monitor(config, conditions, sampler, SPEC.build(), critic, seed=0, chunk=chunk)


def rung(monitor: Monitor, values: dict[str, float]) -> list[str]:
    return [ring.monitor for ring in monitor.rings(values)]


def test_the_teacher_as_student_rings_nothing() -> None:
    monitor = monitor_of(tuple(1 - i / 32 for i in range(32)), critic=SPEC.build())
    values = monitor.look(SPEC.build())
    assert values["collapse"] == pytest.approx(1.0, abs=0.05)
    assert values["drift"] < 0.05
    assert values["critic_lag"] == pytest.approx(1.0, abs=1e-6)
    assert rung(monitor, values) == []


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda noise: noise * 0 + torch.tensor([1.4, 0.0]), ["collapse", "drift"]),  # one point: its spread is 0 too
        (lambda noise: 0.3 * torch.tensor([1.4, 0.7]) * noise, ["collapse", "drift"]),  # a third of the spread
        (lambda noise: torch.tensor([1.4, 0.45]) * noise + torch.tensor([2.0, 0.0]), ["drift"]),  # moved as a whole
        (lambda noise: torch.tensor([1.4, 0.45]) * 2.5 * noise, ["drift"]),  # too wide
        (lambda noise: noise * float("nan"), ["collapse", "drift"]),
    ],
)
def test_a_bad_student_rings_by_name(answer: Any, names: list[str]) -> None:
    monitor = monitor_of()
    values = monitor.look(Answer(answer, RectifiedFlow()))
    assert sorted(rung(monitor, values)) == names


def test_collapse_is_the_ratio_of_mean_distances() -> None:
    torch.manual_seed(0)
    made, reference = torch.randn(300, 3), 4 * torch.randn(300, 3)
    assert compare(made, reference)["collapse"] == pytest.approx(0.25, rel=0.1)
    distance = lambda x: float(torch.cdist(x, x).sum() / (300 * 299))  # noqa: E731
    assert compare(made, reference)["collapse"] == pytest.approx(distance(made) / distance(reference), rel=1e-5)


def test_drift_is_told_per_channel_of_a_video() -> None:
    torch.manual_seed(0)
    reference = torch.randn(64, 3, 2, 8, 8)
    made = reference.clone()
    made[:, 1] += 0.8  # one channel of three, by 0.8 of its spread
    assert compare(made, reference)["drift"] == pytest.approx(0.8, abs=0.02)
    made = reference.clone()
    made[:, 2] *= 2
    assert compare(made, reference)["drift"] == pytest.approx(0.69, abs=0.03)  # ln 2


@pytest.mark.parametrize("path", [RectifiedFlow(), EDM()])
def test_a_critic_that_lags_rings(path: Any) -> None:
    """It believes in another distribution than the student's; it may live on another path than the teacher."""
    stale = MixtureSpec(means=((-3.0, 0.0),), stds=(0.3,), path=path).build()
    good = GaussianMixture(SPEC.means, SPEC.stds, path=path)
    student = Answer(lambda noise: noise * 0.2 + torch.tensor([1.4, 0.0]), RectifiedFlow())
    lagging, fresh = monitor_of(critic=stale), monitor_of(critic=good)
    assert "critic_lag" in rung(lagging, lagging.look(student))
    value = fresh.look(student)["critic_lag"]
    assert value == pytest.approx(1.0, abs=1e-3)


def test_a_spike_of_the_gradient_between_two_looks_rings_once() -> None:
    monitor, student = monitor_of(), Answer(lambda noise: noise, RectifiedFlow())
    for norm in [1.0] * 50 + [30.0] + [1.0] * 5:
        monitor.add_gradient_norm(norm)
    values = monitor.look(student)
    assert values["grad_ratio"] == pytest.approx(30.0)
    assert "grad_ratio" in rung(monitor, values)
    for _ in range(5):
        monitor.add_gradient_norm(1.0)
    assert monitor.look(student)["grad_ratio"] == pytest.approx(1.0)


def test_a_look_does_not_depend_on_how_it_is_divided() -> None:
    values = [monitor_of((1.0, 0.6), critic=SPEC.build(), chunk=chunk).look(SPEC.build()) for chunk in (256, 37)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_gravest_alarm_is_last_and_an_alarm_can_be_off() -> None:
    monitor = monitor_of(collapse=Alarm(0.5, "rollback"), drift=Alarm(0.5, "warn"), critic_lag=Alarm(2.0, "off"))
    rings = monitor.rings({"drift": 3.0, "collapse": 0.1, "critic_lag": 99.0})
    assert [ring.monitor for ring in rings] == ["drift", "collapse"]
    assert str(rings[-1]) == "collapse is 0.1, below its limit of 0.5 (health.collapse.action=rollback)"


def test_a_look_at_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="num: is 1: diversity is a distance between samples"):
        check(Health(num=1))


# --- what the alarms do -----------------------------------------------------------------------------------------------

SEEDS: list[tuple[int, int]] = []


@kind("health_collapsing", group="method")
@dataclass(frozen=True)
class Collapsing:
    """Learns the data's spread, until at iteration `at` it is told to give one point; new noise heals it `heals` times."""

    roles: ClassVar[tuple[str, ...]] = ("student",)
    needs: ClassVar[frozenset[str]] = frozenset({"x0"})

    at: int = 25
    heals: int = 1

    def turn(self, step: int) -> Turn:
        return Turn("student", ("student",))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        rollbacks = rng.seed >> 32
        SEEDS.append((rng.step, rollbacks))
        noise = rng.normal((2,))
        t = torch.ones(batch.size(), dtype=torch.float64)
        collapses = rng.step >= self.at and rollbacks < self.heals
        target = torch.zeros_like(noise) if collapses else noise * torch.tensor([1.4, 0.45]) + torch.tensor([0.0, 0.35])
        yield Terms.of(kd=((nets.student(noise, t, batch.cond).x0 - target) ** 2).mean())

    def sampler(self, path: Any) -> StudentSampler:
        return StudentSampler((1.0,), path)


def run_of(action: Any, **method: Any) -> Run:
    return Run(
        job=Job(name="health"),
        method=Collapsing(**method),
        networks=Networks(SPEC, Full(TinySpec(width=32, depth=2), init="random")),
        data=MixtureSamples(SPEC, num=512),
        optim=Optim(lr=1e-2),
        trainer=Trainer(max_iter=60, batch_size=64, num_threads=1, log_every=10),
        checkpoint=Checkpoint(save_iter=10, keep_last=2),
        health=Health(every=10, num=128, collapse=Alarm(0.5, action), drift=Alarm(99.0)),
    )


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    SEEDS.clear()


def lines_of(run: Run) -> dict[int, dict[str, float]]:
    found = [json.loads(line) for line in (run.job.folder() / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found}), "a step is there twice"
    return {line.pop("step"): line for line in found}


def test_a_warning_is_told_and_the_run_goes_on() -> None:
    run = run_of("warn", heals=0)
    assert "ALARM" not in str(train(run_of("warn", at=99)))
    run = replace(run, job=Job(name="collapses"), method=Collapsing(heals=9))
    said = train(run)
    assert said["step"] == 60 and said["rollbacks"] == 0
    text = (run.job.folder() / "log.txt").read_text()
    assert "ALARM at iteration 40: collapse is" in text and "below its limit of 0.5 (health.collapse.action=warn)" in text
    values = {step: line["health/collapse"] for step, line in lines_of(run).items()}
    assert values[20] > 0.5 > values[60]
    # nothing that was saved since calls itself healthy, and the last healthy one is still there
    kept = {read_progress(path).step: read_progress(path).healthy for path in run.job.folder().glob("checkpoints/iter_*")}
    assert kept == {20: True, 50: False, 60: False} or kept == {30: True, 50: False, 60: False}


def test_stop_ends_the_run_and_says_where_it_was_healthy() -> None:
    run = run_of("stop", heals=9)
    with pytest.raises(TrainingError) as caught:
        train(run)
    said = str(caught.value)
    assert (
        "collapse is" in said
        and "below its limit" in said
        and "The last healthy checkpoint is" in said
        and "iter_0000000" in said
    )


def test_rollback_restores_the_last_healthy_checkpoint_and_goes_on_with_new_noise() -> None:
    run = run_of("rollback", heals=1)
    run = replace(run, checkpoint=replace(run.checkpoint, keep_every=10))
    said = train(run)
    assert said["step"] == 60 and said["rollbacks"] == 1
    assert said["health/collapse"] > 0.5
    lines_of(run)
    back = next(i for i in range(1, len(SEEDS)) if SEEDS[i][0] <= SEEDS[i - 1][0])
    assert SEEDS[back][0] in (20, 30) and SEEDS[back][0] < SEEDS[back - 1][0]
    assert {rollbacks for _, rollbacks in SEEDS[:back]} == {0} and {rollbacks for _, rollbacks in SEEDS[back:]} == {1}
    assert "rolled back to" in (run.job.folder() / "log.txt").read_text()

    # the weights are those of the healthy checkpoint: a run that begins there, with this noise, ends with the same bits
    healthy = f"iter_{SEEDS[back][0]:09d}"
    other = replace(run, job=Job(name="other"))
    shutil.copytree(run.job.folder() / "checkpoints" / healthy, other.job.folder() / "checkpoints" / healthy)
    train(other)
    ends = [read_tensors(r.job.folder() / "checkpoints" / "iter_000000060", "student.") for r in (run, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_rollbacks_are_capped() -> None:
    run = run_of("rollback", heals=99)
    with pytest.raises(TrainingError, match=r"\(2 roll-backs so far\). The last healthy checkpoint is .*iter_0000000[23]0"):
        train(run)
    assert {rollbacks for _, rollbacks in SEEDS} == {0, 1, 2}
    # a restart does not forget them
    with pytest.raises(TrainingError, match=r"\(2 roll-backs so far\)"):
        train(run)
    assert {rollbacks for _, rollbacks in SEEDS} == {0, 1, 2}


def test_a_run_killed_after_its_rollback_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the newer checkpoint that it rolled back from, and with its new noise."""
    left_alone = run_of("rollback", heals=1)
    want = train(left_alone)
    run = replace(run_of("rollback", heals=1), job=Job(name="killed"))

    def losses(self: Collapsing, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        if rng.seed >> 32 and rng.step in (20, 21, 30, 31) and rng.step % 10:
            raise KeyboardInterrupt
        yield from original(self, turn, nets, batch, rng)

    original = Collapsing.losses
    monkeypatch.setattr(Collapsing, "losses", losses)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(Collapsing, "losses", original)
    said = train(run)
    same = ("step", "rollbacks", "samples", "loss/kd", "health/collapse", "health/drift")
    assert {name: said[name] for name in same} == {name: want[name] for name in same}
