"""`fewstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fewstep.cli.app import app
from fewstep.cli.options import UsageError, folder_to_write, option

METHODS = ("rcm", "scm", "flow_map")  # fewstep.toyworld.demo.stages, which needs torch, has them, too


@app.command()
def demo(
    out: Annotated[Path, option("--out", "Folder to write.", callback=folder_to_write)] = Path("demo"),
    quick: Annotated[bool, option("--quick", "Run every stage in two minutes, too short for good students.")] = False,
    long: Annotated[bool, option("--long", "Train for half an hour on two cores, for the best students.")] = False,
    from_scratch: Annotated[
        bool, option("--from-scratch", "Train the tokenizer and the teacher, too, which takes hours.")
    ] = False,
    causal: Annotated[
        bool, option("--causal", "Make students that stream instead, by two chains at equal cost: an hour on two cores.")
    ] = False,
    method: Annotated[
        list[str] | None,
        option("--method", f"Also train a student by this method and score it: {', '.join(METHODS)}. May be repeated."),
    ] = None,
) -> None:
    """Run the whole method on a toy world, with a report. The same command resumes an interrupted demo."""
    if unknown := sorted({*(method or ())} - {*METHODS}):
        raise UsageError(f"--method {unknown[0]}: is none of {', '.join(METHODS)}.")
    if quick and long:
        raise UsageError("choose one of --quick and --long.")
    if causal and method:
        raise UsageError("--causal makes other students than --method: choose one of them.")
    if causal and from_scratch:
        raise UsageError("--causal begins with the teacher that is shipped: leave --from-scratch out.")
    from fewstep.toyworld.demo import demo as show

    show(out, "quick" if quick else "long" if long else "default", from_scratch, causal, method or ())
