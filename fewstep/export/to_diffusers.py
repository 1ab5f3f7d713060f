"""A student as a folder of diffusers: its network, the parts of the pipeline it belongs to, and its schedule.

A teacher that was post-trained becomes a pipeline of its base's own class, with the base's scheduler, if a base is given.

The scheduler of a student is one of diffusers where one takes the student's steps (schedulers.py): then upstream's own pipeline
samples it, too. Where it needs a loop of its own - every Cosmos network, and a noise that is taken again - pipeline.py in the
folder is that loop; it imports torch and diffusers only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep import registry
from fewstep.diffusion import EDM, Sampler, StudentSampler, TeacherSampler
from fewstep.diffusion.path import floats
from fewstep.errors import UserError
from fewstep.export.base import ADVICE, Base, copy_scheduler
from fewstep.export.schedulers import Fit, scheduler_of
from fewstep.files import write_json, write_text
from fewstep.inference.card import StudentCard
from fewstep.inference.model import Model, teacher_sampler
from fewstep.networks.contract import Network, Scheduling
from fewstep.networks.encoders.codecs import Form
from fewstep.untrusted.text import read_json

GUARDED = (
    "diffusers' {cls} wants the package cosmos_guardrail; without it, give `from_pretrained` a `safety_checker` of your own."
)
# Settings of a network that its codec and text encoders must fit.
DOORS = ("out_channels", "text_dim", "text_embed_dim", "cross_attention_dim", "joint_attention_dim", "image_dim")
PIPELINE = Path(__file__).with_name("student_pipeline.py.txt")


def write_folder(model: Model, card: StudentCard, out: Path, base: Base) -> StudentCard:
    """Writes the folder; returns the card with what the folder's own pipeline.py reads."""
    network, traits = model.network, model.network.traits
    sampler = as_student(model.sampler, network)
    parts = network.parts()
    index: dict[str, Any] = {"_class_name": "", "_diffusers_version": _version()}
    for name, part in parts.items():
        part.save_pretrained(str(out / name))
        index[name] = ["diffusers", type(part).__name__]
    if base.pipeline is not None and not traits.pipeline_class:  # which another class than the base's samples
        _refuse_foreign(base.pipeline, parts)
    base_class = base.copy_parts(out, index)
    if _standalone(out) is not None:
        index.pop("text_encoder", None)  # no class of transformers: pipeline.py reads it
    whole = base.pipeline
    if whole is not None and base_class and _is_teacher_of(whole, model, index) and copy_scheduler(whole, out, index):
        return _teacher_folder(model, card, out, whole, base_class, index)
    base_class = traits.pipeline_class or base_class
    fit = scheduler_of(sampler, network.path, traits.scheduling)
    if fit is not None:
        fit.scheduler.save_pretrained(str(out / "scheduler"))
        index["scheduler"] = ["diffusers", type(fit.scheduler).__name__]
    settings = traits.pipeline_settings
    if settings is not None:
        write_text(out / "pipeline.py", _pipeline(out))
    why = _why_own_loop(sampler, whole, base_class, traits.scheduling, fit)
    if not why and fit is not None:
        index["_class_name"] = base_class
        rounded = f", whose times differ from the student's by at most {fit.offset:.1g}" if fit.offset else ""
        print(f"note: {base_class} of diffusers samples it, with {index['scheduler'][1]}{rounded}", file=sys.stderr)
    elif settings is not None:
        index["_class_name"] = ["pipeline", "StudentPipeline"]
        print(f"note: pipeline.py in the folder samples it, because {why}", file=sys.stderr)
    else:
        raise UserError(f"--format diffusers: {why}. Change that, or take --format safetensors, which always works")
    steps = schedule(sampler, network)
    solver = {"ode": "ode", "fresh": "sde"}.get(sampler.renoise, "same") if len(steps) > 1 else "ode"
    settings_of_steps: dict[str, Any] = {"num_inference_steps": len(steps), "guidance_scale": 1.0, "solver": solver}
    settings_of_steps["denoising_timesteps"] = [round(1000 * step["flow_time"]) for step in steps]
    if sampler is model.sampler and sampler.shift is None:  # a teacher and a flow map are sampled with other steps, too
        index["dmd2_config"] = settings_of_steps
    write_json(out / "model_index.json", index, indent=2)
    envelope = card.envelope.with_codec(_codec_form(out)) if "vae" in index else card.envelope
    channels = next(iter(parts.values())).config.out_channels if envelope.latent_shape is None else envelope.latent_shape[0]
    scale = network.path.sigma_data if isinstance(network.path, EDM) else 1.0  # an EDM network's state has its data's spread
    pipeline = {"schedule": steps, "network_family": settings, "latent_scale": scale, "latent_channels": channels}
    return replace(card, envelope=envelope, pipeline=pipeline)


