"""One thing has one name in every verb: the options of all of them, walked."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from fewstep.cli.options import SPELLINGS


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
