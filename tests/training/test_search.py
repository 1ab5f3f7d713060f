"""Sweeps with a sampler: what is asked for equals what a plain study of Optuna asks for, whatever happens to the processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from fewstep.cli import main
from fewstep.config import ConfigError, read_command
from fewstep.training.records import RunRecord
from fewstep.training.run import Run
from fewstep.training.search import SAMPLERS, Range, Request, candidates
from fewstep.training.trials import TRIAL, Queue, Sweep, Trial, plan_sweep, show, space_of

WORDS = ("experiment=analytic_finetune", "optim.lr=1e-4..1e-1", "trainer.batch_size=8..64", "optim.schedule=cosine,constant")
NUM = 13  # the samplers' own draws begin at the eleventh


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    return tmp_path


def searched(*words: str, num: int = NUM, **request: Any) -> Sweep:
    return plan_sweep(read_command(words or WORDS), Run, Request(num, **request))


def score_of(settings: dict[str, str]) -> float:
    """A valley around lr = 1e-3 and a batch of 20."""
    lr, size = float(settings["optim.lr"]), int(settings.get("trainer.batch_size", 20))
    return (math.log10(lr) + 3) ** 2 + abs(size - 20) / 50 + (settings.get("optim.schedule") == "constant")


def finish(trial: Trial, **values: float) -> None:
    """Leaves in the folder what a training of one iteration does."""
    (trial.folder / "config.yaml").write_text("trainer:\n  max_iter: 1\n")
    (trial.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    values = values or {"energy_distance": score_of(dict(trial.settings))}
    (trial.folder / "summary.json").write_text(json.dumps({"step": 1, **values}))


def taken(commands: Iterator[tuple[str, ...]], sweep: Sweep) -> Iterator[Trial]:
    """The trials that the commands of a queue train, without the training."""
    for command in commands:
        if command:
            name = command[-1].removeprefix("job.name=")
            yield next(trial for trial in sweep.trials() if trial.job_name == name)
        else:
            time.sleep(0.01)


def run_all(sweep: Sweep, train: Callable[[Trial], None] = finish) -> list[dict[str, str]]:
    queue = Queue(sweep)
    for trial in taken(queue.commands(), sweep):
        train(trial)
    assert queue.error is None
    return [dict(trial.settings) for trial in sweep.trials()]


def plain(name: str, num: int = NUM, fails: tuple[int, ...] = ()) -> list[dict[str, str]]:
    """One study that lives from the first trial to the last, as Optuna's documentation shows it."""
    space = {
        "optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "trainer.batch_size": optuna.distributions.IntDistribution(8, 64),
        "optim.schedule": optuna.distributions.CategoricalDistribution(("cosine", "constant")),
    }
    study = optuna.create_study()
    asked: list[dict[str, str]] = []
    for number in range(num):
        seed = int(np.random.SeedSequence((0, number, 0)).generate_state(1)[0])
        study.sampler = {
            "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
            "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
            "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
            "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
            "qmc": lambda seed: optuna.samplers.QMCSampler(
                scramble=True,
                seed=0,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                warn_independent_sampling=False,
            ),
        }[name](seed)
        trial = study.ask(space)
        settings = {key: value if isinstance(value, str) else repr(value) for key, value in trial.params.items()}
        asked.append(settings)
        if number in fails:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, score_of(settings))
    return asked


