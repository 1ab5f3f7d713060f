"""`fewstep demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fewstep.cli.app import app
from fewstep.cli.options import UsageError, folder_to_write, option


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
) -> None:
    """Run the whole method on a toy world, with a report. The same command resumes an interrupted demo."""
    if quick and long:
        raise UsageError("choose one of --quick and --long.")
    if causal and from_scratch:
        raise UsageError("--causal begins with the teacher that is shipped: leave --from-scratch out.")
    from fewstep.toyworld.demo import demo as show

    show(out, "quick" if quick else "long" if long else "default", from_scratch, causal)
