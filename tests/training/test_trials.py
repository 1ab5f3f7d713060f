"""Sweeps, the list of runs and the comparison of two: from run folders alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.config import ConfigError, read_command
from fewstep.training.records import RunRecord, best_first, find_runs, run_at, score_of
from fewstep.training.run import Run
from fewstep.training.trials import Queue, Sweep, first, plan_sweep, show, split_values

SIX = ("experiment=analytic_finetune", "optim.lr=1e-3,2e-3,4e-3", "trainer.batch_size=32,64")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    return tmp_path


def swept(*words: str) -> Sweep:
    return plan_sweep(read_command(words), Run)


def write_run(folder: Path, lr: float, step: int, last: int, **values: float) -> None:
    """A run folder as `fewstep train` leaves it; finished if step is last."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"method:\n  kind: kd\noptim:\n  lr: {lr}\ntrainer:\n  max_iter: {last}\n")
    lines = [json.dumps({"step": n, "loss/kd": 1.0 / (n + 1)}) for n in range(step + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "unfin')
    if step == last:
        (folder / "summary.json").write_text(json.dumps({"recipe": "x", "step": step, "wall_s": 2.0, **values}))


def test_values_are_separated_by_commas_outside_of_brackets_and_quotes() -> None:
    assert split_values("1e-5,5e-6") == ["1e-5", "5e-6"]
    assert split_values("[1.0,0.6],[1.0]") == ["[1.0,0.6]", "[1.0]"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    assert split_values("a,") == ["a,"] and split_values("") == [""]


def test_every_combination_is_a_run_folder_beside_the_others(root: Path) -> None:
    sweep = swept(*SIX)
    assert [trial.folder.name for trial in sweep.trials()] == [
        f"analytic_finetune.lr={lr},batch_size={size}" for lr in ("1e-3", "2e-3", "4e-3") for size in ("32", "64")
    ]
    assert {trial.folder.parent for trial in sweep.trials()} == {root / "analytic/basic"}
    command = sweep.command(sweep.trials()[3])
    assert command[:3] == ("fewstep", "train", "experiment=analytic_finetune")
    assert {"optim.lr=2e-3", "trainer.batch_size=64", f"job.name={sweep.trials()[3].folder.name}"} == set(command[3:])
    named = swept(*SIX, "job.name=study")
    assert (
        named.folder == root / "analytic/basic/study.sweep" and named.trials()[0].folder.name == "study.lr=1e-3,batch_size=32"
    )


def test_a_sweep_that_cannot_run_is_refused_with_every_problem() -> None:
    with pytest.raises(ConfigError, match="no setting has several values"):
        swept("experiment=analytic_finetune", "optim.lr=1e-3")
    with pytest.raises(ConfigError, match="has a value twice"):
        swept("experiment=analytic_finetune", "optim.lr=1e-3,1e-3")
    with pytest.raises(ConfigError) as error:
        swept("experiment=analytic_finetune", "optim.lr=-1,1e-3", "trainer.batch_size=0,8")
    assert [key for key, _ in error.value.problems] == ["trainer.batch_size", "optim.lr"] or {
        key for key, _ in error.value.problems
    } == {"trainer.batch_size", "optim.lr"}


def test_finished_trials_are_left_out_and_locked_ones_come_last(root: Path) -> None:
    from fewstep.training.alone import alone_in

    sweep = swept(*SIX)
    write_run(sweep.trials()[0].folder, 1e-3, 2000, 2000, energy_distance=0.3)
    sweep.trials()[1].folder.mkdir(parents=True)
    commands = Queue(sweep).commands(("NAME=1",))
    with alone_in(sweep.trials()[1].folder):
        names = [next(commands)[-1] for _ in range(4)]
    names += [command[-1] for command in commands]
    assert names == [f"job.name={sweep.trials()[n].folder.name}" for n in (2, 3, 4, 5, 1)]


def test_a_stage_is_trained_by_one_process_and_waited_for_by_others(root: Path) -> None:
    folder = root / "analytic/basic/analytic_finetune"
    commands, others = first("analytic_finetune"), first("analytic_finetune")
    assert next(commands) == ("fewstep", "train", "experiment=analytic_finetune") and next(others) == ()
    assert list(commands) == [] and next(others)[0] == "fewstep"  # it was not finished there
    write_run(folder, 1e-3, 2000, 2000)
    assert list(others) == [] == list(first("analytic_finetune"))


def test_the_table_of_trials_is_sorted_and_written(root: Path) -> None:
    sweep = swept("experiment=analytic_finetune", "optim.lr=1e-3,2e-3,4e-3")
    for trial, score in zip(sweep.trials(), (0.3, 0.1), strict=False):
        write_run(trial.folder, float(trial.settings[0][1]), 2000, 2000, energy_distance=score)
    text = show(sweep, None).splitlines()
    assert text[0].split()[:4] == ["trial", "state", "step", "energy_distance"]
    assert [line.split()[3] for line in text[1:3]] == ["0.1", "0.3"] and text[3] == "1 trials have not begun"
    written = json.loads((sweep.folder / "trials.json").read_text())
    assert written["by"] == "energy_distance" and [trial["values"]["energy_distance"] for trial in written["trials"]] == [
        0.1,
        0.3,
    ]
    assert "<svg" in (sweep.folder / "trials.svg").read_text()
    assert show(sweep, "energy_distance", highest=True).splitlines()[1].split()[3] == "0.3"


def test_runs_are_read_whatever_state_they_are_in(root: Path) -> None:
    write_run(root / "p/g/done", 1e-3, 4, 4, energy_distance=0.5, energy_distance_undistilled=0.9)
    write_run(root / "p/g/begun", 2e-3, 3, 4)
    write_run(root / "p/g/longer", 1e-3, 4, 4, energy_distance=0.2)
    longer = root / "p/g/longer/config.yaml"
    longer.write_text(longer.read_text().replace("max_iter: 4", "max_iter: 9"))
    (root / "p/g/broken/checkpoints").mkdir(parents=True)
    (root / "p/g/broken/config.yaml").write_bytes(b"\xff\xfe: [")
    (root / "p/g/done/checkpoints/inner").mkdir()
    (root / "p/g/done/checkpoints/inner/config.yaml").write_text("a: 1")
    runs = {record.folder.name: record for record in find_runs(root)}
    assert {name: record.state for name, record in runs.items()} == {
        "done": "finished", "begun": "unfinished", "longer": "unfinished", "broken": "damaged",
    }  # fmt: skip
    assert runs["begun"].step == 3 and runs["begun"].scores == {"loss/kd": 0.25}
    assert list(runs["done"].scores) == ["energy_distance", "loss/kd"]
    assert score_of(list(runs.values()), None) == "loss/kd"  # three have it
    clips = {
        "preview/motion": 0.1,
        "preview/teacher_mse": 0.4,
        "preview/teacher_mse_undistilled": 0.9,
        "derivative_error": 0.01,
    }
    write_run(root / "q/g/clips", 1e-3, 4, 4, **clips)
    assert list(run_at("q/g/clips").scores) == ["preview/teacher_mse", "loss/kd"]  # the least motion is not the best
    ordered = best_first(list(runs.values()), "energy_distance")
    assert [record.folder.name for record in ordered[:2]] == ["longer", "done"]


def test_ls_runs_and_compare(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(root / "p/g/one", 1e-3, 4, 4, energy_distance=0.5)
    write_run(root / "p/g/two", 2e-3, 4, 4, energy_distance=0.25)
    assert main(["ls", "runs", "--by", "energy_distance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "p/g/two", "p/g/one"] and lines[1].split()[1:5] == [
        "kd",
        "4",
        "finished",
        "0.25",
    ]
    assert main(["ls", "runs", "--json", "--by", "energy_distance", "--highest"]) == 0
    assert [row["values"]["energy_distance"] for row in json.loads(capsys.readouterr().out)] == [0.5, 0.25]
    assert main(["compare", "p/g/one", str(root / "p/g/two"), "--by", "loss/kd", "--out", str(root / "x.svg")]) == 0
    out = capsys.readouterr().out
    assert "optim.lr         0.001" in out and "trainer.max_iter" not in out and "energy_distance  0.5" in out
    assert "loss/kd" in (root / "x.svg").read_text()
    assert main(["compare", "p/g/one", "p/g/none"]) == 1
    assert "is no run folder" in capsys.readouterr().err
    assert main(["ls", "runs", "--by", "nothing"]) == 2
    assert "no run has it; there are" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_that_was_killed_ends_with_six_results_and_runs_none_twice(root: Path) -> None:
    """The whole group is killed while two trials are at work; then the same command."""
    command = [sys.executable, "-m", "fewstep", "sweep", *SIX, "trainer.max_iter=400", "trainer.log_every=20", "--workers", "2"]
    settings = ["checkpoint.save_iter=100", "checkpoint.keep_last=9"]
    quiet = subprocess.DEVNULL
    first = subprocess.Popen([*command, *settings], stdout=quiet, stderr=quiet, start_new_session=True)
    trials = [trial.folder for trial in swept(*SIX).trials()]

    def finished() -> list[Path]:
        return [folder for folder in trials if (folder / "summary.json").is_file()]

    try:
        deadline = time.monotonic() + 120
        while len(finished()) < 2 or len([folder for folder in trials if (folder / "config.yaml").is_file()]) < 4:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    before = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in finished()}
    assert 2 <= len(before) < 6
    again = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(finished()) == 6
    assert all((folder / "summary.json").stat().st_mtime_ns == when for folder, when in before.items())
    for folder in trials:
        log = (folder / "log.txt").read_text()
        assert log.count("from the beginning") <= 1 + ("resuming" not in log and folder not in before)  # killed before it saved
        steps = [record["step"] for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
        assert steps == sorted(set(steps)) and steps[-1] == 400
        assert RunRecord.read(folder).state == "finished"
    assert len(json.loads((swept(*SIX).folder / "trials.json").read_text())["trials"]) == 6


@pytest.mark.slow
def test_a_sweep_that_waits_for_another_process_ends_when_it_is_stopped(root: Path) -> None:
    from fewstep.training.alone import alone_in

    words = ["experiment=analytic_finetune", "optim.lr=1e-3,2e-3"]
    first, second = (trial.folder for trial in swept(*words).trials())
    with alone_in(first), alone_in(second):
        command = [sys.executable, "-m", "fewstep", "sweep", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (second / ".lock.sweep").is_file():  # it has looked whether it may train it
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 1
    assert not any((folder / "config.yaml").is_file() for folder in (first, second))