# --- what is asked for


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of QMC
@pytest.mark.parametrize(
    "name", ["tpe", "cmaes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "qmc", "gp"))]
)
def test_trials_are_those_of_a_plain_study(name: str) -> None:
    """Step by step, from run folders alone; the fourth trial has failed."""
    sweep = searched(sampler=name)

    def train(trial: Trial) -> None:
        finish(trial, **({"energy_distance": math.nan} if trial.number == 3 else {}))

    asked = run_all(sweep, train)
    assert asked == plain(name, fails=(3,)) and len(asked) == NUM
    assert "trial003 counts as failed: energy_distance is nan" in show(sweep, None)
    if name != "random":
        assert asked[11:] != plain("random")[11:]


def test_the_seed_decides_and_the_highest_score_is_sought() -> None:
    lowest = plain("tpe")
    other = run_all(searched(*WORDS, "job.name=other", num=2, seed=1))
    assert not any(one in other for one in lowest)
    highest = run_all(searched(highest=True))
    assert lowest[:10] == highest[:10] and lowest[10:] != highest[10:]
    assert sum(map(score_of, lowest[10:])) < sum(map(score_of, highest[10:]))


def test_ranges_are_of_the_settings_type_and_logarithmic_from_a_factor_of_ten() -> None:
    words = ("experiment=analytic_finetune", "optim.weight_decay=0..1", "trainer.batch_size=8.0..64.0", "optim.lr=1e-3..9e-3")
    space = searched(*words).space
    assert {key: str(values) for key, values in space.items()} == {
        "optim.weight_decay": "0.0..1.0 (real, linear)",
        "trainer.batch_size": "8..64 (whole, linear)",
        "optim.lr": "0.001..0.009 (real, linear)",
    }
    assert Range.read("1..10") == Range(1, 10, True) and str(Range(1, 10, True)) == "1..10 (whole, log)"
    assert Range.read("-1.5..2e3") == Range(-1.5, 2000, False)
    for text in ("1..", "a..b", "../x", "1...2", "'1..2'", "1..2..3", "[1..2]"):
        assert Range.read(text) is None
    assert Range(1e-4, 1e-2, False).at(0.5) == repr(1e-4 * 100**0.5)
    assert all(1 <= int(settings["n"]) <= 9 for settings in candidates({"n": Range(1, 9, True)}))
    assert {settings["n"] for settings in candidates({"n": ("a", "b", "c")})} == {"a", "b", "c"}


def test_no_combination_is_tried_twice() -> None:
    sweep = searched("experiment=analytic_finetune", "optim.lr=1e-3,2e-3", "trainer.batch_size=8..9", num=9)
    asked = run_all(sweep)
    assert len(asked) == 4 == len({tuple(settings.items()) for settings in asked})


# --- processes


def test_an_interrupted_trial_goes_on_with_its_settings_and_the_sweep_as_if_undisturbed() -> None:
    undisturbed = plain("tpe", 12)
    trained: list[str] = []
    while len([trial for trial in searched(num=12).trials() if trial.is_over]) < 12:
        sweep = searched(num=12)
        for count, trial in enumerate(taken(Queue(sweep).commands(), sweep)):
            if count == 3:  # ends here, in the midst of a trial
                break
            trained.append(trial.job_name)
            finish(trial)
    assert [dict(trial.settings) for trial in sweep.trials()] == undisturbed
    assert len(trained) == 12 == len(set(trained))


def test_processes_at_once_share_the_trials() -> None:
    """Each has its own view of the folders; a lock of one keeps out all others, threads too."""
    trained: list[str] = []
    errors: list[Exception | None] = []

    def process() -> None:
        sweep = searched(num=8, sampler="random")
        queue = Queue(sweep)
        for trial in taken(queue.commands(), sweep):
            trained.append(trial.job_name)
            time.sleep(0.01)
            finish(trial)
        errors.append(queue.error)

    processes = [threading.Thread(target=process) for _ in range(3)]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    assert errors == [None] * 3
    assert sorted(trained) == [f"analytic_finetune.trial{number:03d}" for number in range(8)]
    assert len({tuple(trial.settings) for trial in searched().trials()}) == 8


def test_a_number_is_claimed_once(root: Path) -> None:
    sweep, late = searched(), searched(seed=5)
    mine, other = sweep.ask(), late.ask()
    assert mine is not None and other is not None and mine.settings != other.settings
    sweep.claim(mine)
    late.claim(other)  # has no effect
    assert sweep.trials() == (mine,) == late.trials()
    assert [path.name for path in mine.folder.iterdir()] == [TRIAL]
    assert not list(root.rglob("*.partial"))


# --- results


def test_settings_that_are_invalid_and_runs_without_a_result_count_as_failed() -> None:
    words = ("experiment=analytic_finetune", "optim.lr=1e-4..1e-1", "trainer.batch_size=-64..64")
    sweep, trained = searched(*words, num=8, by="energy_distance"), list[Trial]()

    def train(trial: Trial) -> None:
        trained.append(trial)
        if len(trained) == 2:
            (trial.folder / "config.yaml").write_text("trainer:\n  max_iter: 1\n")
            (trial.folder / "metrics.jsonl").write_text('{"step": 0, "energy_distance": 0.1}\n')  # before the first step
            (trial.folder / "diverged.json").write_text('{"reason": "loss term \'kd\' is nan"}')
        else:
            finish(trial, **{"other" if len(trained) == 3 else "energy_distance": 1.0})

    run_all(sweep, train)
    refused = [trial for trial in sweep.trials() if trial.problem]
    assert len(trained) >= 3 and len(refused) == 8 - len(trained) > 0
    assert all("trainer.batch_size: must be at least 1" in trial.problem for trial in refused)
    text = show(sweep, "energy_distance")
    cells = {line.split()[1]: line.split()[3] for line in reversed(text.splitlines()[1:9])}
    assert cells == {"finished": "1", "diverged": "-", "refused": "-"} and text.splitlines()[1].split()[1] == "finished"
    assert f"trial{trained[1].number:03d} counts as failed: loss term 'kd' is nan" in text
    assert f"trial{trained[2].number:03d} counts as failed: energy_distance is not in its summary.json" in text
    assert text.count("counts as failed: trainer.batch_size: must be at least 1") == len(refused)
    written = json.loads((sweep.folder / "trials.json").read_text())["trials"]
    assert len(written) == 8 and sum("failure" in trial for trial in written) == 2 + len(refused)
    assert "<svg" in (sweep.folder / "trials.svg").read_text()
    run_all(sweep, train)
    assert len(trained) == 8 - len(refused)  # none is run again


@pytest.mark.slow
def test_a_run_that_diverges_says_so_in_its_folder_until_it_is_finished(root: Path) -> None:
    words = ["train", "experiment=analytic_finetune", "trainer.max_iter=4", "optim.warmup_iters=0", "trainer.batch_size=8"]
    folder = root / "analytic/basic/analytic_finetune"
    assert main([*words, "optim.lr=1e30"]) == 1
    assert RunRecord.read(folder).state == "diverged"
    assert "is inf" in (text := (folder / "diverged.json").read_text()) or "is nan" in text
    assert main([*words, "optim.lr=1e-3"]) == 0
    assert RunRecord.read(folder).state == "finished" and not (folder / "diverged.json").exists()


def test_a_run_that_its_patience_ended_is_finished(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  max_iter: 9\ncheckpoint:\n  patience: 2\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "summary.json").write_text('{"step": 5}')
    assert RunRecord.read(tmp_path).state == "finished"
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 6}\n')  # goes on with more of it
    assert RunRecord.read(tmp_path).state == "unfinished"


