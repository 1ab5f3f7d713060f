"""`fewstep train`."""

from __future__ import annotations

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, imports, next_step


@app.command(context_settings=FREE)
def train(context: typer.Context) -> None:
    """Train: fewstep train experiment=NAME a.b=c ..., or fewstep train run.yaml a.b=c. The same command resumes.

    --config FILE.py|FILE.yaml  imports your own recipes, methods and networks first

    --dryrun  prints the configuration and the memory it needs, and trains nothing
    """
    from fewstep.config import read_command
    from fewstep.recipes import refuse_unknown

    command = read_command(context.args)
    refuse_unknown(command)
    with imports():
        from fewstep.training.command import run

    folder = run(command)
    if folder is not None:
        next_step("fewstep", "export", folder, "--out", "STUDENT")
