"""The command line: help and wrong use of every verb, without torch, with the status 2 and the name of what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.cli.ls import LISTS
from fewstep.config import recipes
from fewstep.recipes import NAMES
from fewstep.registry import groups

VERBS = (
    *("train", "plan", "export", "convert", "generate", "ls", "pairs", "evaluate", "report", "demo"),
    *("prepare", "prepare toyworld", "prepare text", "prepare controls", "prepare shards", "prepare latents"),
    *("check", "check data"),
)
WRONG = {
    "train experiment=analytic_finetun": "did you mean analytic_finetune?",
    "train --dryrum experiment=analytic_finetune": "did you mean --dryrun?",
    "train": "experiment: which run?",
    "plan experiment=nothing_like_it": "no recipe is named",
    "plan experiment=analytic_kd gpus=x": "gpus=x: give a number",
    "export": "Missing argument 'RUN'",
    "export run": "Missing option '--out'",
    "export run --out x --format y": "'y' is not one of auto",
    "convert": "give either SRC",
    "convert a b --dtype int8": "'int8' is not one of keep",
    "generate": "which model?",
    "generate model --promt x": "--promt",
    "ls nothing": "there is no list of 'nothing'",
    "ls settings": "GROUP=NAME",
    "pairs": "Missing argument 'MODEL'",
    "pairs model data --out x --sampler y": "--sampler is one of euler",
    "evaluate": "Missing argument 'WHAT'",
    "evaluate model --out x --sampler y": "--sampler is one of euler",
    "demo --quick --long": "choose one of --quick and --long",
    "prepare toyworld": "Missing option '--out'",
    "prepare toyworld --out x --num y": "'--num'",
    "prepare text": "Missing argument 'DIR'",
    "prepare text x --encoder y --form z": "'z' is not one of pickle, packed",
    "prepare controls x --type y": "'y' is not one of edge, vis",
    "prepare shards x": "Missing option '--out'",
    "prepare latents x --codec y --resize z": "'z' is not one of stretch, crop",
    "check data": "Missing argument 'DIR'",
    "nothing": "No such command 'nothing'",
}
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # whoever imports it fails
from fewstep.cli import main
found = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(words.split())
        except SystemExit as end:
            status = end.code
    found[words] = [status, out.getvalue() + err.getvalue()]
print(json.dumps(found))
"""


def answers(commands: list[str]) -> dict[str, tuple[int, str]]:
    """Status and text of each command, in a process that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_help_of_every_verb_needs_no_torch() -> None:
    for words, (status, text) in answers(["--help", *(f"{verb} --help" for verb in VERBS)]).items():
        assert not status and "help" in text, (words, text)
        assert "seeds" not in text, words


def test_wrong_use_of_every_verb_exits_2_names_what_is_wrong_and_needs_no_torch() -> None:
    for words, (status, text) in answers(list(WRONG)).items():
        assert status == 2 and WRONG[words].lower() in text.lower(), (words, status, text)
        assert text.startswith("fewstep: ") and "Traceback" not in text, (words, text)


def test_the_names_of_the_recipes_are_those_that_are_registered() -> None:
    assert {name for name, recipe in recipes().items() if recipe.module.startswith("fewstep.")} == NAMES


def test_every_group_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(LISTS.values()) >= {group for group in groups() if not group.startswith("toy")} - {"test"}
    for name in LISTS:
        assert main(["ls", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out), name


def test_the_settings_of_a_name_are_listed_with_their_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "settings", "method=dmd2"]) == 0
    assert "student_update_freq" in capsys.readouterr().out
    assert main(["ls", "settings", "experiment=analytic_kd", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["optim.lr"]["value"] == 0.002 and "tensor" not in rows["optim.lr"]["comment"]
    assert main(["ls", "settings", "method=dmd3"]) == 2
    assert "did you mean dmd2?" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise ValueError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr("fewstep.prepare.commands.shards", fail)
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        main(["prepare", "shards", str(tmp_path), "--out", "x"])
