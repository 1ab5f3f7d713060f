"""What a run says, and says once."""

import json
from pathlib import Path

import pytest

from fewstep.progress import TimeLeft
from fewstep.training.log import RunLog


def test_no_time_is_promised_before_there_is_something_to_go_by() -> None:
    left = TimeLeft()
    assert left.text(1, 10, now=300.0) == ""  # the first iteration took five minutes: it compiled and read
    assert left.text(3, 10, now=304.0) == ", 14 s left"  # two in four seconds since
    assert left.text(10, 10, now=318.0) == ""
    assert left.text(0, 10, now=400.0) == ""  # it went back to an earlier checkpoint


def test_values_stand_in_metrics_and_in_tensorboard(tmp_path: Path) -> None:
    with RunLog(tmp_path, "run", 0, 10) as log:
        log.metrics(0, {"score": 3.0})
        log.losses(5, {"loss/kd": 1.0, "lr/student": 1e-3})
        log.metrics(5, {"loss/kd": 1.0, "lr/student": 1e-3})
        log.metrics(10, {"loss/kd": 0.5, "score": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "score": 3.0},
        {"step": 5, "loss/kd": 1.0, "lr/student": 1e-3},
        {"step": 10, "loss/kd": 0.5, "score": 1.0},
    ]
    assert log.at_start == {"score": 3.0}
    assert log.last == {"score": 1.0, "loss/kd": 0.5, "lr/student": 1e-3}
    assert scalars(tmp_path)["loss/kd"] == [(5, 1.0), (10, 0.5)]
    assert "step 5/10  kd 1" in (tmp_path / "log.txt").read_text()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_that_goes_on_drops_what_it_will_say_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, "run", 0, 10) as log:
        for step in (0, 2, 4, 6):
            log.metrics(step, {"loss/kd": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/kd"')  # killed within the line
    with RunLog(tmp_path, "run", 4, 10) as log:
        assert log.at_start == {"loss/kd": 0.0} and log.last == {"loss/kd": 4.0}
        for step in (6, 8):
            log.metrics(step, {"loss/kd": step + 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss/kd"]) for line in lines] == [(0, 0.0), (2, 2.0), (4, 4.0), (6, 6.5), (8, 8.5)]
    assert scalars(tmp_path)["loss/kd"] == [(0, 0.0), (2, 2.0), (4, 4.0), (6, 6.5), (8, 8.5)]


def test_a_run_that_begins_anew_says_everything_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):  # the first one was killed before its first checkpoint
        with RunLog(tmp_path, "run", 0, 10) as log:
            log.metrics(0, {"score": value})
            log.metrics(1, {"score": value})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "score": 2.0}, {"step": 1, "score": 2.0}]


def test_rewind(tmp_path: Path) -> None:
    with RunLog(tmp_path, "run", 0, 10) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"score": float(step)})
        log.rewind(1)
        assert log.last == {"score": 1.0}
        log.metrics(2, {"score": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["score"]) for line in lines] == [(1, 1.0), (2, 9.0)]
    assert scalars(tmp_path)["score"] == [(1, 1.0), (2, 9.0)]


def test_other_ranks_write_nothing_and_know_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, "run", 0, 10) as log:
        log.say("hello")
        log.metrics(0, {"score": 1.0})
        log.advance(1)
        log.rewind(0)
    assert list(tmp_path.iterdir()) == [] and log.at_start == {"score": 1.0}


def test_whoever_watches_a_terminal_sees_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with RunLog(tmp_path, "my_run", 0, 10) as log:
        for step in range(1, 11):
            log.losses(step, {"loss/kd": 0.25})
            log.advance(step)
        log.say("a line above the bar")
    said = capfd.readouterr().err
    for part in ("my_run", "10/10", "kd 0.25", "a line above the bar"):
        assert part in said
