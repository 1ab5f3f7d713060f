"""Writes docs/options.md, every option of every verb, from the code: python docs/list_options.py

tests/test_docs.py fails where the page is not current; tests/test_options.py walks the verbs with the functions of this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command

from fewstep.cli import main  # noqa: F401  # all verbs are there
from fewstep.cli.app import app
from fewstep.inference import command as generate

PAGE = Path(__file__).parent / "options.md"
HEAD = """# Options

One thing has one name in every verb. The first spelling is the one of the documents; the others are understood everywhere, and
so is an underscore for a dash (`--num_steps`). If an option is given twice, the last value counts, and a
note says so. The `--help` of a verb says
what its options mean there; settings of a run (`optim.lr=1e-5`) are in [configuration.md](configuration.md). This page is
written by `python docs/list_options.py`.

| option | verbs | |
|---|---|---|
"""


@dataclass(frozen=True)
class Option:
    """An option of one verb: its spellings, the first of which is ours."""

    verb: str
    spellings: tuple[str, ...]
    help: str
    type: type | None
    least: float | None
    is_hidden: bool


def options() -> Iterator[Option]:
    """Every option of every verb but --help."""
    for verb, command in _verbs(get_command(app), ""):
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                kind = parameter.type_descriptor.annotation
                names = (*parameter.opts, *parameter.secondary_opts)
                yield Option(verb, names, parameter.help or "", kind, parameter.min, parameter.hidden)
    for action in generate._parser()._actions:  # the one verb that argparse reads
        if action.option_strings and action.dest != "help":
            is_hidden = action.help == argparse.SUPPRESS
            kind = action.type if isinstance(action.type, type) else str
            yield Option("generate", tuple(action.option_strings), action.help or "", kind, None, is_hidden)


def page() -> str:
    """The text of docs/options.md."""
    named: dict[tuple[str, ...], list[Option]] = {}
    for option in options():
        if not option.is_hidden and option.verb:
            named.setdefault(option.spellings, []).append(option)
    rows = [
        f"| {_quoted(spellings)} | {_quoted(each.verb for each in same)} | {_sentence(same)} |"
        for spellings, same in sorted(named.items(), key=lambda item: item[0][0].lstrip("-"))
    ]
    return HEAD + "\n".join(rows) + "\n"


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:  # Any: typer carries a click of its own
    for word, child in getattr(command, "commands", {}).items():
        yield from _verbs(child, f"{name} {word}".strip())
    if not hasattr(command, "commands"):
        yield name, command


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _sentence(same: list[Option]) -> str:
    """The help of the first verb, and that of a verb where the option means something else beside another one."""
    special = [option for option in same if option.help.startswith("With --")]
    if special and len(special) < len(same):
        texts = (f"`{option.verb}`: {_sentence([option])}" for option in special)
        return " ".join([_sentence([option for option in same if option not in special]), *texts])
    text = same[0].help.replace("|", "\\|")
    text = text if len(text.split()[0]) == 1 else f"{text[0].upper()}{text[1:]}"  # w stays w
    return text if text.endswith(".") else f"{text}."


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
