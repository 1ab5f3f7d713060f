"""`fewstep compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import JSON, UsageError, file_to_write, option


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN", help="Run folders, or PROJECT/GROUP/NAME below OUTPUT_ROOT.")],
    by: Annotated[str | None, option("--by", "Score of the plot. Default: the first that the previews measure.")] = None,
    out: Annotated[
        Path | None, option("--out", "SVG file to write: the score over iterations.", callback=file_to_write)
    ] = None,
    as_json: Annotated[bool, option("--json", JSON)] = False,
) -> None:
    """Compare runs: the settings in which they differ, and their scores; with --out a plot of one score."""
    if len(runs) < 2:
        raise UsageError("give two runs or more; one alone: fewstep ls runs.")
    from fewstep.training.records import METRICS, metrics_of, number, run_at, score_of, table

    records = [run_at(name) for name in runs]
    keys = list(dict.fromkeys(key for record in records for key in record.settings))
    differing = [key for key in keys if len({record.settings.get(key, "-") for record in records}) > 1]
    names = list(dict.fromkeys(name for record in records for name in (*record.scores, "wall_s")))
    if as_json:
        values = [{"run": r.name, "state": r.state, "step": r.step, "values": dict(r.values)} for r in records]
        settings = {key: [record.settings.get(key) for record in records] for key in differing}
        print(json.dumps({"runs": values, "settings": settings}))
    else:
        rows = [("", *(record.name for record in records)), ("step", *(f"{r.step} ({r.state})" for r in records))]
        rows += [(key, *(record.settings.get(key, "-") for record in records)) for key in differing if key != "job.name"]
        rows += [(name, *(number(record.values.get(name)) for record in records)) for name in names]
        print(table(rows))
    score = score_of(records, by)
    if out is None or score is None:
        return
    from fewstep.evaluation.plot import Series, lines
    from fewstep.files import write_text

    series: list[Series] = []
    for record in records:
        points = [(line["step"], line[score]) for line in metrics_of(record.folder / METRICS) if score in line]
        if points:
            series.append(Series(record.folder.name, [x for x, _ in points], [y for _, y in points]))
    write_text(out, lines(series, x_label="iteration", y_label=score, background="white"))
