"""Every option of every verb, misused in every way its type allows: the answer names it, ends with 2, and needs no torch.

The commands are made from the verbs themselves: an option that is added is misused, too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).parents[1]
# A right use of each verb, but for what is misused; FILE and EMPTY are there, nothing else is.
RIGHT = {
    "distill": "teacher EMPTY --out student",
    "pipeline": "toy_self_forcing --out pipeline",
    "train": "experiment=analytic_finetune",
    "plan": "experiment=analytic_finetune",
    "sweep": "experiment=analytic_finetune optim.lr=1e-3,1e-4",
    "compare": "EMPTY EMPTY",
    "launch": "experiment=analytic_finetune --to slurm",
    "export": "run --out student",
    "convert": "FILE.safetensors out.pt",
    "generate": "model --prompt x",
    "ls": "",
    "pairs": "model EMPTY --out pairs",
    "evaluate": "model --out scores.json",
    "report": "EMPTY --out report.html",
    "demo": "",
    "check data": "EMPTY",
    "prepare toyworld": "--out new",
    "prepare text": "EMPTY --text-encoder EMPTY",
    "prepare words": "EMPTY --out words",
    "prepare codec": "EMPTY --out codec",
    "prepare controls": "EMPTY --type edge",
    "prepare shards": "EMPTY --out tars",
    "prepare latents": "EMPTY --codec EMPTY",
}
READ_FILES = {"--config", "--prompts", "--embedding", "--negative-embedding", "--input", "--controlnet-specs", "-i"}
READ_MODELS = {"--codec", "--text-encoder", "--image-encoder"}
READ_FOLDERS = {"--heldout", "--from", "--real", "--truth"}
WRITE_FILES = {("evaluate", "--out"), ("report", "--out"), ("compare", "--out"), ("check data", "--html")}
CHOICES = {
    "--sampler",
    "--precision",
    "--dtype",
    "--format",
    "--type",
    "--preset",
    "--resize",
    "--quality",
    "--device",
    "--method",
}
HOSTILE = "a\x1b[31mb\nc"
EMPTY_IS_TEXT = {"--prompt", "--negative-prompt", "--negative", "--title", "--name"}


def cases() -> Iterator[tuple[str, list[str], str]]:
    """Verb, words, and what the answer names."""
    sys.path.insert(0, str(ROOT / "docs"))
    import list_options  # pyright: ignore[reportMissingImports]

    for option in list_options.options():
        if not option.verb:
            continue
        right = shlex.split(RIGHT[option.verb])
        for spelling in option.spellings:
            if spelling in right:  # the value that is misused stands instead
                at = right.index(spelling)
                right = right[:at] + right[at + 2 :]
        name, kind = option.spellings[0], str(option.type)
        is_flag = "bool" in kind or _is_flag(option)
        if name.startswith("--"):
            yield option.verb, [*right, f"{name}x"], name
        if is_flag:
            yield option.verb, [*right, f"{name}=x"], name
            continue
        yield option.verb, [*right, name], name
        if "tuple" not in kind and "list" not in kind and option.verb != "generate":  # a list may have such values
            yield option.verb, [*right, name, "--nothing"], name
        if name not in EMPTY_IS_TEXT:
            yield option.verb, [*right, name, ""], name
        wrong = ["x"] if "int" in kind or "float" in kind else []
        wrong += ["1.5", "nan", "1" * 5000] if "int" in kind else []
        wrong += ["nan", "inf"] if "float" in kind else []
        wrong += ["-1"] if "int" in kind and (option.least is not None or name not in ("--label",)) else []
        wrong += ["nothing"] if name in CHOICES else []
        if "tuple" in kind or "list" in kind:
            wrong = ["x x"] if "tuple" in kind else []
        for value in wrong:
            yield option.verb, [*right, name, *value.split()], name
        if name in READ_FILES and option.verb != "evaluate":
            yield from ((option.verb, [*right, name, value], name) for value in ("nothing.txt", "EMPTY", HOSTILE))
        if name in READ_MODELS or (option.verb, name) == ("export", "--base"):
            yield from ((option.verb, [*right, name, value], name) for value in ("nothing", "FILE", "nothing/x/y", HOSTILE))
        if name in READ_FOLDERS:
            yield from ((option.verb, [*right, name, value], name) for value in ("nothing", "FILE", HOSTILE))
        if name == "--out":
            value = "EMPTY" if (option.verb, name) in WRITE_FILES else "FILE"
            yield option.verb, [*right, name, value], name
            yield option.verb, [*right, name, "FILE/below"], name
        if (option.verb, name) in WRITE_FILES and name != "--out":
            yield option.verb, [*right, name, "EMPTY"], name


def _is_flag(option: Any) -> bool:
    from fewstep.inference.command import _parser

    if option.verb != "generate":
        return False
    action = _parser()._option_string_actions[option.spellings[0]]
    return action.nargs == 0


def answers(words: list[list[str]]) -> list[tuple[Any, str]]:
    """Status and text of each command, in this process, which cannot import torch."""
    from fewstep.cli import main

    found: list[tuple[Any, str]] = []
    for command in words:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status: Any = main(command)
            except SystemExit as end:
                status = end.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        found.append((status, out.getvalue() + err.getvalue()))
    return found


def look() -> None:
    """Prints every case whose answer breaks a rule, as JSON."""
    typer.main.get_command = functools.cache(typer.main.get_command)  # otherwise every command builds the tree of all verbs
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # whoever imports it fails
    every = list(cases())
    wrong: list[str] = []
    for (verb, words, name), (status, text) in zip(every, answers([[*v.split(), *w] for v, w, _ in every]), strict=True):
        lines = text.strip().splitlines()
        is_right = status == 2 and lines and lines[-1 if lines[0].startswith("note") else 0].startswith("fewstep: ")
        if not (is_right and name in text and "\x1b" not in text and "Traceback" not in text):
            shown = shlex.join(word[:40] for word in words)
            wrong.append(f"{verb} {shown}\n      {status}: {text[:300]}")
    print(json.dumps([len(every), wrong]))


def test_each_misuse_of_an_option_is_answered_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FILE", "FILE.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    num, wrong = json.loads(ran.stdout)
    assert num > 600 and not wrong, f"{len(wrong)} of {num}:\n" + "\n".join(wrong)


if __name__ == "__main__":
    look()
