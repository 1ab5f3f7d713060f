"""`fewstep convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import UsageError, imports, one_of, option


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(help="Weights in any form; with --base, the file to write.")] = None,
    out: Annotated[Path | None, typer.Argument(help="OUT.pt, OUT.safetensors, or a folder for diffusers.")] = None,
    base: Annotated[str | None, option("--base", "Weights of the transformer that a control branch is added to.")] = None,
    control: Annotated[
        list[str] | None, option("--control", "Weights of the control branch, FILE or NAME=FILE; may be repeated.")
    ] = None,
    ctrl_type: Annotated[
        str | None,
        option("--ctrl-type", "Take base and control of Cosmos-Transfer1 7B: edge, depth, .."),
    ] = None,
    checkpoint_dir: Annotated[str, option("--checkpoint-dir", "Folder that --ctrl-type looks in.")] = "checkpoints",
    model: Annotated[str | None, option("--model", "Name of the published model, or a folder with a config.json.")] = None,
    dtype: Annotated[
        str,
        option("--dtype", "Type of the tensors: keep, fp32, bf16 or fp16.", callback=one_of("keep", "fp32", "bf16", "fp16")),
    ] = "keep",
    add: Annotated[
        list[str] | None,
        option("--add", "Add a delta of `fewstep export --format delta`, or adapters: FILE or FILE:SCALE; may be repeated."),
    ] = None,
    lora_scale: Annotated[
        float | None, option("--lora-scale", "Add adapters in the file to its weights, multiplied by this number.")
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            min=2, help="Write OUT.pt as OUT_model_mp_0.pt, .., for this number of processes of tensor parallelism (Cosmos 1)."
        ),
    ] = None,
) -> None:
    """Convert weights between forms (original Cosmos, FastGen, distributed, diffusers), or join a base and its control."""
    if ctrl_type is not None and (base is not None or control):
        raise UsageError("--ctrl-type names both files; leave --base and --control out.")
    if ctrl_type is None and source is None and base is None:
        raise UsageError("give either SRC, or --base with --control.")
    if base is not None and not control and ctrl_type is None:
        raise UsageError("--base wants the --control to put beside it.")
    with imports():
        from fewstep.networks.weights.convert import from_words

    for written in from_words(
        source, out, base, control or [], ctrl_type, checkpoint_dir, model, dtype, lora_scale, parts, add or ()
    ):
        print(written)
