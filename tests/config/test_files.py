"""What is written is read back, whoever wrote it: dumps, YAML, Python files, pasted command lines."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import config, registry
from fewstep.config import (
    Command,
    ConfigError,
    apply_overrides,
    build_recipe,
    compose,
    dump,
    from_yaml,
    parse,
    read_command,
    recipe,
    to_yaml,
)

sys.path.insert(0, str(Path(__file__).parent))
from toy_settings import SHARED, Checkpoint, Dmd2, Kd, Optim, Run, Stage, Trainer, run, toy


def finite(**bounds: float) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False, **bounds)


KDS = st.builds(Kd, t_list=st.lists(finite()).map(tuple), lr=finite())
METHODS = KDS | st.builds(Dmd2, guidance=finite(), lr=finite(min_value=1e-300))
OPTIMS = st.builds(
    Optim, lr=finite(), betas=st.tuples(finite(), finite()), clip=st.none() | finite(), warmup_iters=st.integers()
)
LOOKALIKES = [
    "none",
    "Null",
    "true",
    "no",
    "1",
    "1.0",
    "1e5",
    "5e-7",
    "~",
    "",
    "a,b",
    "[a]",
    "{a: 1}",
    ".inf",
    "1_0",
    "- a",
    "#",
]
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # what a setting may hold
WORDS = st.text(CHARACTERS) | st.sampled_from(LOOKALIKES)
PATHS = st.text(CHARACTERS, min_size=1).map(Path)
RUNS = st.builds(
    Run,
    method=METHODS,
    second=st.none() | METHODS,
    optim=OPTIMS,
    critic_optim=st.none() | OPTIMS,
    trainer=st.builds(Trainer, precision=st.sampled_from(["fp32", "bf16"]), num_steps=st.sampled_from([1, 2, 4])),
    checkpoint=st.builds(Checkpoint, load_path=st.none() | WORDS),
    name=WORDS,
    folder=st.none() | PATHS,
    weights=st.none() | st.lists(WORDS).map(tuple),
    stages=st.lists(st.builds(Stage, st.integers(), st.lists(METHODS, max_size=2).map(tuple)), max_size=2).map(tuple),
    controls=st.dictionaries(WORDS, METHODS, max_size=2),
    cap=st.floats(allow_nan=False),
    counts=st.lists(st.integers(), min_size=1).map(tuple),
)


@given(RUNS)
@settings(deadline=None, max_examples=60)
def test_what_is_dumped_is_read_back_equal(made: Run) -> None:
    plain, text = dump(made), to_yaml(made)
    assert next(iter(plain["method"])) == "kind"
    assert parse(Run, plain) == made
    assert from_yaml(Run, text) == made
    assert yaml.safe_load(text) == plain  # another reader understands the file alike
    assert text.isascii()


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_a_character_that_no_file_of_settings_can_hold_is_refused_when_written(character: str) -> None:
    with pytest.raises(ConfigError, match="no text"):
        to_yaml(replace(toy(), weights=(f"a{character}b",)))


@pytest.mark.parametrize("word", [*LOOKALIKES, None])
def test_what_looks_like_something_else_is_read_back_as_it_was(word: Any) -> None:
    made = Run(Dmd2(), weights=None if word is None else (word,), checkpoint=Checkpoint(load_path=word))
    for read in (parse(Run, dump(made)), from_yaml(Run, to_yaml(made)), parse(Run, yaml.safe_load(to_yaml(made)))):
        assert read == made


@given(OPTIMS, OPTIMS)
@settings(deadline=None, max_examples=60)
def test_every_dumped_value_can_be_given_on_the_command_line(start: Optim, wanted: Optim) -> None:
    words = [f"{row.key}={row.value}" for row in config.fields_help(wanted)]
    assert apply_overrides(start, words) == wanted


KEYS = (
    st.sampled_from([row.key for row in config.fields_help(toy())] + ["optim", "stages", "stages.0", "controls.x"]) | st.text()
)


@given(st.lists(st.tuples(KEYS, st.sampled_from(["=", "=[", "={", "=!!int ", "=&a [*a", ""]), st.text()), max_size=4))
@settings(deadline=None, max_examples=300)
def test_no_text_makes_it_crash(parts: list[tuple[str, str, str]]) -> None:
    words = ["".join(part) for part in parts]
    try:
        command = read_command(["experiment=toy", *words])
        made = compose(replace(command, files=()), Run)
    except ConfigError as error:
        assert len(str(error).splitlines()) >= len(error.problems) > 0
    else:
        assert from_yaml(Run, to_yaml(made)) == made


@given(st.text())
@settings(deadline=None, max_examples=100)
def test_no_file_makes_it_crash(text: str) -> None:
    with pytest.raises(ConfigError):
        from_yaml(Run, text)  # there is always something missing: `method` has no default


def test_an_unquoted_word_of_a_file_means_what_its_setting_makes_of_it() -> None:
    read = from_yaml(
        Run,
        """
        method: dmd2
        optim: {lr: 5e-7, clip: none}
        critic_optim:
        name: no                          # YAML 1.1 would read false
        folder: 010                       # .. and 8
        checkpoint: {load_path: "none"}   # quoted: a text
        controls: {edge: &edge {kind: kd, t_list: [1]}, depth: {kind: kd, t_list: [1], lr: 2}}
        """,
    )
    assert (read.optim.lr, read.optim.clip, read.critic_optim, read.name) == (5e-7, None, None, "no")
    assert (read.folder, read.checkpoint.load_path) == (Path("010"), "none")
    assert read.controls == {"edge": Kd((1.0,)), "depth": Kd((1.0,), 2.0)}


def test_bad_yaml_names_its_line(tmp_path: Path) -> None:
    for text, told in (
        ("a: [1\nb: 2", "not YAML at line 2"),
        ("method: kd\nmethod: dmd2", "not YAML at line 2: 'method' is given twice"),
        ("name: !!python/object:os.system x", "not YAML at line 1: could not determine a constructor"),
        ("- 1", "must hold a mapping"),
        ("[" * 5000, "nested too deep"),
        ("optim: &one {lr: 1}\ncritic_optim: *one", "not YAML at line 2: *one is not read: write out its value"),
    ):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            compose(Command(files=(str(file),)), Run)
        assert str(caught.value).startswith(f"{file}: ")
        assert told in str(caught.value)


def test_a_run_starts_from_yaml_and_yaml_lies_over_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "lr=1" / "run.yaml"  # a path that looks like an override
    file.parent.mkdir()
    file.write_text("method: kd\noptim: {lr: 1e-5}\n")
    # What the file leaves open may come from the command line.
    assert compose(read_command([str(file), "method.t_list=1"]), Run) == Run(Kd((1.0,)), optim=Optim(lr=1e-5))
    made = run("--config", str(file), "method=dmd2", "method.lr=4")
    assert (made.method, made.optim.lr, made.controls) == (Dmd2(lr=4.0), 1e-5, SHARED)
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*did you mean .*run\.yaml\?"):
        config.load_file(file.with_name("runx.yaml"))
    with pytest.raises(ConfigError, match=r"which run\? Give experiment=NAME or a \.yaml file; there are: "):
        compose(Command(), Run)


USER_FILE = """
from __future__ import annotations

