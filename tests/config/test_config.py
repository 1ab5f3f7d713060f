"""The configuration as its users meet it: command lines, files, recipes, and messages about mistakes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Gt, MinLen
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AllowInfNan

from fewstep import config
from fewstep.config import (
    Command,
    ConfigError,
    OneOf,
    apply_overrides,
    build_recipe,
    compose,
    dump,
    from_yaml,
    kind,
    parse,
    read_command,
    recipe,
    to_yaml,
)


@kind("kd", group="toy_method")
@dataclass(frozen=True)
class Kd:
    t_list: tuple[float, ...]  # descending, without the final 0
    lr: float = 1.0


@kind("dmd2", group="toy_method")
@dataclass(frozen=True)
class Dmd2:
    guidance: float = 5.0  # the edge recipe
    lr: Annotated[float, Gt(0)] = 2.0

    def problems(self) -> list[tuple[str, str]]:
        return [("warn:guidance", "is high")] if self.guidance > 10 else []


AnyMethod = Annotated[Any, OneOf("toy_method")]


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3  # per step
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup_iters: int = 0

    def problems(self) -> list[tuple[str, str]]:
        return [] if self.lr > 0 else [("lr", f"is {self.lr}: nothing would be trained")]


@dataclass(frozen=True)
class Trainer:
    max_iter: int = 1000  # iterations
    precision: Literal["fp32", "bf16"] = "fp32"
    num_steps: Literal[1, 2, 4] = 1
    compile: bool = False


@dataclass(frozen=True)
class Checkpoint:
    save_iter: int = 500
    load_path: str | None = None


@dataclass(frozen=True)
class Stage:
    size: int
    methods: tuple[AnyMethod, ...] = ()


@dataclass(frozen=True)
class Run:
    method: AnyMethod
    second: AnyMethod | None = None
    optim: Optim = Optim(lr=3e-4)
    critic_optim: Optim | None = None
    trainer: Trainer = Trainer()
    checkpoint: Checkpoint = Checkpoint()
    name: str = "run"
    folder: Path | None = None
    weights: str | tuple[str, ...] = ""
    threads: int | Literal["auto"] = "auto"
    stages: tuple[Stage, ...] = ()
    controls: Mapping[str, AnyMethod] = field(default_factory=dict)
    cap: Annotated[float, AllowInfNan()] = math.inf
    counts: Annotated[tuple[int, ...], MinLen(1)] = (1,)
    mixed: int | float | str | None = None

    def problems(self) -> list[tuple[str, str]]:
        wrong = self.optim.warmup_iters > self.trainer.max_iter
        return [("optim.warmup_iters", "is longer than the run")] if wrong else []


SHARED: dict[str, Dmd2] = {"edge": Dmd2()}


@recipe("toy")
def toy() -> Run:
    """A toy run.

    Not its first line.
    """
    return Run(Dmd2(), controls=SHARED, stages=(Stage(8), Stage(16)))


def run(*words: str) -> Run:
    return compose(read_command(["experiment=toy", *words]), Run)


def message(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run(*words)
    return sorted(str(caught.value).split("\n"))


# ---- values by declared type


@pytest.mark.parametrize(
    ("word", "key", "wanted"),
    [
        ("optim.lr=5e-7", "optim.lr", 5e-7),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.clip=1e3", "optim.clip", 1000.0),
        ("optim.clip=none", "optim.clip", None),
        ("optim.betas=0.5,0.6", "optim.betas", (0.5, 0.6)),
        ("optim.betas=[5e-1, 0.6]", "optim.betas", (0.5, 0.6)),
        ("optim.betas.1=0.7", "optim.betas", (0.9, 0.7)),
        ("trainer.max_iter=1_000", "trainer.max_iter", 1000),
        ("trainer.max_iter=8Ki", "trainer.max_iter", 8192),
        ("trainer.max_iter=2e3", "trainer.max_iter", 2000),
        ("trainer.compile=true", "trainer.compile", True),
        ("trainer.precision=bf16", "trainer.precision", "bf16"),
        ("trainer.num_steps=4", "trainer.num_steps", 4),
        ("name=123", "name", "123"),
        ("name=none", "name", "none"),
        ("name=a=b, [c", "name", "a=b, [c"),
        ("name=", "name", ""),
        ("folder=a/../b", "folder", Path("a/../b")),
        ("folder=null", "folder", None),
        ("checkpoint.load_path=runs/kd@latest:student.ema", "checkpoint.load_path", "runs/kd@latest:student.ema"),
        ("weights=a,b", "weights", "a,b"),
        ("weights=[a, 'b c']", "weights", ("a", "b c")),
        ("threads=4", "threads", 4),
        ("threads=auto", "threads", "auto"),
        ("cap=-.inf", "cap", -math.inf),
        ("counts=3", "counts", (3,)),
        ("counts=1,2,", "counts", (1, 2)),
    ],
)
def test_text_becomes_a_value_of_the_declared_type(word: str, key: str, wanted: object) -> None:
    value: Any = run(word)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.lr=abc", "optim.lr: expected float, got 'abc'"),
        ("optim.lr=none", "optim.lr: expected float, got 'none'"),
        ("optim.lr=true", "optim.lr: expected float, got 'true'"),
        ("optim.lr=nan", "optim.lr: must be a finite number, got nan"),
        ("method.lr=-1", "method.lr: must be greater than 0, got -1.0"),
        ("trainer.max_iter=1.5", "trainer.max_iter: expected int, got '1.5'"),
        ("trainer.max_iter=true", "trainer.max_iter: expected int, got 'true'"),
        ("trainer.max_iter=1e999999999", "trainer.max_iter: expected int, got '1e999999999'"),
        ("trainer.compile=1", "trainer.compile: expected true | false, got '1'"),
        ("trainer.precision=fp23", "trainer.precision: expected fp32 | bf16, got 'fp23'; did you mean fp32?"),
        ("trainer.num_steps=3", "trainer.num_steps: expected 1 | 2 | 4, got '3'"),
        ("threads=many", "threads: expected int or auto, got 'many'"),
        ("optim.betas=1", "optim.betas: expected 2 values [float, float], got 1"),
        ("optim.betas=a,1", "optim.betas.0: expected float, got 'a'"),
        ("counts=", "counts: Value should have at least 1 item after validation, not 0, got ()"),
        ("folder=", "folder: expected path, got ''; write . for the current folder"),
        ("optim=5", "optim: expected the settings of Optim (lr, betas, clip, warmup_iters), got '5'"),
        ("optim={lr: 1", "optim: not YAML at line 1: expected ',' or '}', but got '<stream end>'"),
        ("trainer.max_iter", "trainer.max_iter: neither KEY=VALUE nor a .yaml or .py file; did you mean experiment="),
    ],
)
def test_a_wrong_value_is_told_with_its_key(word: str, told: str) -> None:
    (line,) = message(word)
    assert line.startswith(told)


def test_plain_data_keep_their_own_types() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Run, {"method": "dmd2", "trainer": {"max_iter": True, "compile": 1}, "optim": {"lr": "x"}, "name": 3})
    assert sorted(str(caught.value).split("\n")) == [
        "name: expected text, got 3; put it in quotes",
        "optim.lr: expected float, got 'x'",
        "trainer.compile: expected true | false, got 1",
        "trainer.max_iter: expected int, got True",
    ]
    # PyYAML's own loader leaves 5e-7 as text and 2000.0 as a float: both mean what they say.
    read = parse(Run, yaml.safe_load("{method: dmd2, optim: {lr: 5e-7, clip: none}, trainer: {max_iter: 2.0e+3}}"))
    assert (read.optim.lr, read.optim.clip, read.trainer.max_iter) == (5e-7, None, 2000)
    assert type(read.trainer.max_iter) is int


# ---- choices


def test_a_kind_is_swapped_before_what_is_set_inside_it() -> None:
    for words in (["method=kd", "method.t_list=3,1"], ["method.t_list=3,1", "method=kd"]):
        assert run(*words).method == Kd((3.0, 1.0), lr=1.0)  # not the 2.0 of dmd2
    assert run("method={kind: kd, t_list: [1]}").method == Kd((1.0,))
    assert run("second=dmd2", "second.lr=4").second == Dmd2(lr=4.0)
    assert run("controls.depth=kd", "controls.depth.t_list=1").controls == {"edge": Dmd2(), "depth": Kd((1.0,))}
    assert run("stages.1.methods=[kd, dmd2]", "stages.1.methods.0.t_list=1").stages[1].methods == (Kd((1.0,)), Dmd2())
    assert run("method.lr=7", "method=dmd2").method == Dmd2(lr=7.0)  # it is dmd2 already: nothing is forgotten


def test_a_swap_that_leaves_something_open_is_refused() -> None:
    assert message("method=kd", "method.lr=3") == ["method.t_list: needs a value ([float, ...]): kd has no default"]
    assert message("method=kd", "method.t_list.0=3") == ["method.t_list: needs a value ([float, ...])"]
    assert message("method=dmd", "method.lr=3") == [
        "method: no toy_method is named 'dmd'; did you mean dmd2? (there are: dmd2, kd)"
    ]
    assert message("second.lr=3") == ["second: choose a toy_method first, with second=NAME; there are: dmd2, kd"]
    assert message("method=none") == ["method: no toy_method is named 'none'; there are: dmd2, kd"]
    assert message("critic_optim=none", "critic_optim.lr=1") == [
        "critic_optim: given as none, and critic_optim.lr too; keep one"
    ]


def test_part_of_a_group_merges_over_what_is_there() -> None:
    assert run("optim={clip: 1.0}").optim == Optim(lr=3e-4, clip=1.0)
    assert run("critic_optim.lr=5e-7").critic_optim == Optim(lr=5e-7)
    assert run("stages.0.size=4").stages == (Stage(4), Stage(16))
    assert parse(Run, {"method": {"kind": "dmd2"}, "optim": {"clip": 2}}).optim == Optim(lr=3e-4, clip=2.0)


# ---- mistakes in keys


def test_five_wrong_keys_are_told_at_once_each_with_what_is_near() -> None:
    lines = message("trainer.max_iters=3", "trainr.precision=bf16", "checkpoint.lr=1", "method.guidanze=2", "max_iter=4")
    assert lines == [
        "checkpoint.lr: no such setting; did you mean optim.lr or method.lr?",
        "max_iter: no such setting; did you mean trainer.max_iter?",
        "method.guidanze: no such setting; did you mean method.guidance?",
        "trainer.max_iters: no such setting; did you mean trainer.max_iter?",
        "trainr.precision: no such setting; did you mean trainer.precision?",
    ]


def test_a_key_of_any_length_is_told() -> None:
    (line,) = message(".".join(["optim"] * 5000) + "=1")
    assert line.endswith(": no such setting; keys are at most 100 names deep")


def test_wrong_keys_and_wrong_values_are_told_together() -> None:
    lines = message("optim.lrr=1", "optim.clip=x", "stages.2.size=1", "optim.lr.x=1", "trainer.zzz=1", "optim.betas+=1")
    assert lines == [
        "optim.betas+: no such setting; did you mean optim.betas?",
        "optim.clip: expected float, got 'x'",
        "optim.lr.x: no such setting; did you mean optim.lr?",
        "optim.lrr: no such setting; did you mean optim.lr?",
        "stages.2.size: no such setting; did you mean stages.0.size or stages.1.size?",
        "trainer.zzz: no such setting; trainer has: max_iter, precision, num_steps, compile",
    ]


def test_the_same_key_twice_is_refused_unless_it_says_the_same() -> None:
    assert run("optim.lr=1", "optim.lr=1").optim.lr == 1.0
    assert message("optim.lr=1", "optim.lr=2") == ["optim.lr: given twice, as '1' and as '2'; keep one"]
    assert message("optim={lr: 1}", "optim.lr=2") == ["optim.lr: given twice, inside optim={...} and by itself; keep one"]
    assert message("method=kd", "method.kind=dmd2") == ["method: given twice, as 'kd' and as 'dmd2'; keep one"]


def test_check_collects_the_rules_of_every_group() -> None:
    lines = message("optim.lr=0", "critic_optim.lr=-1", "optim.warmup_iters=2e3")
    assert lines == [
        "critic_optim.lr: is -1.0: nothing would be trained",
        "optim.lr: is 0.0: nothing would be trained",
        "optim.warmup_iters: is longer than the run",
    ]
    assert config.check(run("method.guidance=11", "controls.edge.guidance=12")) == [
        "method.guidance: is high",
        "controls.edge.guidance: is high",
    ]


# ---- nothing is shared, nothing is mutated


def test_two_recipes_of_one_process_do_not_touch_each_other() -> None:
    first, second = build_recipe("toy"), build_recipe("toy")
    assert first == second
    first.controls["edge"] = Dmd2(lr=9.0)  # what a type checker forbids
    assert second.controls == SHARED == build_recipe("toy").controls == {"edge": Dmd2()}
    changed = apply_overrides(second, ["optim.lr=1", "controls.depth=dmd2", "method=kd", "method.t_list=1"])
    assert second == build_recipe("toy") != changed
    assert run("optim.lr=1").optim.lr == 1.0
    assert Run(Dmd2()).optim == Optim(lr=3e-4)
    with pytest.raises(FrozenInstanceError):
        second.optim.lr = 1.0


def test_classes_that_could_be_mutated_or_not_read_back_are_refused() -> None:
    @dataclass
    class Soft:
        x: int = 1

    with pytest.raises(TypeError, match=r"Soft can be mutated; declare it @dataclass\(frozen=True\)"):
        kind("soft", group="toy_other")(Soft)
    with pytest.raises(TypeError, match="is not a dataclass"):
        kind("int", group="toy_other")(int)
    with pytest.raises(TypeError, match="a default"):
        recipe("needs")(lambda x: x)
    for declared, told in (
        (list[int], r"list\[int\]|list cannot be a setting"),
        (Path | str, "could not be told"),
        (Optim | Trainer, "use @kind and OneOf"),
        (Any, "cannot be a setting"),
    ):
        holder = dataclass(frozen=True)(type("Holder", (), {"__annotations__": {"x": declared}}))
        with pytest.raises(TypeError, match=told):
            parse(holder, {"x": 1})
    factory = type("Holder", (), {"__annotations__": {"x": tuple[int, ...]}, "x": field(default_factory=list)})
    with pytest.raises(TypeError, match="its default can be mutated; use a tuple"):
        parse(dataclass(frozen=True)(factory), {})


def test_a_name_has_one_owner() -> None:
    with pytest.raises(ValueError, match=r"give .* another name"):
        kind("kd", group="toy_method")(dataclass(frozen=True)(type("Other", (), {})))
    with pytest.raises(ValueError, match=r"give .* another name"):
        recipe("toy")(run)
    assert config.choices("toy_method") == {"dmd2": Dmd2, "kd": Kd}
    assert (Kd.kind, Kd.group) == ("kd", "toy_method")  # pyright: ignore[reportAttributeAccessIssue]
    assert config.recipes()["toy"].doc == "A toy run."


# ---- files


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
WORDS = st.text() | st.sampled_from(LOOKALIKES)
PATHS = st.text(st.characters(exclude_characters="\0"), min_size=1).map(Path)
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
    weights=WORDS | st.lists(WORDS).map(tuple),
    threads=st.integers() | st.just("auto"),
    stages=st.lists(st.builds(Stage, st.integers(), st.lists(METHODS, max_size=2).map(tuple)), max_size=2).map(tuple),
    controls=st.dictionaries(WORDS, METHODS, max_size=2),
    cap=st.floats(allow_nan=False),
    counts=st.lists(st.integers(), min_size=1).map(tuple),
    mixed=st.none() | st.integers() | finite() | WORDS,
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


@pytest.mark.parametrize("word", [*LOOKALIKES, 1, 1.0, 10**30, 1e30, -0.0, None])
def test_what_looks_like_something_else_is_read_back_as_it_was(word: Any) -> None:
    made = Run(Dmd2(), mixed=word, checkpoint=Checkpoint(load_path=None if word is None else str(word)))
    for read in (parse(Run, dump(made)), from_yaml(Run, to_yaml(made)), parse(Run, yaml.safe_load(to_yaml(made)))):
        assert read == made
        assert (type(read.mixed), repr(read.mixed)) == (type(word), repr(word))


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
        controls: {edge: &edge {kind: kd, t_list: [1]}, depth: {<<: *edge, lr: 2}}
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


def test_the_command_lines_of_the_seeds_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {group: dict(kinds) for group, kinds in config.types._KINDS.items()}
    monkeypatch.setattr(config.types, "_KINDS", known)  # the kind of this file is gone again after the test
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
        ("from fewstep.config import recipe\n@recipe('toy')\ndef f(): pass", "mine.py:2: ValueError: recipe 'toy' is "),
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
        "experiment: given twice, as a and as b; keep one",
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


# ---- listing, import


def test_every_setting_is_listed_with_type_value_and_comment() -> None:
    rows = config.fields_help(toy())
    assert rows[:4] == [
        ("method", "dmd2 | kd", "dmd2", ""),
        ("method.guidance", "float", 5.0, "the edge recipe"),
        ("method.lr", "float", 2.0, ""),
        ("second", "dmd2 | kd or none", None, ""),
    ]
    table = {row.key: row for row in rows}
    assert table["trainer.max_iter"] == ("trainer.max_iter", "int", 1000, "iterations")
    assert table["stages.1.size"].value == 16
    assert {key.split(".")[0] for key in table} == {field.name for field in fields(Run)}


def test_importing_config_imports_no_torch_and_no_network() -> None:
    code = "import sys, fewstep.config; print(sorted({'torch', 'numpy', 'diffusers', 'fewstep.networks'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
