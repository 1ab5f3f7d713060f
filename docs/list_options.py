"""Writes docs/options.md, every option of every verb, and fewstep/recipes/settings.json: python docs/list_options.py

tests/test_docs.py and tests/test_options.py fail where these are not current; the second walks the verbs with this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from typer.main import get_command

from fewstep import registry
from fewstep.cli import main  # noqa: F401  # all verbs are there
from fewstep.cli.app import app
from fewstep.inference import command as generate
from fewstep.recipes import SETTINGS

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


def settings() -> str:
    """The text of fewstep/recipes/settings.json: the settings of every run by level, and the names of those that some have."""
    from fewstep.config.recipes import recipes
    from fewstep.config.types import Choice, Items, Maybe, Record, Table, settings_of, shape_of
    from fewstep.training.run import Run

    ours = (recipe for recipe in recipes().values() if recipe.module.startswith("fewstep."))  # not those of a test
    others = {each.name for recipe in ours for each in fields(recipe.parameters)} | {"kind"}
    seen: set[type] = set()

    def add(declared: Any) -> None:
        """Adds the names of a type, and of all that can stand in its place or below it."""
        shape = shape_of(declared)
        if isinstance(shape, Maybe | Table | Items):
            parts = shape.types if isinstance(shape, Items) else (shape.declared if isinstance(shape, Maybe) else shape.value,)
            for part in parts:
                add(part)
        classes = [shape.cls] if isinstance(shape, Record) else []
        if isinstance(shape, Choice):
            classes = [entry if isinstance(entry, type) else type(entry()) for entry in registry.entries(shape.group).values()]
        for cls in {cls for cls in classes if cls.__module__.startswith("fewstep.")} - seen:
            seen.add(cls)
            for name, setting in settings_of(cls).items():
                others.add(name)
                add(setting.declared)

    def below(declared: Any) -> dict[str, Any] | None:
        shape = shape_of(declared)
        if isinstance(shape, Maybe):
            return below(shape.declared)
        if isinstance(shape, Record):
            return {name: below(setting.declared) for name, setting in settings_of(shape.cls).items()}
        add(declared)
        return None if isinstance(shape, Choice | Items | Table) else {}

    return json.dumps({"tree": below(Run), "others": sorted(others)}, indent=1) + "\n"


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
    SETTINGS.write_text(settings())
    print(SETTINGS)
