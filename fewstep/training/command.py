"""`fewstep train`: the stages that a run starts from, then the run; or, with --dryrun, its configuration and its memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fewstep.config import Command, build_recipe, check, compose, originals, to_yaml
from fewstep.environment import ranks
from fewstep.files import write_text
from fewstep.networks.files.checkpoints import POINTER
from fewstep.parallel import leave_world
from fewstep.training.loop import train
from fewstep.training.resume import changes_in
from fewstep.training.run import Run


def run(command: Command) -> Path | None:
    """Trains what the command says, or goes on; the stages that are not finished come first.

    Returns the run's folder, on the main process, if it holds a student that can be exported.
    """
    config = compose(command, Run)
    if ranks().is_main:  # under torchrun one process speaks for all
        for warning in check(config):
            print(f"warning: {warning}", file=sys.stderr)
        for text in command.repeated():
            print(f"note: {text}", file=sys.stderr)
        for file in originals(command):
            print(
                f"note: {file} belongs to the original code and is ignored: {command.experiment} replaces it", file=sys.stderr
            )
    if command.dryrun:
        _dry_run(config)
        return None
    # Joined once for all stages: gloo cannot meet a second time under the same address.
    config.parallel.join()
    try:
        for stage in config.job.after:
            _train_stage(stage, config)
        train(config)
    finally:
        leave_world()
    spec = config.networks.spec_of("student")
    is_exported = ranks().is_main and spec is not None and bool(spec.diffusers_class)
    return config.job.folder() if is_exported else None


def _dry_run(config: Run) -> None:
    config.networks.refuse_contradictions()
    from fewstep.training.plan.gpu_fit import dryrun

    path = config.job.folder() / "config.yaml"
    text = to_yaml(config)
    has_begun = (path.parent / "checkpoints" / POINTER).is_file()  # then its config.yaml says what was trained
    if not has_begun:
        write_text(path, text)
    print(text, end="")
    print(dryrun(config), file=sys.stderr)
    if not has_begun:
        print(f"dry run: {path} is written, nothing was trained", file=sys.stderr)
        return
    changed = "; ".join(map(str, changes_in(path.parent, config))) or "no setting differs"
    print(f"dry run: {path.parent} holds a run that has begun, {path} stays as it is: {changed}", file=sys.stderr)


def _train_stage(name: str, later: Run) -> None:
    """Trains the recipe `name`, from which `later` starts, unless its run has finished."""
    stage: Run = build_recipe(name)
    if (stage.job.folder() / "summary.json").is_file():
        return
    if ranks().is_main:
        print(f"{later.job.name} starts from {name}, which is not there yet: training it first", file=sys.stderr)
    for earlier in stage.job.after:
        _train_stage(earlier, stage)
    train(replace(stage, parallel=later.parallel))
