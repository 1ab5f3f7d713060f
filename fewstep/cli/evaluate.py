"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import GUIDANCE, OWN, SAMPLER, SHIFT, SIGMA_MAX, STEPS, load


@app.command(context_settings={"allow_extra_args": True})
def evaluate(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="A model (run, export, pipeline), codec:FOLDER, or a folder with videos/.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; the first clips go into a folder of that name.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Data set with captions, text, controls and real clips of the same scenes.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Real clips of other scenes, for scorers that compare with some.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Name of the scorer (fewstep ls scorers). Default: one that suits clips of this size.")
    ] = None,
    config: Annotated[Path | None, OWN] = None,
    control: Annotated[str | None, typer.Option(help="Control of the data set that the model receives: edge, vis, ..")] = None,
    num: Annotated[int, typer.Option(help="Number of clips in a set.")] = 512,
    sets: Annotated[int, typer.Option(help="Number of sets, each from noise of its own.")] = 3,
    calls: Annotated[int | None, typer.Option(help="Score a teacher at its best with this many network calls.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    codec: Annotated[str | None, typer.Option(help="Folder of the autoencoder, for a model that has none.")] = None,
) -> None:
    """Score the clips of a model, of a codec or of a folder, against real clips or the controls they were made for.

    KEY=VALUE sets a setting of the scorer: fewstep evaluate clips --out scores.json --scorer control preset=low
    """
    from fewstep.inference.request import SamplerOptions

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance)
    from fewstep.inference.evaluate import Evaluation, line, scorer_of
    from fewstep.inference.evaluate import run as score

    load(config)
    chosen = scorer_of(scorer, context.args)
    job = Evaluation(what, prompts, real, out, num, sets, calls, sampling, codec=codec, scorer=chosen, control=control)
    print(f"{out}: {line(score(job))}")
