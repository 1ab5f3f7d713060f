"""`fewstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run every stage in two minutes, too short for good students.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="Train for half an hour on two cores, for the best students.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the tokenizer and the teacher, too, which takes hours.")
    ] = False,
) -> None:
    """Run the whole method on a toy world, with a report. The same command resumes an interrupted demo."""
    if quick and long:
        raise typer.BadParameter("choose one of --quick and --long.")
    from fewstep.toyworld.demo import demo as show

    show(out, "quick" if quick else "long" if long else "default", from_scratch)
