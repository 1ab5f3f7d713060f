"""The command line: help and wrong use of every verb, without torch, with the status 2 and the name of what is wrong."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.cli.ls import LISTS
from fewstep.config import recipes
from fewstep.recipes import GROUPS, NAMES
from fewstep.registry import groups

VERBS = (
    *("train", "plan", "export", "convert", "generate", "ls", "pairs", "evaluate", "report", "demo"),
    *("prepare", "prepare toyworld", "prepare text", "prepare controls", "prepare shards", "prepare latents"),
    *("check", "check data"),
)
WRONG = {  # a use of a verb that is wrong: what the answer names
    "train experiment=analytic_finetun": "did you mean analytic_finetune?",
    "train --dryrum experiment=analytic_finetune": "did you mean --dryrun?",
    "train": "experiment: which run?",
    "train nonsense": "did you mean experiment=nonsense?",
    "plan experiment=nothing_like_it": "no recipe is named",
    "train experiment=kd trainer.max_itr=3 --dryrun": "trainer.max_itr: no such setting; did you mean trainer.max_iter?",
    "sweep experiment=kd optim.lrr=1e-5,2e-5": "optim.lrr: no such setting; did you mean optim.lr?",
    "plan experiment=kd gpus=8 chekpoint.keep_last=3": "no such setting; did you mean checkpoint.keep_last?",
    "distill EMPTY EMPTY --out x dmd2.optim.lrr=1": "dmd2.optim.lrr: no such setting; did you mean optim.lr?",
    "plan experiment=analytic_kd gpus=x": "gpus=x: give a number",
    "plan experiment=analytic_kd gpus=0": "gpus=0: at least 1",
    "plan experiment=analytic_kd gpu=tpu": "gpu=tpu: give GiB, or one of",
    "plan experiment=analytic_kd shape=axb": "shape=axb: sizes are written as",
    "plan --nosuch": "--nosuch: no such option",
    "export": "Missing argument 'RUN'",
    "export run": "Missing option '--out'",
    "export run --out": "Option '--out' requires an argument",
    "export run --out x --format y": "'y' is not one of auto",
    "export run --out FILE": "FILE' is a file, where a folder is needed",
    "export run more --out x": "unexpected extra argument(s) (more)",
    "export run --out x --nosuch": "No such option: --nosuch",
    "convert": "give either SRC",
    "convert a b --dtype int8": "'int8' is not one of keep",
    "convert a b --lora-scale x": "'--lora-scale': x: the value should be a valid number",
    "convert --base x": "--base wants the --control",
    "convert --ctrl-type edge --base x": "--ctrl-type names both files",
    "generate": "which model?",
    "generate model --promt x": "--promt",
    "generate model --prompt": "argument --prompt: expected one argument",
    "generate model --prompt x --num-steps x": "--num-steps/--steps: invalid int value: 'x'",
    "generate model --prompt x --steps 0": "--num-steps 0: at least 1",
    "generate model --prompt x --batch-size -1": "--batch-size -1: at least 1",
    "generate model --prompt x --num_frames 0": "--num-frames 0: at least 1",
    "generate model --prompt x --height -2 --width 2": "--height -2: at least 1",
    "generate model --prompt x --overlap -1": "--overlap -1: at least 0",
    "generate model --prompt x --seed -1": "--seed -1: at least 0",
    "generate model --prompt x --fps nan": "argument --fps: nan is no finite number",
    "generate model --prompt x --shift -1": "--shift -1: above 0",
    "generate model --prompt x --quality 99": "--quality is 'lossless' or a CRF from 0 to 51, not '99'",
    "generate model --prompt x --precision fp8": "--precision: invalid choice: 'fp8'",
    "generate model --prompt x --sampler y": "argument --sampler: invalid choice: 'y'",
    "generate model --prompt x --name ../y": "'../y'",
    "generate model --prompt x --num-input-frames 3": "--num-input-frames needs --input",
    "generate model --prompts nothing.txt": "--prompts nothing.txt: no such file",
    "ls nothing": "there is no list of 'nothing'",
    "ls settings": "GROUP=NAME",
    "pairs": "Missing argument 'MODEL'",
    "pairs model EMPTY --out FILE": "FILE' is a file, where a folder is needed",
    "pairs model nothing --out x": "'nothing': there is no such folder",
    "pairs model EMPTY --out x --sampler y": "'y' is not one of auto, euler",
    "pairs model EMPTY --out x --batch-size -1": "'--batch-size': -1: the value should be greater",
    "pairs model EMPTY --out x --given-frames -1": "'--given-frames': -1: the value should be greater",
    "pairs model EMPTY --out x --num x": "'--num': x: the value should be a valid integer",
    "pairs model EMPTY --out x --quality 99": "'--quality': '99' is neither lossless",
    "pairs model EMPTY --out x --sigma-max -2": "'--sigma-max': -2 is not a number above 0",
    "pairs model EMPTY --out x --height 32": "--height and --width go together",
    "pairs model EMPTY --out x --path-times 1,2": "--path-times 1,2: times descend",
    "pairs model EMPTY --out x --control nothing": "--control nothing: is none of",
    "pairs model EMPTY --out x --config nothing.py": "'--config': 'nothing.py': there is no such file",
    "evaluate": "Missing argument 'WHAT'",
    "evaluate model": "Missing option '--out'",
    "evaluate model --out x": "'x' has no suffix: write x.json",
    "evaluate model --out EMPTY": "EMPTY' is a folder: give the name of a file",
    "evaluate model --out x.json --sampler y": "'y' is not one of auto, euler",
    "evaluate model --out x.json --sets 0": "'--sets': 0: the value should be greater",
    "evaluate model --out x.json --height 3": "--height and --width go together",
    "evaluate --compare a": "--compare needs two files or more",
    "demo --quick --long": "choose one of --quick and --long",
    "demo --method sid": "--method sid: is none of rcm, scm, flow_map",
    "demo --out FILE": "FILE' is a file, where a folder is needed",
    "prepare nothing": "No such command 'nothing'",
    "prepare toyworld": "Missing option '--out'",
    "prepare toyworld --out x --num y": "'--num'",
    "prepare toyworld --out x --workers -1": "'--workers': -1: the value should be greater",
    "prepare text": "Missing argument 'DIR'",
    "prepare text EMPTY": "Missing option '--text-encoder'",
    "prepare text nothing --text-encoder EMPTY": "'nothing': there is no such folder",
    "prepare text EMPTY --text-encoder EMPTY --form z": "'z' is not one of pickle, packed",
    "prepare controls EMPTY --type y": "'y' is not one of edge, vis",
    "prepare controls EMPTY --type edge --preset y": "'y' is not one of none, very_low",
    "prepare shards EMPTY": "Missing option '--out'",
    "prepare shards EMPTY --out x --shard-mib 0": "'--shard-mib': 0: the value should be greater",
    "prepare latents EMPTY --codec EMPTY --resize z": "'z' is not one of stretch, crop",
    "prepare latents EMPTY --codec EMPTY --scale 0": "'--scale': 0 is not a number above 0",
    "prepare latents EMPTY --codec EMPTY --height 3": "--height and --width go together",
    "check data": "Missing argument 'DIR'",
    "check data FILE": "FILE': is a file, where a folder is needed",
    "check data EMPTY --threads 0": "'--threads': 0: the value should be greater",
    "convert a.pt b.pt --device cpu": "No such option: --device",
    "pairs model EMPTY --out x --device gpu0": "'gpu0' is no device",
    "pairs model EMPTY --out FILE/x": "'FILE' is a file, where a folder is needed",
    "generate model --prompt x --input nothing.png": "--input nothing.png: no such file",
    "generate model --prompt x --input_video_path nothing.mp4": "--input_video_path (here --input) nothing.mp4: no such file",
    "nothing": "No such command 'nothing'",
    "--nothing": "No such option: --nothing",
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
        except ImportError as error:
            status = str(error)
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
        assert "the seeds" not in text.lower(), words  # a private name of the documents; --seeds is an option


def test_wrong_use_of_every_verb_exits_2_names_what_is_wrong_and_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    for words, (status, text) in answers(list(WRONG)).items():
        assert status == 2 and WRONG[words].lower() in text.lower(), (words, status, text)
        assert text.startswith("fewstep: ") and "Traceback" not in text, (words, text)


def test_the_names_of_the_recipes_are_those_that_are_registered() -> None:
    assert {name for name, recipe in recipes().items() if recipe.module.startswith("fewstep.")} == NAMES


def test_recipes_are_listed_by_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A teacher and data of your own") and lines[2].startswith("  finetune ")
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert len(listed) == len(set(listed)) and set(listed) >= NAMES
    assert all(len(names) == len(set(names)) for names in GROUPS.values()) and sum(map(len, GROUPS.values())) == len(NAMES)


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


def test_people_at_a_terminal_are_told_the_next_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.prepare.commands.controls", lambda *args: "3 clips")
    command = ["prepare", "controls", str(tmp_path), "--type", "edge"]
    assert main(command) == 0
    assert capsys.readouterr().out == "3 clips\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(command) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == f"next: fewstep prepare latents {tmp_path} --codec PIPELINE --control edge"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise ValueError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr("fewstep.prepare.commands.shards", fail)
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        main(["prepare", "shards", str(tmp_path), "--out", "x"])


def test_no_name_of_a_file_commands_a_terminal_whoever_prints_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hostile(*args: object) -> str:
        print("note: a\x1b[31mb\x9b1m", file=sys.stderr)
        sys.stderr.write("\r 3 of 4: |###| 75%")  # a bar of another library, which draws its line anew
        return "made a\rdone\x07 of 3"

    monkeypatch.setattr("fewstep.prepare.commands.controls", hostile)
    assert main(["prepare", "controls", str(tmp_path), "--type", "edge"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "made a\\rdone\\x07 of 3\n"
    assert shown.err == "note: a\\x1b[31mb\\x9b1m\n\r 3 of 4: |###| 75%"


def test_streams_that_are_closed_or_know_ascii_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", err)
    assert main(["ls", "heads"]) == 0 and main(["convert", "caf\u00e9.pt", "x.pt"]) > 0
    err.seek(0)
    assert "caf\\xe9.pt" in err.read()


def test_an_option_that_is_given_twice_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.prepare.commands.controls", lambda *args: str(args[1:3]))
    assert main(["prepare", "controls", str(tmp_path), "--type", "edge", "--preset=low", "--preset", "high", "--type=vis"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "('vis', 'high')\n"
    assert (
        shown.err
        == "note: --type is given 2 times; the last one counts\nnote: --preset is given 2 times; the last one counts\n"
    )
