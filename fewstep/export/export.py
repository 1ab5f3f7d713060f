"""Weights out: a student as plain diffusers, as safetensors, in the original Cosmos names, or as LoRA files.

    diffusers     a folder that DiffusionPipeline.from_pretrained opens with no trace of us (to_diffusers.py)
    safetensors   student.safetensors, for any network
    pt-original   model.pt (and its fp32 and bf16 moving averages) in the names of the original Cosmos code
    lora          adapters in the names of diffusers/peft and of kohya/ComfyUI
    delta         the weights less the teacher's, and with a rank the adapters nearest to that

Beside each lie student.json and README.md: the schedule, and the envelope that it was trained in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from fewstep.config import ConfigError
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.errors import UserError
from fewstep.export.base import Base
from fewstep.export.model_card import model_card
from fewstep.files import copy_entry, restore, whole_folder, write_tensors, write_text
from fewstep.inference.card import FILE as CARD
from fewstep.inference.card import StudentCard
from fewstep.inference.model import networks_of, of_run
from fewstep.networks.grid import Grid, round_linear
from fewstep.networks.weights.addresses import locate, read
from fewstep.training.checkpoint import read_progress
from fewstep.untrusted.text import read_json

ROUNDED = (
    "The weights of Linear layers are values of {grid}, written as plain tensors. torchao's `quantize_` with `{config}` stores "
    "them in that type and changes none of them."
)
TORCHAO: Mapping[Grid, str] = {
    "int8": "IntxWeightOnlyConfig(torch.int8, PerAxis(0), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR)",
    "int4": "IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR)",
    "float8": "Float8WeightOnlyConfig()",
}
Form = Literal["auto", "diffusers", "safetensors", "pt-original", "lora", "delta"]


def checked_form(name: str) -> Form:
    """The form of this name; refuses others."""
    if name not in get_args(Form):
        raise UserError(f"--format {name}: is none of {', '.join(get_args(Form))}")
    return cast(Form, name)


def export(
    address: str,
    out: Path,
    form: Form = "auto",
    base: str | Path | None = None,
    *,
    codec: str | None = None,
    text_encoder: str | None = None,
    add: Sequence[str] = (),
    rank: int | None = None,
    rounding: Grid | None = None,
) -> list[Path]:
    """Writes the export, whole or not at all, and returns its files. An earlier export in `out` is replaced; other files stay.

    base: a pipeline, folder or hub id; the diffusers form takes its vae, text encoder and tokenizer, which no run has.
    codec, text_encoder: others than those of the base, or where there is none.
    add: files of deltas or adapters, FILE or FILE:SCALE, that are added to the weights. rank: of the adapters beside a delta.
    rounding: the grid to which the weights of Linear layers are rounded at the end; a student trained so has its own.
    """
    folder, role = locate(address)
    usual, why = _usual_form(folder.parent.parent)
    if form == "diffusers" and usual != "diffusers" and why:
        raise UserError(f"--format diffusers: {why}. Take --format {usual}")
    if form == "auto":
        form = usual
        if why:
            print(f"note: --format {form}, because {why}", file=sys.stderr)
    options = {"--base": base, "--codec": codec, "--text-encoder": text_encoder}
    unused = [name for name, value in options.items() if value is not None]
    if unused and form != "diffusers":
        raise UserError(f"{unused[0]} has no effect with --format {form}: only a diffusers folder holds a pipeline")
    if rank is not None and form != "delta":
        raise UserError(f"--rank has no effect with --format {form}: it is of the adapters beside a delta")
    if add and form in ("lora", "pt-original"):
        raise UserError(f"--add cannot be written with --format {form}: take diffusers, safetensors or delta")
    grid = _rounding(folder.parent.parent, rounding)
    if grid is not None and (form in ("lora", "delta") or (form == "pt-original" and rounding is not None)):
        raise UserError(f"--format {form} cannot hold weights that are rounded to {grid}: take diffusers or safetensors")
    parts = Base.of(base, codec, text_encoder)
    files = _files_beside(out)
    with whole_folder(out, replaces=True) as partial:
        _write(f"{folder}:{role}", folder, role, partial, form, parts, add, rank, grid)
        _keep(files, out, partial)
    return sorted(path for path in out.rglob("*") if path.is_file() and path.relative_to(out) not in files)


def _write(
    address: str,
    checkpoint: Path,
    role: str,
    out: Path,
    form: Form,
    base: Base,
    add: Sequence[str],
    rank: int | None,
    grid: Grid | None,
) -> None:
    run = checkpoint.parent.parent
    if not (run / CARD).is_file():
        raise UserError(f"{run}: has no {CARD}: its method makes nothing that is sampled, a tokenizer for instance")
    # As the run wrote it: its method and network may live in a file of the user's, which is not needed here.
    card = StudentCard.read(run, "It is written anew when the run goes on")
    is_rounded = card.rounding is not None and not add  # as it was trained
    card = replace(card, source=run.name, role=role, step=read_progress(checkpoint).step)
    config = read_yaml_mapping(read_text(run / "config.yaml"), str(run / "config.yaml"))
    if add:
        card = replace(card, notes=(f"To the weights of the run were added: {', '.join(Path(file).name for file in add)}.",))
    if grid is not None:
        card = replace(card, rounding=grid, notes=(*card.notes, ROUNDED.format(grid=grid, config=TORCHAO[grid])))
    if form == "safetensors" and not _is_lora(config) and not add and grid is None:
        _save(read(address), out / "student.safetensors", card)
    else:
        try:
            model, networks = of_run(address), networks_of(run)
        except ConfigError as error:
            raise UserError(
                f"{run}: cannot be built here, which --format {form} needs ({error}). If its network is your own, "
                "take --format safetensors"
            ) from None
        _add(model.network.module, add)
        if grid is not None and not is_rounded:
            round_linear(model.network.module, grid)
        if form == "safetensors":
            _save(model.network.module.state_dict(), out / "student.safetensors", card)
        elif form == "diffusers":
            from fewstep.export.to_diffusers import write_folder

            card = write_folder(model, card, out, base)
        elif form == "pt-original":
            from fewstep.export.original import write_original

            write_original(checkpoint, out)
        elif form == "lora":
            from fewstep.export.lora import write_lora

            card = replace(card, notes=write_lora(address, networks, out))
        elif form == "delta":
            from fewstep.export.delta import write_delta

            card = replace(card, notes=(*card.notes, *write_delta(model, networks, out, rank)))
    index = out / "model_index.json"
    name = read_json(index, "Export it again").get("_class_name") if index.is_file() else None
    summary = run / "summary.json"
    scores = read_json(summary, "It is written anew when the run ends") if summary.is_file() else {}
    write_text(out / "config.yaml", read_text(run / "config.yaml"))
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    card = replace(card, files=tuple(sorted(names | {CARD, "README.md"})))
    write_text(out / "README.md", model_card(card, config, scores, form, name if isinstance(name, str) else None))
    card.write(out)


def _add(module: nn.Module, files: Sequence[str]) -> None:
    from fewstep.networks.weights.deltas import added
    from fewstep.untrusted.stored import Stored

    for file in files:
        weights = {name: Stored.of(tensor) for name, tensor in module.state_dict().items()}
        module.load_state_dict({name: tensor.read() for name, tensor in added(weights, file).items()}, strict=True)


def _save(tensors: Mapping[str, Tensor], path: Path, card: StudentCard) -> None:
    write_tensors(path, tensors, {"fewstep": json.dumps(card.as_json())})


def _usual_form(run: Path) -> tuple[Form, str]:
    """What --format auto stands for, by the run's network (which is not built); and why that is no folder of diffusers."""
    if not (run / CARD).is_file():
        return "safetensors", ""
    try:
        form, why = StudentCard.read(run, "It is written anew when the run goes on").spec().export_format()
    except ConfigError:  # a network of the user's own, whose file is not loaded
        return "safetensors", ""
    return checked_form(form), why


