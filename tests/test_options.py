"""One thing has one name in every verb: the options of all of them, walked."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from fewstep.cli.options import SPELLINGS
from fewstep.config import Command, ConfigError, compose
from fewstep.recipes import SETTINGS, refuse_mistyped
from fewstep.training.run import Run


def _listing() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "list_options.py"
    spec = spec_from_file_location("list_options", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


listing = _listing()
OPTIONS = [option for option in listing.options() if not option.is_hidden]
# Steps of distill are those of its student: the solver's of its teacher are --teacher-steps there.
OTHERWISE = {("distill", "--steps")}
# What an option is called, and what it is not.
NOT_CALLED = {
    "--out": {"--output", "--output-dir", "--save-dir", "--dest"},
    "--num-steps": {"--sampling-steps", "--num-inference-steps", "--sample-steps"},
    "--height, --width": {"--size", "--video-size", "--resolution"},
    "--num-frames": {"--frames", "--length", "--num-video-frames"},
    "--sampler": {"--solver", "--scheduler"},
    "--text-encoder": {"--encoder", "--text-model"},
    "--codec": {"--vae", "--tokenizer", "--tokenizer-dir"},
    "--precision": {"--compute-dtype"},
    "--config": {"--plugin", "--import"},
    "--device": {"--gpu"},
    "--num": {"--limit", "--count", "--num-samples"},
    "--format": {"--form", "--kind"},
    "--negative-prompt": {"--negative-text"},
}


def test_an_option_has_the_same_spellings_in_every_verb() -> None:
    of_name: dict[str, tuple[str, ...]] = {spelling: each for each in SPELLINGS for spelling in each}
    wrong = [
        f"{option.verb}: {' '.join(option.spellings)}, elsewhere {' '.join(of_name[name])}"
        for option in OPTIONS
        for name in option.spellings
        if of_name.setdefault(name, option.spellings) != option.spellings and (option.verb, name) not in OTHERWISE
    ]
    assert not wrong, "\n".join(wrong)


def test_no_option_has_two_names() -> None:
    first = {option.spellings[0]: option.verb for option in OPTIONS}
    wrong = [f"{first[name]} {name}: is {ours}" for ours, names in NOT_CALLED.items() for name in names & first.keys()]
    assert not wrong, "\n".join(wrong)
    assert all("_" not in name for option in OPTIONS for name in option.spellings)


def test_every_whole_number_has_a_least_value() -> None:
    bare = [f"{option.verb} {option.spellings[0]}" for option in OPTIONS if "int" in str(option.type) and option.least is None]
    assert [name for name in bare if not name.startswith("generate ")] == []  # whose values are checked by its request


def test_settings_that_are_refused_without_torch_are_those_of_the_classes() -> None:
    assert SETTINGS.read_text() == listing.settings(), "run: python docs/list_options.py"


@pytest.mark.parametrize("word", ["trainer.max_itr=3", "optim.lrr=1", "trainr.max_iter=2", "optim.schedul=cosine", "job.nam=x"])
def test_a_mistyped_setting_is_refused_as_the_classes_refuse_it(word: str) -> None:
    with pytest.raises(ConfigError) as late:
        compose(Command("analytic_dmd2", (), (word,)), Run)
    with pytest.raises(ConfigError) as early:
        refuse_mistyped([word])
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("word", ["method.guidanc=1", "data.num=3", "optim.betas.0=1", "teacher=x", "steps=2", "optim.zzz=1"])
def test_what_some_run_may_have_or_nothing_is_like_is_left_to_the_classes(word: str) -> None:
    refuse_mistyped([word])
