"""Parameters of a recipe, set on a command line beside the settings of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from toy_settings import Kd, Optim, Run

from fewstep.config import (
    ConfigError,
    build_recipe,
    compose,
    find_recipe,
    from_yaml,
    read_command,
    recipe,
    settings_help,
    to_yaml,
)


@recipe("toy_with_arguments")
def with_arguments(steps: int = 4, first: float | None = None, form: Literal["a", "b"] = "a") -> Run:
    """A run of as many times as steps."""
    times = tuple((first or 1.0) * (steps - n) / steps for n in range(steps))
    return Run(Kd(times), optim=Optim(lr=1e-5), name=form)


@recipe("toy_with_a_hidden_setting")
def hiding(trainer: int = 1) -> Run:
    return Run(Kd((1.0,)))


def run(*words: str) -> Run:
    return compose(read_command(["experiment=toy_with_arguments", *words]), Run)


def problems(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*words)
    return str(caught.value)


def test_arguments_and_settings_stand_side_by_side() -> None:
    assert run() == Run(Kd((1.0, 0.75, 0.5, 0.25)), optim=Optim(lr=1e-5), name="a")
    assert run("optim.lr=1", "steps=2", "form=b") == Run(Kd((1.0, 0.5)), optim=Optim(lr=1.0), name="b")
    assert run("steps=2", "first=0.5", "method.t_list=[0.3]").method == Kd((0.3,))  # a setting is the last word
    assert build_recipe("toy_with_arguments", ["steps=1"]).method == Kd((1.0,))


def test_the_configuration_runs_again_without_them(tmp_path: Path) -> None:
    made = run("steps=3", "first=0.9")
    (tmp_path / "config.yaml").write_text(to_yaml(made))
    assert compose(read_command([str(tmp_path / "config.yaml")]), Run) == made == from_yaml(Run, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="steps: no such setting"):
        compose(read_command([str(tmp_path / "config.yaml"), "steps=3"]), Run)


def test_wrong_ones_are_named_and_near_ones_suggested() -> None:
    assert problems("steps=four", "form=c").split("\n") == [
        "steps: expected int, got 'four'",
        "form: expected a | b, got 'c'",
    ]
    assert problems("stepps=2") == "stepps: no such setting; did you mean steps?"
    assert "there are: steps, first, form, method" in problems("qqq=2")


def test_they_are_listed() -> None:
    assert find_recipe("toy_with_arguments").usage == "steps=4 first= form=a"
    assert find_recipe("toy").usage == ""
    rows = settings_help("experiment=toy_with_arguments", ["steps=1"])
    assert next(row.value for row in rows if row.key == "method.t_list") == [1.0]


def test_a_parameter_must_not_hide_a_setting() -> None:
    with pytest.raises(TypeError, match="rename its parameter 'trainer'"):
        build_recipe("toy_with_a_hidden_setting")