def test_resumed_with_other_ranges_it_says_so_and_leaves_out_what_lies_outside() -> None:
    run_all(searched(num=11))
    words = (WORDS[0], "optim.lr=1e-3..1e-1", *WORDS[2:])
    sweep = searched(*words, num=12, sampler="random", seed=3)
    assert sweep.changes() == [
        "optim.lr: 0.0001..0.1 (real, log) -> 0.001..0.1 (real, log)",
        "--sampler: tpe -> random",
        "--seed: 0 -> 3",
    ]
    assert float(run_all(sweep)[11]["optim.lr"]) >= 1e-3
    assert sweep.changes() == []
    with pytest.raises(ConfigError, match=r"optim.warmup_iters: \(not given\) -> 9: scores would not be comparable"):
        searched(*WORDS, "optim.warmup_iters=9").trials()
    with pytest.raises(ConfigError, match=r"here optim\.lr: give this sweep a job"):
        searched(*WORDS[:2]).trials()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1e-5..1e-3"], "optim.lr: 1e-5..1e-3 is a range: say how many trials"),
        (["optim.lr=1e-3", "--trials", "3"], "no setting has several values"),
        (["optim.lr=1e-3..1e-5", "--trials", "3"], "optim.lr: 1e-3..1e-5: the second number of a range must be larger"),
        (["optim.lr=1e-5..1e-3", "--trials", "0"], "--trials"),
        (["optim.lr=1e-5..1e-3", "--trials", "3", "--sampler", "best"], "'best' is not one of tpe, random, qmc, cmaes, gp"),
        (["optim.lr=1e-5,1e-3", "--seed", "3"], "--sampler and --seed go with --trials"),
        (["optim.lrr=1e-5..1e-3", "--trials", "3"], "optim.lrr: no such setting; did you mean optim.lr?"),
        (["optim.lr=-2..-1", "--trials", "3"], "optim.lr: is -1."),
        (["optim.lr=1e-5..1e-3", "preview=none", "--trials", "3"], "--by: which score decides?"),
        (["optim.lr=1e-5..1e-3", "preview=clips", "--trials", "3"], "--by: which score decides?"),  # motion is no score
        (["job.name=1..3", "--trials", "3"], "job.name: has several values"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "experiment=analytic_finetune", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(root.iterdir())


@pytest.mark.parametrize("package", ["optuna", "cmaes", "scipy"])
def test_a_package_that_is_not_there_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = next(name for name, needs in SAMPLERS.items() if package in ("optuna", *needs))
    assert main(["sweep", WORDS[0], WORDS[1], "--trials", "2", "--sampler", name]) == 2
    assert f"--sampler {name} needs {package}: pip install 'fewstep[sweep]'" in capsys.readouterr().err


def test_a_score_that_no_finished_trial_has_ends_the_sweep_and_loses_nothing() -> None:
    run_all(searched(num=2))
    queue = Queue(searched(num=4, by="distance"))
    assert list(queue.commands()) == [] and "--by distance: no run has it; there are step, energy_distance" in str(queue.error)
    assert len(run_all(searched(num=4))) == 4


def test_a_grid_needs_no_optuna(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # an import of it would fail
    assert main(["sweep", WORDS[0], "optim.lr=1e-3,2e-3", "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert space_of(read_command(["a=1,2"])) == {"a": ("1", "2")}


# --- with training


REAL = ("experiment=analytic_finetune", "optim.lr=1e-4..1e-1", "trainer.batch_size=16..64", "trainer.max_iter=300")
FAST = ("trainer.log_every=20", "checkpoint.save_iter=50", "checkpoint.keep_last=9")


def started(log: Path, *options: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "fewstep", "sweep", *REAL, *FAST, *options]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def finished(root: Path) -> dict[Path, int]:
    return {path.parent: path.stat().st_mtime_ns for path in root.glob("analytic/basic/*.trial*/summary.json")}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_two_at_once_share_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undisturbed; killed in the midst of a training, and resumed; by two commands at once: each 6 results, none run twice."""
    log = root / "log"
    process = started(log, "--trials", "6")
    assert process.wait(300) == 0, log.read_text()
    wanted = [dict(trial.settings) for trial in searched(*REAL, *FAST, num=6).trials()]

    monkeypatch.setenv("OUTPUT_ROOT", str(root / "killed"))
    process = started(log, "--trials", "6")
    deadline = time.monotonic() + 120
    while len(finished(root / "killed")) < 2 or not list(root.glob("killed/analytic/basic/*.trial002/config.yaml")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(root / "killed")
    assert 2 <= len(before) < 6
    process = started(log, "--trials", "6")
    assert process.wait(300) == 0, log.read_text()
    after = finished(root / "killed")
    assert len(after) == 6 and all(after[folder] == when for folder, when in before.items())
    assert [dict(trial.settings) for trial in searched(*REAL, *FAST, num=6).trials()] == wanted

    monkeypatch.setenv("OUTPUT_ROOT", str(root / "shared"))
    processes = [started(log, "--trials", "6") for _ in range(2)]
    for process in processes:
        assert process.wait(300) == 0, log.read_text()
    assert sorted(path.name[-3:] for path in finished(root / "shared")) == [f"{number:03d}" for number in range(6)]
    for place in ("killed", "shared"):
        for folder in finished(root / place):
            steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert steps == sorted(set(steps)) and steps[-1] == 300


@pytest.mark.slow
def test_tpe_finds_a_better_learning_rate_than_chance(root: Path) -> None:
    """16 trials over five decades: the median of its own six is better than that of its ten random ones, and the best of all is
    better than every trial in the worse half of the range."""
    words = ["experiment=analytic_kd", "optim.lr=1e-6..1e-1", "trainer.max_iter=300", "optim.warmup_iters=20"]
    assert main(["sweep", *words, "trainer.log_every=100", "--trials", "16"]) == 0
    trials = searched(*words, "trainer.log_every=100", num=16).trials()
    scores = [RunRecord.read(trial.folder).values["energy_distance"] for trial in trials]
    rates = [float(trial.settings[0][1]) for trial in trials]
    by_rate = [[score for rate, score in zip(rates, scores, strict=True) if (rate < 10**-3.5) == low] for low in (True, False)]
    worse = max(by_rate, key=lambda half: sorted(half)[len(half) // 2])
    assert np.median(scores[10:]) < np.median(scores[:10]) and min(scores) < min(worse)
