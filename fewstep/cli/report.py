"""`fewstep report`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import file_to_write, option


@app.command()
def report(
    what: Annotated[list[Path], typer.Argument(help="Run folders, and files of scores that fewstep evaluate wrote.")],
    out: Annotated[Path, option("--out", "HTML file to write.", callback=file_to_write)],
    title: Annotated[str | None, option("--title", "Title of the page. Default: the names of the models.")] = None,
    bound: Annotated[
        list[str] | None, option("--bound", "Threshold that students are to keep, NAME<=VALUE or NAME>=VALUE; several times.")
    ] = None,
    verdict: Annotated[
        list[str] | None,
        option(
            "--verdict",
            "Two of the files of scores, STUDENT:OTHER: in which scores the first is better or worse; several times.",
        ),
    ] = None,
    warning: Annotated[list[str] | None, option("--warning", "A sentence to show beside the verdict; several times.")] = None,
    max_mb: Annotated[float, option("--max-mb", "Size of the page in megabytes, to which clips are compressed.")] = 15.0,
) -> None:
    """One HTML page of models and runs: clips in step, scores with spreads, curves, thresholds. It opens offline."""
    missing = [str(path) for path in what if not path.exists()]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)}: there is no such file or folder.", param_hint="'WHAT'")
    from fewstep.evaluation.report.of_files import Bound, Rivals, report_of
    from fewstep.evaluation.report.page import write

    bounds = [Bound.parse(text) for text in bound or ()]
    page = report_of(what, title=title, bounds=bounds, rivals=[Rivals.parse(text) for text in verdict or ()])
    write(replace(page, warnings=[*(warning or ()), *page.warnings]), out, round(max_mb * 1e6))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
