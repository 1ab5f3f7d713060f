"""`fewstep plan`."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import FREE, JSON, imports, option


@app.command(context_settings=FREE)
def plan(
    context: typer.Context,
    as_json: Annotated[bool, option("--json", JSON)] = False,
) -> None:
    """Memory on each GPU: fewstep plan experiment=NAME a.b=c ... gpus=8 gpu=h100. No GPU and no weights are needed.

    gpu=here                          the GPU of this machine, or the memory of one without
    shape=16x16x88x160 text=512x1024  shapes of a batch (C T H W; tokens, channels), where there are no data yet
    """
    from fewstep.config import compose, read_command
    from fewstep.recipes import refuse_unknown
    from fewstep.training.plan.request import split_words

    words, request = split_words(context.args)
    command = read_command(words)
    refuse_unknown(command)
    for text in command.repeated():
        print(f"note: {text}", file=sys.stderr)
    with imports():
        from fewstep.training.plan.gpu_fit import answer
        from fewstep.training.run import Run

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {text}", file=sys.stderr, flush=True)

    record, text = answer(compose(command, Run), request, say)
    print(json.dumps(record) if as_json else text)
