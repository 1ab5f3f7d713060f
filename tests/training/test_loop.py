"""The loop against one written by hand, against itself with the batch divided otherwise, against numbers that are none."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.batch import Batch, Condition
from fewstep.config import ConfigError, check, kind, recipe
from fewstep.diffusion import Rng, StudentSampler, TeacherSampler
from fewstep.diffusion.times import Shifted
from fewstep.inference.synthetic import MixtureSamples, TeacherPairs
from fewstep.methods import DMD2, KD, Finetune, Nets, StudentSample, Terms, Turn
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training.ema import Ema
from fewstep.training.errors import TrainingError
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer
from fewstep.training.run_folder import environment

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
STUDENT = TinySpec(width=16, depth=2)


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    return tmp_path


def run_of(name: str, *, method: Any = None, **parts: Any) -> Run:
    parts = {
        "trainer": Trainer(max_iter=6, batch_size=8, num_threads=1, log_every=1),
        "data": MixtureSamples(MIXTURE, num=100),
    } | parts
    return Run(
        job=Job(name=name),
        method=method or Finetune(times=Shifted(shift=1.0)),
        networks=parts.pop("networks", Networks(MIXTURE, Full(STUDENT, init="random"), Full(STUDENT, init="random"))),
        **parts,
    )


def metrics(run: Run) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run.job.folder() / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step is there twice"
    return {line.pop("step"): line for line in lines}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- a loop written by hand -------------------------------------------------------------------------------------------


def by_hand(run: Run, clip: float, beta: float) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[float]]:
    """Flow matching with what torch offers and nothing of ours but the network, the draws and the data."""
    net = build(run.networks, ["student"], run.trainer.seed)["student"]
    data, size = run.data.open(), run.trainer.batch_size
    optim = run.optim
    adamw = torch.optim.AdamW(
        net.module.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    average = {n: p.detach().clone() for n, p in net.module.named_parameters()}
    order = torch.cat([torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)) for epoch in range(3)])
    losses, norms = [], []
    for step in range(run.trainer.max_iter):
        x0 = data.batch(order[step * size : (step + 1) * size]).x0
        assert x0 is not None
        rng = Rng(run.trainer.seed, step, range(size))
        t = rng.uniform()
        eps = rng.normal((2,))
        x_t = ((1 - t)[:, None] * x0 + t[:, None] * eps).float()
        loss = ((net(x_t, t, Condition()).velocity - (eps - x0)) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.module.parameters(), clip)))
        adamw.step()
        kept = min(beta, (step + 1) / (step + 10))
        for name, parameter in net.module.named_parameters():
            average[name] = kept * average[name] + (1 - kept) * parameter.detach()
        losses.append(loss.item())
    return {n: p.detach() for n, p in net.module.named_parameters()}, average, losses, norms


def test_a_run_is_the_loop_one_would_write_by_hand() -> None:
    run = run_of(
        "hand",
        networks=Networks(student=Full(STUDENT, init="random")),
        optim=Optim(lr=3e-3, clip=0.7, weight_decay=0.05),
        ema=Ema(beta=0.6),
        trainer=Trainer(max_iter=20, batch_size=8, num_threads=1, log_every=1),  # 160 samples: into a second epoch of 100
    )
    train(run)
    weights, average, losses, norms = by_hand(run, clip=0.7, beta=0.6)
    assert largest_difference(read(f"{run.job.folder()}@latest:student"), weights) < 1e-6
    assert largest_difference(read(f"{run.job.folder()}@latest:student.ema"), average) < 1e-6
    logged = metrics(run)
    assert [logged[i + 1]["loss/denoising"] for i in range(20)] == pytest.approx(losses, abs=1e-6)
    assert [logged[i + 1]["grad_norm/student"] for i in range(20)] == pytest.approx(norms, abs=1e-6)
    assert max(norms) > 0.7  # the clipping was needed


# --- the batch, divided otherwise -------------------------------------------------------------------------------------

TURNS = {
    "finetune": (Finetune(), MixtureSamples(MIXTURE, num=100)),
    "kd": (KD(), TeacherPairs(MIXTURE, num=100, sampler=TeacherSampler("heun", 8, shift=1.0))),
    "dmd2": (DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2), MixtureSamples(MIXTURE, num=100)),
}


@pytest.mark.parametrize("name", TURNS)
def test_accumulation_is_the_large_batch(name: str) -> None:
    method, data = TURNS[name]
    runs = {
        (size, accum): run_of(
            f"{name}_{size}x{accum}",
            method=method,
            data=data,
            optim=Optim(lr=1e-3, clip=0.5),
            trainer=Trainer(max_iter=4, batch_size=size, grad_accum=accum, num_threads=1, log_every=1),
        )
        for size, accum in ((8, 1), (4, 2), (2, 4))
    }
    for run in runs.values():
        train(run)
    large = runs[8, 1]
    roles = ["student", "critic"] if name == "dmd2" else ["student"]
    for run in (runs[4, 2], runs[2, 4]):
        for step, line in metrics(large).items():
            for key, value in metrics(run)[step].items():
                if key.startswith(("loss/", "grad_norm/", "watch/")):
                    assert value == pytest.approx(line[key], rel=2e-6, abs=1e-7), (step, key)
        for role in roles:
            one, other = (read(f"{r.job.folder()}@latest:{role}") for r in (large, run))
            assert largest_difference(one, other) < 2e-6
            gradients = [read(f"{r.job.folder()}@latest:{role}.optim") for r in (large, run)]  # Adam's mean of gradients
            assert largest_difference(*gradients) < 1e-6
    seen = set().union(*metrics(large).values())
    assert {f"grad_norm/{role}" for role in roles} <= seen


def test_a_line_of_metrics_holds_what_its_iterations_saw() -> None:
    run = run_of("lines", method=DMD2(student=StudentSample((1.0,)), student_update_freq=2))
    train(run)
    for step, line in metrics(run).items():
        mine, other = ("student", "critic") if step % 2 else ("critic", "student")
        assert f"grad_norm/{mine}" in line and f"grad_norm/{other}" not in line


# --- numbers that are none --------------------------------------------------------------------------------------------


@kind("loop_poisoned", group="method")
@dataclass(frozen=True)
class Poisoned:
    """Two roles in one turn; from iteration `at` on one of them gets a number that is none."""

    roles: ClassVar[tuple[str, ...]] = ("student", "critic")
    needs: ClassVar[frozenset[str]] = frozenset({"x0"})

    at: int = 2
    where: str = "term"  # term, gradient, unused, constant
    row: int = 0  # of the whole batch, so that it is one micro-batch among several

    def turn(self, step: int) -> Turn:
        return Turn("joint", ("critic", "student"))

    def losses(self, turn: Turn, nets: Nets, batch: Batch, rng: Rng) -> Iterator[Terms]:
        assert batch.x0 is not None
        poisoned = rng.step >= self.at and bool((rng.rows == self.row).any())
        t = torch.full((batch.size(),), 0.5, dtype=torch.float64)
        student = nets.student(batch.x0, t, batch.cond).velocity.square().mean()
        critic = nets.critic(batch.x0, t, batch.cond).velocity.square().mean()
        if poisoned and self.where == "term":
            student = student * float("nan")
        if poisoned and self.where == "gradient":
            student = student + Broken.apply(student)
        if poisoned and self.where == "constant":  # a number that reaches no gradient
            student = student + torch.tensor(float("inf"))
        if self.where == "unused":
            student = student.detach()
        yield Terms.of(first=critic)
        yield Terms.of(second=student, third=critic.detach().requires_grad_())

    def sampler(self, path: Any) -> StudentSampler:
        return StudentSampler((1.0,), path)


class Broken(torch.autograd.Function):
    """0, whose gradient is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("term", "loss term 'second' is nan"),
        ("constant", "loss term 'second' is inf"),
        ("gradient", "the gradient of role 'student' is nan, first in enter.weight"),
    ],
)
@pytest.mark.parametrize("row", [0, 7])
def test_a_number_that_is_none_stops_before_the_step(where: str, said: str, row: int) -> None:
    """Row 0 is in the first micro-batch of four, row 7 in the last."""
    trainer = Trainer(max_iter=6, batch_size=2, grad_accum=4, num_threads=1, log_every=1)
    healthy = run_of("healthy", method=Poisoned(at=99, where=where), trainer=replace(trainer, max_iter=2))
    train(healthy)
    run = run_of(
        "bad", method=Poisoned(at=2, where=where, row=row), trainer=trainer, checkpoint=Checkpoint(save_iter=2), optim=Optim()
    )
    with pytest.raises(TrainingError) as caught:
        train(run)
    message = str(caught.value)
    assert said in message and json.loads((run.job.folder() / "diverged.json").read_text()) == {"reason": message}
    for part in ("iteration 2", "joint turn", "critic, student", "No weight was changed", "iter_000000002"):
        assert part in message
    for role in ("student", "critic"):  # neither that of the bad numbers, nor the one before it in the same turn
        kept = [read(f"{r.job.folder()}@latest:{role}") for r in (healthy, run)]
        assert largest_difference(*kept) == 0


