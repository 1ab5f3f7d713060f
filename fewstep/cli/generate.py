"""`fewstep generate`; its options are in inference/command.py."""

from __future__ import annotations

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, imports


@app.command(context_settings=FREE, add_help_option=False)
def generate(context: typer.Context) -> None:
    """Make videos with a run, an exported student or a teacher: fewstep generate MODEL --prompt TEXT."""
    from fewstep.inference.command import read_command

    request = read_command(context.args, checks_files=True)
    with imports():
        from fewstep.inference.generate import run

    run(request)
