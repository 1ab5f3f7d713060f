"""The command itself, which each verb adds itself to."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep import __version__

app = typer.Typer(
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
