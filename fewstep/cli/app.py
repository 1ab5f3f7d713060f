"""The command itself, which each verb adds itself to, and what is checked of the words of every verb."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fewstep import __version__

TEXTS = ("--prompt", "--negative-prompt", "--negative", "--title")  # options whose value may be empty, and of several lines


class Verb(TyperCommand):
    """Refuses empty values and numbers that are none by the name of the option; notes an option that is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: typer's Context
        words = list(args)
        problem = _unfit(words)
        if problem is not None:
            ctx.fail(problem)
        rest = super().parse_args(ctx, args)
        for param in self.params:
            own: Any = param  # Any: typer's class of parameters, which has no public name
            value = ctx.params.get(str(param.name))
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value}: the value should be a finite number.", ctx=ctx, param=own)
            names = (*param.opts, *param.secondary_opts)
            looks_like_option = isinstance(value, (str, Path)) and str(value).startswith("--") and str(value) in words
            if looks_like_option and names[0].startswith("-"):
                ctx.fail(f"{names[0]}: needs a value, and {value} looks like an option. If it is meant: {names[0]}={value}")
            num = sum(word.partition("=")[0].replace("_", "-") in names for word in words)
            if num > 1 and names[0].startswith("-") and not getattr(param, "multiple", False):
                print(f"note: {names[0]} is given {num} times; the last one counts", file=sys.stderr)
        return rest


class Verbs(typer.Typer):
    """A command whose verbs are checked as `Verb` does."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:  # Any: typer's own
        return super().command(name, cls=Verb, **settings)


def _unfit(words: Sequence[str]) -> str | None:
    """What is wrong with a word of a command: an empty value, or one that would command a terminal; None for nothing."""
    for word, before in zip(words, ("", *words), strict=False):
        name, equals, value = word.partition("=") if word.startswith("--") else (before, before.startswith("-"), word)
        if (equals and name.replace("_", "-") in TEXTS) or ("=" in word and not word.startswith("-")):
            continue
        name = name if equals else "an argument"
        if not value and (equals or not word):
            return f"{name}: the value is empty. Give one, or leave it out."
        if not value.isprintable():
            return f"{name} {value!r}: has characters that command a terminal, or a line break. Choose another name."
    return None


app = Verbs(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Distil video world models into students of one to four steps, and post-train them."""
    if version:
        print(__version__)
        raise typer.Exit()
