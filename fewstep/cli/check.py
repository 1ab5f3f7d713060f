"""`fewstep check ..`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import Verbs, app
from fewstep.cli.options import JSON, file_to_write, folder_to_read, next_step, option

check = Verbs(no_args_is_help=True, help="Check a data set before a run is spent on it.")
app.add_typer(check, name="check")


@check.command(name="data", context_settings={"allow_extra_args": True})
def check_data(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR", callback=folder_to_read)],
    as_json: Annotated[bool, option("--json", JSON)] = False,
    page: Annotated[Path | None, option("--html", "Write a contact sheet to this file.", callback=file_to_write)] = None,
    threads: Annotated[
        int | None, option("--threads", "Number of samples to read at once. Default: the number of cores.")
    ] = None,
) -> None:
    """Read a whole data set once and say what is in it: fewstep check data DIR [--html sheet.html] [num_frames=17 ...].

    Settings of the run it is meant for are checked too. Exit status 0: it can be trained on.
    """
    from fewstep.prepare.check import data

    text, is_trainable = data(folder, context.args, as_json=as_json, page=page, num_threads=threads)
    print(text)
    if is_trainable and not as_json:
        next_step("fewstep", "distill", "TEACHER", folder, "--out", "STUDENT")
    raise typer.Exit(0 if is_trainable else 1)
