"""The configuration as its users meet it: command lines, recipes, and messages about mistakes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from fewstep import config
from fewstep.config import (
    ConfigError,
    apply_overrides,
    build_recipe,
    kind,
    parse,
    read_command,
    recipe,
)
from fewstep.config.problems import hint

sys.path.insert(0, str(Path(__file__).parent))
from toy_settings import SHARED, Dmd2, Kd, Optim, Run, Stage, Trainer, message, run, toy

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
        ("weights=a,b", "weights", ("a", "b")),
        ("weights=[a, 'b c']", "weights", ("a", "b c")),
        ("weights=none", "weights", None),
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
        "critic_optim: given as 'none', and critic_optim.lr too; keep one"
    ]


def test_of_many_names_only_those_like_it_are_listed_or_else_the_shortest() -> None:
    many = [f"CTRL_7Bv1pt3_lvg_tp_121frames_{n:02d}" for n in range(20)] + ["kd", "dmd2", "rcm", "finetune"]
    assert hint("dmd", many) == "; did you mean dmd2?"
    assert hint("finetunes", ["finetune", "lora"]) == "; did you mean finetune? (there are: finetune, lora)"
    listed = hint("", many)
    assert listed.startswith("; there are: kd, rcm, dmd2, finetune, CTRL_") and listed.endswith(", ...")
    assert hint("x", []) == "; there are none"


@kind("plain", group="toy_path")
@dataclass(frozen=True)
class Plain:
    t_max: float = 1.0
    optim: Optim = Optim()


@config.preset("steep", group="toy_path")
def steep() -> Plain:
    return Plain(t_max=9.0, optim=Optim(lr=5.0, clip=3.0))


@dataclass(frozen=True)
class OnPath:
    path: Annotated[Any, config.OneOf("toy_path")] = Plain()


def test_a_preset_is_a_value_under_a_name_of_its_own() -> None:
    """It is chosen and changed as a kind is; the dump holds the kind and every value."""
    assert config.presets("toy_path") == {"steep": steep}
    changed = apply_overrides(OnPath(), ["path=steep", "path.optim.lr=7"])
    assert changed.path == Plain(9.0, Optim(lr=7.0, clip=3.0))
    assert config.dump(changed)["path"]["kind"] == "plain"
    assert parse(OnPath, config.dump(changed)) == changed
    assert parse(OnPath, {"path": {"kind": "steep", "t_max": 2}}).path == Plain(2.0, Optim(lr=5.0, clip=3.0))
    with pytest.raises(ConfigError, match="no toy_path is named 'steeep'; did you mean steep"):
        apply_overrides(OnPath(), ["path=steeep"])
    with pytest.raises(ValueError, match=r"toy_path .plain. is both .*Plain"):
        config.preset("plain", group="toy_path")(steep)


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


def test_of_a_setting_given_twice_the_last_counts_and_a_contradiction_is_refused() -> None:
    assert run("optim.lr=1", "optim.lr=1").optim.lr == 1.0
    assert run("optim.lr=1", "optim.lr=2").optim.lr == 2.0
    command = read_command(["experiment=x", "optim.lr=1", "a.b=3", "optim.lr=1", "optim.lr=2", "a.b=3"])
    assert command.repeated() == ["optim.lr is given 3 times; the last one counts: optim.lr=2, not 1, 1"]
    assert message("optim={lr: 1}", "optim.lr=2") == ["optim: given as '{lr: 1}', and optim.lr too; keep one"]
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
        (int | str, "cannot be a setting; use bool, int"),
        (Path | str | None, "cannot be a setting"),
        (Optim | Trainer, r'Annotated\[..., OneOf\("group"\)\], or one of these \| None'),
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