from dataclasses import dataclass, replace

from fewstep.config import build_recipe, kind, recipe


@kind("mine", group="toy_method")
@dataclass(frozen=True)
class Mine:
    strength: float = 0.5  # of the new term


@recipe("user_run")
def user_run():
    "The user's own."
    return replace(build_recipe("toy"), method=Mine())
"""


def test_the_command_lines_of_cosmos_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {group: dict(kinds) for group, kinds in registry._ENTRIES.items()}
    monkeypatch.setattr(registry, "_ENTRIES", known)  # the kind of this file is gone again after the test
    (tmp_path / "my recipes.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    words = ["--config=my recipes.py", "--", "experiment=user_run", "trainer.max_iter=100", "checkpoint.save_iter=40"]
    command = read_command(["--dryrun", *words])
    assert command == Command("user_run", ("my recipes.py",), ("trainer.max_iter=100", "checkpoint.save_iter=40"), True)
    for line in (words, ["-", *words[2:], "--config", "./my recipes.py", "--"]):  # twice: a module may be loaded again
        made = compose(read_command(line), Run)
        assert (made.method.strength, made.trainer.max_iter, made.checkpoint.save_iter) == (0.5, 100, 40)
    found = config.recipes()["user_run"]
    assert found.doc == "The user's own."
    assert found.module.startswith("fewstep_config_my_recipes_")
    assert [row for row in config.fields_help(made) if row.key == "method.strength"] == [
        ("method.strength", "float", 0.5, "of the new term")
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef (", "mine.py:2: is not Python: "),
        ("\n\nraise KeyError('gone')", "mine.py:3: KeyError: 'gone'"),
        ("import no_such_module_anywhere", "mine.py:1: ModuleNotFoundError: .*PYTHONPATH"),
        ("from fewstep.config import recipe\n@recipe('toy')\ndef f(): pass", "mine.py:2: recipe 'toy' is "),
    ],
)
def test_a_broken_python_file_names_its_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        config.load_file(file)
    assert len(str(caught.value).splitlines()) == 1
    assert not [name for name in sys.modules if name.startswith("fewstep_config_mine_")]


def test_words_that_are_no_command_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_command(["toy", "--dry-run", "-x", "--config", "experiment=a", "experiment=b", "--config="])
    assert str(caught.value).split("\n") == [
        "toy: neither KEY=VALUE nor a .yaml or .py file; did you mean experiment=toy?",
        "--dry-run: no such option; did you mean --dryrun?",
        "-x: no such option; there are: --config, --dryrun; settings are KEY=VALUE",
        "--config: needs a file: --config FILE.py or --config FILE.yaml",
        "--config=: needs a file: --config FILE.py or --config FILE.yaml",
        "experiment: given twice, as a and as b: settings belong to one of them; keep one",
    ]
    with pytest.raises(ConfigError, match=r"experiment: no recipe is named 'toyy'; did you mean toy\?"):
        compose(read_command(["experiment=toyy"]), Run)
    with pytest.raises(ConfigError, match="experiment: toy makes a Run, not a Optim"):
        compose(read_command(["experiment=toy"]), Optim)


def test_a_recipe_with_a_wrong_value_is_named() -> None:
    @recipe("toy_broken")
    def broken() -> Run:
        return replace(toy(), optim=Optim(lr="fast"))  # pyright: ignore[reportArgumentType]

    with pytest.raises(ConfigError, match=r"optim\.lr: expected float, got 'fast' \(set by recipe toy_broken\)"):
        build_recipe("toy_broken")


def test_a_program_runs_only_where_it_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match=r"is a program, which is run only where it is named as one: --config .*evil\.py"):
        read_command(["experiment=x", str(tmp_path / "evil.py")])
    assert not (tmp_path / "ran").exists()
