"""`fewstep launch`."""

from __future__ import annotations

import sys
from typing import Annotated, Any, cast

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, imports, one_of, option


@app.command(context_settings=FREE)
def launch(
    context: typer.Context,
    to: Annotated[
        str, option("--to", "slurm: a script for sbatch. skypilot: a YAML for sky.", callback=one_of("slurm", "skypilot"))
    ],
    options: Annotated[
        list[str] | None,
        option("--option", "Further line: of #SBATCH, as --partition=gpu; of SkyPilot's resources, as use_spot=true."),
    ] = None,
    dry_run: Annotated[bool, option("--dry-run", "Print what would be submitted, and submit nothing.")] = False,
) -> None:
    """Start a run on a cluster: fewstep launch experiment=NAME a.b=c ... nodes=2 gpus=8 --to slurm --dry-run.

    nodes=1:4  a range: torchrun goes on with the nodes that are left   gpu=H100  the kind of GPU

    restarts=3  how often all processes are started anew after one of them died
    """
    from fewstep.config import check, compose, read_command
    from fewstep.environment import output_root
    from fewstep.recipes import refuse_unknown
    from fewstep.training.launch import Target, script, split_words, submit

    words, nodes = split_words([word for word in context.args if word != "--dryrun"])
    command = read_command(words)
    refuse_unknown(command)
    with imports():
        from fewstep.training.run import Run
    run = compose(command, Run)
    for warning in check(run):
        print(f"warning: {warning}", file=sys.stderr)
    target = cast("Target", to)
    root = output_root().absolute()
    text = script(target, words, run.job.name.replace("/", "-"), root, nodes, options or [])
    if dry_run or "--dryrun" in context.args:
        print(text, end="")
        return
    ending: Any = {"slurm": "sbatch", "skypilot": "sky.yaml"}
    submit(target, text, run.job.folder() / f"launch.{ending[to]}")