def _refuse_foreign(base: Path, parts: Mapping[str, Any]) -> None:  # Any: networks of diffusers
    """Refuses a pipeline of another network: its codec, text encoder and loop would be taken for the student's."""
    for name, part in parts.items():
        config = base / name / "config.json"
        theirs = read_json(config, ADVICE) if config.is_file() else {}
        own = {"_class_name": type(part).__name__, **part.config}
        for key in ("_class_name", *DOORS):
            if key in theirs and theirs[key] != own.get(key):
                what = key.removeprefix("_").replace("_", " ")
                raise UserError(
                    f"--base {base}: the {what} of its {name} is {theirs[key]}, that of the student {own.get(key)}. Take the "
                    "pipeline that the student's teacher is part of"
                )


def _why_own_loop(sampler: StudentSampler, base: Path | None, base_class: str, scheduling: Scheduling, fit: Fit | None) -> str:
    """Why upstream's pipeline cannot sample the student; "" if it can."""
    times = f"renoise={sampler.renoise} and times {[round(time, 6) for time in sampler.times]}"
    if fit is None:
        return f"no scheduler of diffusers takes the steps of this student, {times}"
    if scheduling.needs_own_loop:
        return "diffusers' pipelines of this network do more than their scheduler says"
    if base is None:
        return "no --base was given, the folder of the pipeline that it belongs to"
    return "" if base_class else f"{base / 'model_index.json'} names no pipeline of diffusers"


def _is_teacher_of(base: Path, model: Model, index: Mapping[str, Any]) -> bool:
    """Whether the model is a post-trained teacher whose denoiser is of the same class as that of the pipeline `base`."""
    part = "unet" if "unet" in index else "transformer"
    config = base / part / "config.json"
    theirs = read_json(config, ADVICE).get("_class_name") if config.is_file() else None
    return model.is_teacher and part in index and index[part][1] == theirs


def _teacher_folder(
    model: Model, card: StudentCard, out: Path, base: Path, base_class: str, index: dict[str, Any]
) -> StudentCard:
    """Completes a folder of the base's own class, with the base's scheduler; returns the card with its sampler."""
    assert isinstance(model.sampler, TeacherSampler)
    index["_class_name"] = base_class
    write_json(out / "model_index.json", index, indent=2)
    sampler = replace(teacher_sampler(model.network, str(base)), num_steps=model.sampler.num_steps)
    envelope = card.envelope.with_codec(_codec_form(out)) if "vae" in index else card.envelope
    notes = (GUARDED.format(cls=base_class),) if base_class.startswith("Cosmos") else ()
    return replace(card, sampler=sampler, envelope=envelope, notes=(*card.notes, *notes))


def as_student(sampler: Sampler, network: Network) -> StudentSampler:
    """A teacher's grid as a student's times, walked by DDIM: the nearest to its own solver that a scheduler can be told."""
    if isinstance(sampler, StudentSampler):
        return sampler
    return StudentSampler(tuple(floats(sampler.times(network.path))), network.path, "ode")


def schedule(sampler: StudentSampler, network: Network) -> list[dict[str, float]]:
    """Per call: a and s of the state on the sampler's path, the time and the scale of the state for the network."""
    times = torch.tensor(sampler.times, dtype=torch.float64)
    a, s, _, _ = sampler.path.coefficients(times)
    if sampler.path == network.path:
        network_times, scale = times, torch.ones_like(times)
    else:  # as on_path does it
        network_times = network.path.time_of(s / a)
        inner_a, inner_s, _, _ = network.path.coefficients(network_times)
        scale = torch.hypot(inner_a, inner_s) / torch.hypot(a, s)
    columns = {"a": a, "s": s, "network_time": network_times, "scale": scale, "flow_time": s / (a + s)}
    return [dict(zip(columns, row)) for row in zip(*map(floats, columns.values()), strict=True)]


def _standalone(out: Path) -> Path | None:
    """The source of the folder's text encoder, if neither diffusers nor transformers has its class."""
    config = out / "text_encoder" / "config.json"
    model_type = read_json(config, ADVICE).get("model_type") if config.is_file() else None
    encoder = registry.find("text_encoder", str(model_type))
    return None if encoder is None else encoder.standalone


def _pipeline(out: Path) -> str:
    """pipeline.py, followed by the source of the folder's text encoder if it has one of its own."""
    source = _standalone(out)
    return PIPELINE.read_text() + ("" if source is None else f"\n\n{source.read_text()}")


def _codec_form(out: Path) -> Form:
    from fewstep.networks.encoders.codecs import open_codec

    return open_codec(out / "vae").form


def _version() -> str:
    import diffusers

    return diffusers.__version__
