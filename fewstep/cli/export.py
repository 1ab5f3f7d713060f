"""`fewstep export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep.cli.app import app
from fewstep.cli.options import OWN, folder_to_write, imports, load, model_to_read, next_step, one_of, option

GRIDS = ("int8", "int4", "float8")
FORMS = ("auto", "diffusers", "safetensors", "pt-original", "lora", "delta")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder, or RUN@ITER:ROLE.")],
    out: Annotated[Path, option("--out", "Folder to write.", callback=folder_to_write)],
    form: Annotated[str, option("--format", f"Form of the files: {', '.join(FORMS)}.", callback=one_of(*FORMS))] = "auto",
    base: Annotated[
        str | None,
        option("--base", "Folder or hub id of a pipeline that completes the student.", callback=model_to_read),
    ] = None,
    codec: Annotated[str | None, option("--codec", "Folder or hub id of another vae than that of --base.")] = None,
    text_encoder: Annotated[
        str | None, option("--text-encoder", "Folder or hub id of another text encoder than that of --base.")
    ] = None,
    add: Annotated[
        list[str] | None, option("--add", "Add a delta or adapters to the weights, FILE or FILE:SCALE; may be repeated.")
    ] = None,
    rank: Annotated[int | None, option("--rank", "With --format delta: also write it as adapters of this rank.")] = None,
    rounding: Annotated[
        str | None, option("--rounding", f"Round the weights of Linear layers: {', '.join(GRIDS)}.", callback=one_of(*GRIDS))
    ] = None,
    config: Annotated[Path | None, OWN] = None,
) -> None:
    """Write the student of a run (its moving average) as plain diffusers or in another form, with a model card."""
    load(config)
    with imports():
        from fewstep.export.export import checked_form
        from fewstep.export.export import export as write

    pipeline = {"codec": codec, "text_encoder": text_encoder}
    for path in write(run, out, checked_form(form), base, **pipeline, add=add or (), rank=rank, rounding=cast(Any, rounding)):
        print(path)
    next_step("fewstep", "generate", out, "--prompt", "...")