def test_no_role_of_the_turn_has_stepped_when_one_has_bad_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.training import role

    stepped = []
    monkeypatch.setattr(role.TrainedRole, "step", lambda self, *_: stepped.append(self.name))
    with pytest.raises(TrainingError):
        train(run_of("bad", method=Poisoned(at=0, where="gradient")))
    assert stepped == []


def test_a_role_that_no_term_depends_on_is_named() -> None:
    with pytest.raises(TrainingError, match="depends on role 'student'"):
        train(run_of("unused", method=Poisoned(at=99, where="unused")))


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim": Optim(lr=0.0)}, "optim.lr: is 0.0: the run would go to its end and train nothing"),
        ({"optim": Optim(warmup_iters=7)}, "optim.warmup_iters: is 7, longer than the run (trainer.max_iter=6)"),
        ({"method": KD()}, "data: method KD needs noise, but this data has only x0"),
        ({"checkpoint": Checkpoint(keep_last=0)}, "checkpoint.keep_last: must be at least 1"),
        ({"networks": Networks(student=Full(STUDENT, init="random")), "method": DMD2()}, "networks.teacher: is none"),
    ],
)
def test_a_run_that_cannot_work_is_refused_by_its_key(change: dict[str, Any], said: str, output_root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(run_of("refused", **change))
    assert said in str(caught.value)
    assert list(output_root.iterdir()) == []  # and nothing was made


@kind("loop_boastful", group="data")
@dataclass(frozen=True)
class Boastful:
    """Declares a field that its samples lack."""

    fields: ClassVar[frozenset[str]] = frozenset({"x0", "noise"})

    def open(self) -> Any:
        return MixtureSamples(MIXTURE, num=100).open()


def test_data_that_lacks_what_it_declares_is_refused() -> None:
    with pytest.raises(ValueError, match="method KD needs noise, which is declared, but not in the first batch"):
        train(run_of("boastful", method=KD(), data=Boastful()))


# --- load_path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_load_path_takes_the_weights_and_nothing_else(precision: Any) -> None:
    trainer = Trainer(max_iter=4, batch_size=8, num_threads=1, precision=precision)
    dmd2 = DMD2(student=StudentSample((1.0,)), student_update_freq=2)
    train(run_of("first", method=dmd2, trainer=trainer, optim=Optim(lr=1e-2), checkpoint=Checkpoint(save_iter=2)))
    second = run_of(
        "second",
        method=dmd2,
        trainer=replace(trainer, max_iter=2, seed=1),
        optim=Optim(lr=1e-9, weight_decay=0.0),
        checkpoint=Checkpoint(load_path="fewstep/default/first@4"),
    )
    train(second)
    folder = second.job.folder()
    for role in ("student", "critic"):
        want = read(f"fewstep/default/first@4:{role}")
        assert largest_difference(read(f"{folder}:{role}"), want) < 1e-7
        steps = [value for name, value in read(f"{folder}:{role}.optim").items() if name.endswith(".step")]
        assert {float(step) for step in steps} == {1.0}  # a fresh optimiser
    # the average starts at the loaded weights, not at random ones
    assert largest_difference(read(f"{folder}:student.ema"), read("fewstep/default/first@4:student")) < 1e-7


def test_load_path_is_not_used_when_the_run_resumes() -> None:
    train(run_of("first"))
    train(run_of("second", trainer=Trainer(max_iter=2, batch_size=8, num_threads=1, seed=1)))
    before = read("fewstep/default/second:student")
    again = run_of(
        "second",
        trainer=Trainer(max_iter=3, batch_size=8, num_threads=1, seed=1),
        optim=Optim(lr=1e-9),
        checkpoint=Checkpoint(load_path="fewstep/default/first"),
    )
    train(again)
    assert largest_difference(read("fewstep/default/second:student"), before) < 1e-7


def test_a_wrong_load_path_is_told() -> None:
    for path, said in (("nowhere/run", "no weights at 'nowhere/run'"), ("fewstep/default/first@99", "it has iter_000000006")):
        if "first" in path:
            train(run_of("first"))
        with pytest.raises(ValueError, match=said):
            train(run_of("second", checkpoint=Checkpoint(load_path=path)))
    with pytest.raises(
        ValueError, match=r"do not fit the network(.|\n)*the network wants \(24, 2\), the weights have \(16, 2\)"
    ):
        wider = Networks(student=Full(TinySpec(width=24, depth=2), init="random"))
        train(run_of("third", networks=wider, checkpoint=Checkpoint(load_path="fewstep/default/first")))
    with pytest.raises(ValueError, match=r"holds no 'critic.weights'; it holds student.ema, student.weights"):
        train(run_of("fourth", method=DMD2(), checkpoint=Checkpoint(load_path="fewstep/default/first")))


# --- what a run leaves behind -----------------------------------------------------------------------------------------


@kind("loop_constant_score", group="preview")
@dataclass(frozen=True)
class ConstantScore:
    every: int | None = 2

    def show(self, scene: Any) -> dict[str, float]:
        assert not scene.student.module.training
        return {"score": float(scene.step)}


def test_the_summary_holds_the_last_of_everything() -> None:
    run = run_of("papers", preview=ConstantScore(), method=DMD2(student=StudentSample((1.0,)), student_update_freq=2))
    said = train(run)
    folder = run.job.folder()
    assert json.loads((folder / "summary.json").read_text()) == said
    last: dict[str, float] = {}
    for _, line in sorted(metrics(run).items()):
        last |= line
    assert {name: said[name] for name in last} == last
    assert {"loss/vsd", "loss/critic", "grad_norm/student", "grad_norm/critic", "samples_per_s", "lr/student"} <= last.keys()
    assert said["score"] == 6 and said["score_undistilled"] == 0
    assert said["step"] == 6 and said["samples"] == 48 and said["student_updates"] == 3
    assert said["wall_s"] > 0 and said["peak_memory_gib"] > 0 and said["device"] == "cpu"
    assert said["versions"].keys() >= {"fewstep", "torch", "python"}
    for name in ("config.yaml", "env.json", "log.txt", "student.json"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())


def test_a_finished_run_started_again_says_the_same() -> None:
    run = run_of("again", preview=ConstantScore())
    first, lines = train(run), metrics(run)
    second = train(run)
    changing = {"wall_s", "peak_memory_gib"}
    assert {k: v for k, v in first.items() if k not in changing} == {k: v for k, v in second.items() if k not in changing}
    assert metrics(run) == lines


def test_a_run_ends_when_its_best_metric_is_not_better_for_its_patience() -> None:
    """The score of ConstantScore grows with the iteration: the first one, of iteration 2, stays the lowest."""
    patient = Checkpoint(save_iter=2, best_metric="score", patience=2)
    trainer = Trainer(max_iter=20, batch_size=8, num_threads=1, log_every=2)
    run = run_of("patient", preview=ConstantScore(), checkpoint=patient, trainer=trainer)
    said = train(run)
    assert said["step"] == 6 and said["score"] == 6  # 2 is the best, 4 and 6 are not better
    checkpoints = run.job.folder() / "checkpoints"
    assert (checkpoints / "best_checkpoint.txt").read_text() == "iter_000000002"
    assert "score was not better for 2 values" in (run.job.folder() / "log.txt").read_text()
    assert train(run)["step"] == 6  # there is nothing to do
    longer = replace(run, checkpoint=replace(patient, patience=3))
    assert train(longer)["step"] == 8  # goes on, with what it has counted
    rising = replace(patient, best_is="highest")
    assert train(run_of("rising", preview=ConstantScore(), checkpoint=rising, trainer=trainer))["step"] == 20
    with pytest.raises(ConfigError, match=r"checkpoint\.patience"):
        train(run_of("unmeasured", checkpoint=Checkpoint(patience=2)))


def test_samples_per_second_counts_an_iteration_once_however_many_roles_it_trains() -> None:
    run = run_of("rate", method=Poisoned(at=99), trainer=Trainer(max_iter=30, batch_size=8, num_threads=1, log_every=30))
    said = train(run)
    assert said["samples_per_s"] <= 1.02 * said["samples"] / said["wall_s"] * 30  # sane
    step = metrics(run)[30]
    assert step["samples_per_s"] > 0
    from fewstep.parallel import join_world
    from fewstep.training.meter import Meter

    meter = Meter()
    for _ in range(5):
        meter.begin_iteration()
        meter.add(Terms.of(a=torch.ones(())))
        meter.add_step({role: torch.ones(()) for role in ("critic", "student")}, {"critic": 1e-3, "student": 1e-3})
    meter._began -= 1.0
    assert meter.read(join_world("cpu"), 8)["samples_per_s"] == pytest.approx(40, rel=0.02)


# --- the command ------------------------------------------------------------------------------------------------------


@recipe("loop_toy")
def loop_toy() -> Run:
    return run_of("command", method=Poisoned(at=99))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 0, "done: "),
        (["method.at=3"], 1, "iteration 3, joint turn, training critic, student: loss term 'second' is nan"),
        (["networks.student.network.width=20", "trainer.max_iter=9"], 2, "networks.student.network.width: 16 -> 20: "),
        (["job.name=other", "checkpoint.load_path=nowhere"], 1, "no weights at 'nowhere'"),
        (["job.name=other", "optim.lr=0"], 2, "optim.lr: is 0.0"),
        (["job.name=other", "optim.warmup_iters=99"], 2, "optim.warmup_iters: is 99, longer than the run"),
        (["job.name=other", "method=kd"], 2, "data: method KD needs noise"),
    ],
)
def test_the_command_says_one_thing_and_its_exit_status(
    words: list[str], status: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from fewstep.cli import main

    if "width" in "".join(words):
        train(loop_toy())
        capfd.readouterr()
    assert main(["train", "experiment=loop_toy", *words]) == status
    told = capfd.readouterr().err
    assert said in told and "Traceback" not in told
    if status:
        assert told.count("fewstep: ") == 1


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere"])
def test_a_run_stays_inside_of_the_output_root(name: str) -> None:
    with pytest.raises(ConfigError, match="name: is a folder inside OUTPUT_ROOT"):
        check(Job(name=name))


def test_a_run_notes_the_command_as_one_would_type_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/fewstep/__main__.py", "train", "experiment=kd", "job.name=a b"])
    monkeypatch.setenv("OUTPUT_ROOT", "my runs")
    assert environment()["command"] == "OUTPUT_ROOT='my runs' fewstep train experiment=kd 'job.name=a b'"
