"""Weights out: a student as plain diffusers, as safetensors, in the original Cosmos names, or as LoRA files.

    diffusers     a folder that DiffusionPipeline.from_pretrained opens with no trace of us (to_diffusers.py)
    safetensors   student.safetensors and how it is meant to be built and sampled; for any network
    pt-original   model.pt (and its fp32 and bf16 moving averages) in the names of the original Cosmos code
    lora          adapters in the names of diffusers/peft and of kohya/ComfyUI

Beside each lie student.json and README.md: the schedule, and the envelope that it was trained in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fewstep import registry
from fewstep.config import ConfigError, parse
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.errors import UserError
from fewstep.export.model_card import model_card
from fewstep.files import whole_folder, write_json, write_text
from fewstep.inference.model import Model, _Nets, envelope_of, of_run
from fewstep.networks.lora import Lora, as_diffusers, as_kohya, by_module
from fewstep.networks.weights.addresses import locate, read
from fewstep.training.checkpoint import read_progress

Form = Literal["auto", "diffusers", "safetensors", "pt-original", "lora"]


def checked_form(name: str) -> Form:
    """The form of this name; refuses others."""
    if name not in get_args(Form):
        raise UserError(f"--format {name}: is none of {', '.join(get_args(Form))}")
    return cast(Form, name)


def export(address: str, out: Path, form: Form = "auto", base: Path | None = None) -> list[Path]:
    """The files written. Complete or not there; a folder with anything else in it than an earlier export is refused.

    base: a pipeline's folder; the diffusers form takes its vae, text encoder and tokenizer, which the run does not have.
    """
    folder, role = locate(address)
    if base is not None and not (base / "model_index.json").is_file():
        raise UserError(f"--base {base}: is no folder of a diffusers pipeline, it has no model_index.json")
    usual, why = _usual_form(folder.parent.parent)
    if form == "diffusers" and usual != "diffusers" and why:
        raise UserError(f"--format diffusers: {why}. Take --format {usual}")
    if form == "auto":
        form = usual
        if why:
            print(f"note: --format {form}, because {why}", file=sys.stderr)
    if base is not None and form != "diffusers":
        raise UserError(f"--base has no effect with --format {form}: only a diffusers folder holds a pipeline")
    _refuse_strangers(out)
    with whole_folder(out, replaces=True) as partial:
        _write(f"{folder}:{role}", folder, role, partial, form, base)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _write(address: str, folder: Path, role: str, out: Path, form: Form, base: Path | None) -> None:
    run = folder.parent.parent
    if not (run / "student.json").is_file():
        raise UserError(f"{run}: has no student.json: its method makes nothing that is sampled, a tokenizer for instance")
    # As the run wrote it: its method and network may live in a file of the user's, which is not needed here.
    told: dict[str, Any] = json.loads((run / "student.json").read_text())
    about = {"source": str(run.name), "role": role, "step": read_progress(folder).step, **told}
    config = read_yaml_mapping(read_text(run / "config.yaml"), str(run / "config.yaml"))
    known = envelope_of(config, told)
    about |= {"envelope": asdict(known), "notes": []}
    if form == "safetensors" and not _is_lora(config):
        _save(read(address), out / "student.safetensors", about)
    else:
        try:
            model = of_run(address)
        except ConfigError as error:
            raise UserError(
                f"{run}: cannot be built here, which --format {form} needs ({error}). If its network is your own, "
                "take --format safetensors"
            ) from None
        if form == "safetensors":
            _save(model.network.module.state_dict(), out / "student.safetensors", about)
        elif form == "diffusers":
            from fewstep.export.to_diffusers import write_folder

            about = write_folder(replace(model, envelope=known), about, out, base)
        elif form == "pt-original":
            _write_original(address, folder, role, out)
        elif form == "lora":
            about["notes"] += _write_lora(address, config, out)
    write_json(out / "student.json", about)
    write_text(out / "config.yaml", (run / "config.yaml").read_text())
    summary = run / "summary.json"
    scores = json.loads(summary.read_text()) if summary.is_file() else {}
    write_text(out / "README.md", model_card(about, config, scores, form))


def _save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    told = {"format": "pt", "fewstep": json.dumps(about)}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata=told)


def _write_lora(address: str, config: Mapping[str, Any], out: Path) -> list[str]:
    """One file for each module of diffusers that has adapters; what a reader must know of them."""
    from safetensors.torch import save_file

    nets = parse(_Nets, {"networks": config["networks"]}).networks
    role, kind = nets.student, getattr(nets.teacher, "kind", "")  # @kind sets it
    if not isinstance(role, Lora):
        raise UserError("--format lora: this run's student is a full network; networks.student=lora trains adapters")
    notes: list[str] = []
    for part, adapters in by_module(read(address)).items():
        stem = {"transformer": "", "transformer_2": "transformer_2_"}.get(part, f"{part}_")
        if part.startswith("controlnet"):  # of no class that takes adapters by itself
            named, note = as_diffusers(adapters, role.scale, prefix=""), _OF_A_BRANCH
        else:
            named, note = as_diffusers(adapters, role.scale, prefix="unet" if kind == "unet" else "transformer"), _OF_THE_SECOND
            save_file(as_kohya(adapters, role.scale), out / f"{stem}kohya_lora.safetensors", metadata={"format": "pt"})
        file = f"{stem}pytorch_lora_weights.safetensors" if stem else "pytorch_lora_weights.safetensors"
        save_file(named, out / file, metadata={"format": "pt"})
        notes += [note.format(file=file)] if stem else []
    return notes


_OF_A_BRANCH = (
    "`{file}` holds the adapters of the control branch, in peft's names. diffusers' class for it does not load adapters: put "
    "them in with `peft.inject_adapter_in_model` and `peft.set_peft_model_state_dict`, or export the student merged."
)
_OF_THE_SECOND = "`{file}` is for the low-noise expert: `load_lora_weights(..., load_into_transformer_2=True)`."


def _write_original(address: str, folder: Path, role: str, out: Path) -> None:
    """model.pt: the weights as trained; model_ema_fp32.pt, model_ema_bf16.pt: their moving average; iter_N_full.pt: both."""
    student = role.partition(".")[0]
    step = read_progress(folder).step
    states: dict[str, dict[str, Tensor]] = {}
    for part in ("weights", "ema"):
        try:
            found = of_run(f"{folder}:{student}.{part}")
        except ValueError:
            if part == "weights":
                raise
            continue  # a run without a moving average
        states[part] = in_original_names(found)
    torch.save(states["weights"], out / "model.pt")
    if "ema" in states:
        torch.save({n: t.float() for n, t in states["ema"].items()}, out / "model_ema_fp32.pt")
        torch.save({n: t.bfloat16() for n, t in states["ema"].items()}, out / "model_ema_bf16.pt")
    torch.save({"model": states["weights"], "ema": states.get("ema"), "iteration": step}, out / f"iter_{step:09d}_full.pt")


def in_original_names(model: Model) -> dict[str, Tensor]:
    """The weights of a Cosmos network, named as in the released files."""
    from fewstep.networks.families.cosmos.keys import original_names, refuse_apart
    from fewstep.networks.families.cosmos.network import Cosmos

    if not isinstance(model.network, Cosmos):
        raise UserError(f"--format pt-original: {type(model.network).__name__} is no Cosmos network, and has no such names")
    state = model.network.module.state_dict()
    names = original_names(state, "1" if model.network.family == "edm" else "2")
    refuse_apart({name: (lambda tensor=tensor: tensor) for name, tensor in state.items()})
    return {names[name]: tensor.contiguous().clone() for name, tensor in state.items() if name in names}


def _usual_form(run: Path) -> tuple[Form, str]:
    """What --format auto writes, as far as the run's paper tells (nothing is built); and why that is no folder of diffusers."""
    paper = run / "student.json"
    network = (json.loads(paper.read_text()).get("network") or {}) if paper.is_file() else {}
    cls = registry.find("network", str(network.get("kind")))
    if cls is None or "pretrained" not in getattr(cls, "__dataclass_fields__", {}):
        return "safetensors", ""
    controls = network.get("controls") or ()
    if network.get("style") == "transfer1":
        why = (
            "diffusers has no class for the control branch of Cosmos-Transfer1, and so no pipeline that could run this student"
        )
        return ("pt-original" if len(controls) == 1 else "safetensors"), why
    if len(controls) > 1:
        return "pt-original", f"diffusers' pipeline of Transfer2.5 has one control branch, and this network has {len(controls)}"
    return "diffusers", ""


def _is_lora(config: Mapping[str, Any]) -> bool:
    return ((config.get("networks") or {}).get("student") or {}).get("kind") == "lora"


def _refuse_strangers(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file")
    if any(out.iterdir()) and not ((out / "student.json").is_file() and not (out / "checkpoints").is_dir()):
        raise UserError(f"--out {out}: holds something else than an earlier export; choose a new folder")