def _rounding(run: Path, grid: Grid | None) -> Grid | None:
    """The grid of the student's own training, or the one to round to afterwards."""
    own = StudentCard.read(run, "It is written anew when the run goes on").rounding if (run / CARD).is_file() else None
    if own is not None and grid not in (None, own):
        raise UserError(f"--rounding {grid}: this student was trained with weights of {own}, and is written with these")
    return own or grid


def _is_lora(config: Mapping[str, Any]) -> bool:
    return ((config.get("networks") or {}).get("student") or {}).get("kind") == "lora"


def _files_beside(out: Path) -> list[Path]:
    """The files in `out`, relative to it, that the earlier export there did not write; they stay where they are.

    Raises UserError if `out` is no earlier export.
    """
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: give the export a folder of its own")
    restore(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file")
    if not (out / CARD).is_file() or (out / "checkpoints").is_dir():
        raise UserError(f"--out {out}: holds something else than an earlier export; choose a new folder")
    files = StudentCard.read(out, "Choose a new folder").files
    if not files:
        raise UserError(f"--out {out}: does not say which of its files an export wrote; choose a new folder")
    paths = [path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [path for path in paths if path.as_posix() not in files]


def _keep(files: Iterable[Path], out: Path, partial: Path) -> None:
    """Gives these files of `out` a place in `partial`, which is to replace it."""
    for file in files:
        target = partial / file
        if target.exists() or target.is_symlink():
            raise UserError(f"--out {out}: would replace {file}, which no export wrote; choose a new folder")
        copy_entry(out / file, target)
