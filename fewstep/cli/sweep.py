"""`fewstep sweep`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, UsageError, imports, one_of, option
from fewstep.training.search import SAMPLERS


@app.command(context_settings=FREE)
def sweep(
    context: typer.Context,
    workers: Annotated[int, option("--workers", "Number of trials at once; on a machine with GPUs each has one of them.")] = 1,
    trials: Annotated[int | None, option("--trials", "Number of trials that a sampler asks for. Default: the grid.")] = None,
    sampler: Annotated[
        str | None, option("--sampler", f"With --trials: {', '.join(SAMPLERS)}. Default: tpe.", callback=one_of(*SAMPLERS))
    ] = None,
    seed: Annotated[int | None, option("--seed", "With --trials: seed of the sampler. Default: 0.")] = None,
    by: Annotated[
        str | None, option("--by", "Score to sort by, and to search for. Default: the first that previews measure.")
    ] = None,
    highest: Annotated[bool, option("--highest", "The highest score is the best.")] = False,
    dry_run: Annotated[bool, option("--dry-run", "Print the commands and run nothing.")] = False,
) -> None:
    """Train every combination of several values: fewstep sweep experiment=NAME optim.lr=1e-5,5e-6 trainer.batch_size=8,16.

    Or search: fewstep sweep experiment=NAME optim.lr=1e-6..1e-4 ema.beta=0.99,0.999 --trials 20.

    Each trial is a run folder beside the others. The same command resumes, and trains no trial twice.
    """
    if trials is None and (sampler is not None or seed is not None):
        raise UsageError("--sampler and --seed go with --trials, the number of trials that a sampler asks for.")
    from fewstep.config import read_command
    from fewstep.errors import UserError
    from fewstep.recipes import refuse_unknown
    from fewstep.training.search import Request
    from fewstep.training.trials import SUMMARY, Queue, first, plan_sweep, show, space_of

    command = read_command([word for word in context.args if word != "--dryrun"])
    refuse_unknown(command)
    request = None if trials is None else Request(trials, sampler or "tpe", seed or 0, by, highest)
    space_of(command, request)
    with imports():
        from fewstep.training.run import Run
    plan = plan_sweep(command, Run, request)
    for change in [] if request is None else plan.changes():
        print(f"note: changed since the newest trial was drawn: {change}", file=sys.stderr)
    from fewstep.distill.stages import run_each, text_of

    if dry_run or "--dryrun" in context.args:
        drawn = plan.trials()
        new = plan.ask() if len(drawn) < plan.num else None
        for trial in (*drawn, *([new] if new else [])):
            if not trial.problem:
                print(text_of(plan.command(trial)))
        if len(drawn) + 1 < plan.num:
            print(f"note: the results decide the settings of {plan.num - len(drawn) - 1} more", file=sys.stderr)
        return
    for stage in plan.stages:  # once, before several trials would each begin to train it
        if run_each([first(stage)], PRELOAD):
            raise UserError(f"stage {stage}, from which all trials start, failed, see above")
    queue = Queue(plan)
    run_each([queue.commands(place) for place in _places(workers)], PRELOAD)
    if queue.error is not None:
        raise queue.error
    print(show(plan, by, highest))
    print(f"{plan.folder}/trials.json")
    trained = plan.trials()
    if len(trained) < plan.num:
        print("note: every combination of the values has been tried", file=sys.stderr)
    failed = [trial for trial in trained if not trial.is_over]
    if failed:
        raise UserError(f"{len(failed)} of {plan.num} trials failed, see above; the same command runs these again")
    if not any((trial.folder / SUMMARY).is_file() for trial in trained):
        raise UserError("no trial has finished; the table says why")


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
