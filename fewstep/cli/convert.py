"""`fewstep convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.app import app
from fewstep.cli.options import UsageError, imports, one_of, option
from fewstep.files import unfit

RELEASED = "nvidia/Cosmos-Transfer1-7B"  # where the download of Cosmos-Transfer1 puts its base and its controls
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # of files of weights


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
    if ctrl_type is not None:
        if base is not None or control:
            raise UsageError("--ctrl-type names both files; leave --base and --control out.")
        folder = Path(checkpoint_dir) / RELEASED
        base, control = str(folder / "base_model.pt"), [str(folder / f"{ctrl_type}_control.pt")]
    if base is not None and source is not None and out is None:
        source, out = None, Path(source)  # one word beside --base is what to write
    if (source is None) == (base is None):
        raise UsageError("give either SRC, or --base with --control.")
    if base is not None and not control:
        raise UsageError("--base wants the --control to put beside it.")
    if base is None and out is None:
        raise UsageError("Missing argument 'OUT': OUT.pt, OUT.safetensors, or a folder.")
    if out is not None and out.suffix not in ("", ".pt", ".pth", ".safetensors"):
        raise UsageError(f"OUT {str(out)!r}: must end in .pt or .safetensors, or be a folder for diffusers.")
    if parts is not None and (out is None or out.suffix not in (".pt", ".pth")):
        raise UsageError("--parts N: are of OUT.pt, as OUT_model_mp_0.pt, .. for N processes.")
    reason = None if out is None else unfit(out, is_folder=not out.suffix)
    if reason is not None:
        raise UsageError(f"OUT {str(out)!r} {reason}.")
    _refuse_lacking([source] if base is None else [base, *(control or ())])
    with imports():
        from fewstep.networks.weights.convert import convert as write

    form: Any = dtype  # Any: one of the four names
    joined: dict[str, Any] = {"base": base, "control": control or (), "add": add or ()}  # Any: words, which convert checks
    for file in write(source, out, **joined, model=model, dtype=form, lora_scale=lora_scale, parts=parts):
        print(file)


def _refuse_lacking(addresses: Sequence[str | None]) -> None:
    """Refuses files of weights that are not there; of other addresses only their reader knows."""
    files = [Path(part.partition("=")[2] or part) for address in addresses if address for part in address.split("+")]
    lacking = [str(file) for file in files if file.suffix in SUFFIXES and not file.exists() and not _is_split(file)]
    if lacking:
        raise UsageError(f"there is no {' and no '.join(lacking)}.")


def _is_split(file: Path) -> bool:
    """Whether it stands for parts of tensor parallelism."""
    return file.with_name(f"{file.stem.partition('_model_mp_')[0]}_model_mp_0.pt").is_file()
