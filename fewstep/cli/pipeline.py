"""`fewstep pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import UsageError, file_to_read, folder_to_read, folder_to_write, imports, one_of, option
from fewstep.distill.chains import CHAINS, PipelineRequest
from fewstep.recipes import refuse_mistyped


@app.command(context_settings={"allow_extra_args": True})
def pipeline(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"Which: {', '.join(CHAINS)}.", callback=one_of(*CHAINS))],
    out: Annotated[Path, option("--out", "Folder of the student; the rest is in OUT.work.", callback=folder_to_write)],
    teacher: Annotated[str | None, option("--teacher", "The teacher: a pipeline's folder. Not needed for toy_.")] = None,
    prompts: Annotated[
        Path | None, option("--prompts", "File of prompts, one a line: of a pipeline that makes pairs.", callback=file_to_read)
    ] = None,
    dataset: Annotated[
        Path | None,
        option("--dataset", "Clips in videos/, captions in metas/: of a pipeline without pairs.", callback=folder_to_read),
    ] = None,
    chunk: Annotated[int | None, option("--chunk", "Latent frames generated at once. Default: as the recipes have it.")] = None,
    span: Annotated[int | None, option("--span", "Latent frames within reach: those of a clip. Default: likewise.")] = None,
    only: Annotated[str, option("--only", "Run these stages alone, separated by commas.")] = "",
    num_eval: Annotated[int, option("--num-eval", "Clips of an evaluation at a gate.")] = 64,
    bound: Annotated[
        list[str] | None, option("--bound", "SCORE=VALUE that every gate must reach; else no further stage runs.")
    ] = None,
    processes: Annotated[int, option("--processes", "Processes of torchrun, one for each GPU.")] = 1,
    dryrun: Annotated[bool, option("--dryrun", "Print the commands; run nothing.")] = False,
) -> None:
    """Make a streaming student in stages, with a gate of scores between them. The same command resumes where it was.

    STAGE.KEY=VALUE changes a stage: fewstep pipeline NAME .. pairs.num-frames=81 kd.trainer.max_iter=1000 sf.optim.lr=1e-6
    """
    bounds: dict[str, float] = {}
    for word in bound or ():
        score, _, value = word.partition("=")
        try:
            bounds[score] = float(value)
        except ValueError:
            raise UsageError(f"--bound {word}: is written SCORE=VALUE, with a number.") from None
    stages = tuple(part for part in only.split(",") if part)
    request = PipelineRequest(
        name, out, teacher, prompts, dataset, chunk, span, stages, processes, num_eval, bounds, tuple(context.args)
    )
    for training in request.chain.trainings:
        refuse_mistyped(request.settings_of(training.name), training.name)
    with imports():
        from fewstep.distill.pipeline import pipeline as run

    run(request, dryrun)
