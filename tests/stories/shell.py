"""Walks a story: a shell script (`tests/stories/*.sh`) of documented commands, from nothing, in a folder of its own.

    @IN_BOTH_FORMS
    def test_a_road(tmp_path: Path, real: bool) -> None:
        walk("road.sh", tmp_path, real=real, TYPE="edge")       # $TYPE in the script

quick (real=False): line by line in this process, through `fewstep.cli.main`. `fewstep ..`, `python -m fewstep ..` and
`torchrun .. -m fewstep.train ..` are the same call, with one process for torchrun's many. Lines of other commands (mkdir, cp,
cat > file << EOF) are run by bash, `python file.py` as a process. VAR=VALUE before a command and `export` are understood;
loops, conditions and $(..) are not: they belong into the test.
slow (real=True): the same script by `bash -e`, each command a process, torchrun with its number of processes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import string
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from fewstep.cli import main

ROOT = Path(__file__).parents[2]
IN_BOTH_FORMS = pytest.mark.parametrize(
    "real", [pytest.param(False, id="quick"), pytest.param(True, id="slow", marks=pytest.mark.slow)]
)
# As an installed package has them, without asking whether it is installed.
COMMANDS = f"""
python() {{ {shlex.quote(sys.executable)} "$@"; }}
fewstep() {{ python -m fewstep "$@"; }}
torchrun() {{ python -m torch.distributed.run "$@"; }}
PS4='+ line $LINENO: '; set -ex; cd "$FOLDER"; source "$SCRIPT"
"""
VARIABLE = re.compile(r"[A-Za-z_]\w*=")


def walk(script: str, folder: Path, *, real: bool, **variables: str) -> None:
    """Runs the script in `folder`; the test fails at the first command with an exit status other than 0, and shows it.

    variables: further environment of the script, on top of this process's.
    """
    path = Path(__file__).parent / script
    environment = {name: value for name, value in os.environ.items() if name != "OUTPUT_ROOT"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    if real:
        whole = environment | {"SCRIPT": str(path), "FOLDER": str(folder)}
        done = subprocess.run(["bash", "-c", COMMANDS], env=whole, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return
    for number, line in commands(path.read_text()):
        with contextlib.chdir(folder), patch.dict(os.environ, environment, clear=True):
            status, output = _call(line, environment)
        if status:
            pytest.fail(f"{script}:{number}: exit status {status} of\n  {line}\n{output[-6000:]}", pytrace=False)


def commands(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a script with their line numbers: continued lines joined, comments left out, here-documents whole."""
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)[1].strip()
        document = re.search(r"<<\s*'?(\w+)'?", line)
        while document and line.splitlines()[-1] != document[1]:
            line += "\n" + next(lines)[1]
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _call(line: str, environment: dict[str, str]) -> tuple[int, str]:
    """The exit status of one command and its output; `export` changes `environment`."""
    expanded = line if "<<" in line else string.Template(line).safe_substitute(environment)
    words = shlex.split(expanded, comments=True) if "<<" not in line else []
    if words[:1] == ["export"]:
        environment.update(word.split("=", 1) for word in words[1:])
        return 0, ""
    ahead: dict[str, str] = {}
    while words and VARIABLE.match(words[0]):
        name, value = words.pop(0).split("=", 1)
        ahead[name] = value
    if not words and ahead:
        environment.update(ahead)
        return 0, ""
    arguments = _arguments(words)
    if arguments is None:
        done = subprocess.run(["bash", "-ec", COMMANDS.split("PS4")[0] + line], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, ahead))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")  # as in a process of its own: pytest makes errors of them
        status = main(arguments)
    return status, output.getvalue()


def _arguments(words: list[str]) -> list[str] | None:
    """What `fewstep` receives by this command; None if it is another."""
    if words[:1] == ["fewstep"]:
        return words[1:]
    if words[:1] not in (["torchrun"], ["python"]) or "-m" not in words:
        return None
    module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module not in ("fewstep", "fewstep.train"):
        return None
    several = "--num_gpus" in rest  # which must be torchrun's number of processes: here one
    if several:
        rest[rest.index("--num_gpus") + 1] = "1"
    return ["train", *rest] if module == "fewstep.train" else rest
