"""`fewstep sweep`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, imports, option


@app.command(context_settings=FREE)
def sweep(
    context: typer.Context,
    workers: Annotated[int, option("--workers", "Number of trials at once; on a machine with GPUs each has one of them.")] = 1,
    by: Annotated[str | None, option("--by", "Score to sort by. Default: the first that the previews measure.")] = None,
    highest: Annotated[bool, option("--highest", "The highest score is the best.")] = False,
    dry_run: Annotated[bool, option("--dry-run", "Print the commands and run nothing.")] = False,
) -> None:
    """Train every combination of several values: fewstep sweep experiment=NAME optim.lr=1e-5,5e-6 trainer.batch_size=8,16.

    Each trial is a run folder beside the others. The same command resumes, and trains no trial twice.
    """
    from fewstep.config import read_command
    from fewstep.errors import UserError
    from fewstep.recipes import refuse_unknown
    from fewstep.training.trials import Queue, plan_sweep, show

    command = read_command([word for word in context.args if word != "--dryrun"])
    refuse_unknown(command)
    with imports():
        from fewstep.training.run import Run
    grid = plan_sweep(command, Run)
    if dry_run or "--dryrun" in context.args:
        from fewstep.distill.stages import text_of

        for trial in grid.trials:
            print(text_of(grid.command(trial)))
        return
    from fewstep.distill.stages import run_each

    for stage in grid.stages:  # once, before several trials would each begin to train it
        if run_each([iter([("fewstep", "train", f"experiment={stage}")])], PRELOAD):
            raise UserError(f"stage {stage}, from which all trials start, failed, see above")
    queue = Queue(grid)
    failed = run_each([queue.commands(place) for place in _places(workers)], PRELOAD)
    print(show(grid, by, highest))
    print(f"{grid.folder}/trials.json")
    if failed:
        raise UserError(f"{len(failed)} of {len(grid.trials)} trials failed, see above; the same command runs these again")


PRELOAD = "fewstep.training.command"


def _places(workers: int) -> list[tuple[str, ...]]:
    """The environment of each worker: with several GPUs, a GPU in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        return [()] * workers
    if workers > len(gpus):
        print(f"note: {workers} workers share {len(gpus)} GPUs", file=sys.stderr)
    return [(f"CUDA_VISIBLE_DEVICES={gpus[number % len(gpus)]}",) for number in range(workers)]
