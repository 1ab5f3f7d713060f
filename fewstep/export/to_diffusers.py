"""A student as a folder of diffusers: its network, the parts of the pipeline it belongs to, and its schedule.

The scheduler is one of diffusers where one takes the student's steps (schedulers.py): then upstream's own pipeline samples it,
too. Where it needs a loop of its own - every Cosmos network, and a noise that is taken again - pipeline.py in the folder is
that loop; it imports torch and diffusers only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep import registry
from fewstep.diffusion import StudentSampler
from fewstep.diffusion.path import floats
from fewstep.errors import UserError
from fewstep.export.base import copy_parts
from fewstep.export.schedulers import scheduler_of
from fewstep.inference.card import StudentCard
from fewstep.inference.model import Model
from fewstep.networks.encoders.codecs import Form

PIPELINE = Path(__file__).with_name("student_pipeline.py.txt")


def write_folder(model: Model, card: StudentCard, out: Path, base: Path | None) -> StudentCard:
    """Writes the folder; returns the card with what the folder's own pipeline.py reads."""
    assert isinstance(model.sampler, StudentSampler)
    network: Any = model.network  # Any: an adapter over a class of diffusers
    parts = _parts(network)
    index: dict[str, Any] = {"_class_name": "", "_diffusers_version": _version()}
    for name, part in parts.items():
        part.save_pretrained(str(out / name))
        index[name] = ["diffusers", type(part).__name__]
    base_class = "" if base is None else copy_parts(base, out, index)
    if _standalone(out) is not None:
        index.pop("text_encoder", None)  # no class of transformers: pipeline.py reads it
    predicts = "v" if type(network).__name__ == "CogVideoX" else getattr(network, "predicts", "eps")
    scheduler = scheduler_of(model.sampler, network.path, base_class, predicts)
    if scheduler is not None:
        scheduler.save_pretrained(str(out / "scheduler"))
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    asked = _asked(network)
    is_cosmos = asked is not None and asked["family"] in ("flow", "edm")
    if asked is not None:
        (out / "pipeline.py").write_text(_pipeline(out))
    if base_class and scheduler is not None and not is_cosmos:
        index["_class_name"] = base_class
    elif asked is not None:
        index["_class_name"] = ["pipeline", "StudentPipeline"]
    else:
        raise UserError(
            f"--format diffusers: {type(network).__name__} with renoise={model.sampler.renoise} and times "
            f"{list(model.sampler.times)} needs "
            + ("--base, the pipeline's folder" if scheduler is not None else "a scheduler that diffusers does not have")
            + "; --format safetensors always works"
        )
    steps = schedule(model.sampler, network)
    solver = {"ode": "ode", "fresh": "sde"}.get(model.sampler.renoise, "same") if len(steps) > 1 else "ode"
    told: dict[str, Any] = {"num_inference_steps": len(steps), "guidance_scale": 1.0, "solver": solver}
    told["denoising_timesteps"] = [round(1000 * step["flow_time"]) for step in steps]
    index["dmd2_config"] = told
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    envelope = card.envelope.with_codec(_codec_form(out)) if "vae" in index else card.envelope
    channels = next(iter(parts.values())).config.out_channels if envelope.latent_shape is None else envelope.latent_shape[0]
    pipeline = {"schedule": steps, "network_family": asked, "latent_scale": _scale(network), "latent_channels": channels}
    return replace(card, envelope=envelope, pipeline=pipeline)


def schedule(sampler: StudentSampler, network: Any) -> list[dict[str, float]]:
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


def _parts(network: Any) -> dict[str, Any]:
    """The modules of diffusers in this network, by the names their pipelines give them."""
    module: nn.Module = network.module
    if hasattr(module, "base") and hasattr(module, "branches"):
        branches: Any = list(module.branches.values())  # pyright: ignore[reportCallIssue]  # an attribute of a module
        if len(branches) != 1 or not hasattr(branches[0], "save_pretrained"):
            raise UserError(
                "--format diffusers: diffusers has control branches of Transfer2.5, one at a time; this network has "
                f"{len(branches)} of class {type(branches[0]).__name__}. Take --format safetensors or pt-original"
            )
        return {"transformer": module.base, "controlnet": branches[0]}
    if hasattr(module, "transformer_2"):
        return {"transformer": module.transformer, "transformer_2": module.transformer_2}
    if not hasattr(module, "save_pretrained"):
        raise UserError(f"--format diffusers: {type(module).__name__} is no class of diffusers; take --format safetensors")
    return {"unet" if "UNet" in type(module).__name__ else "transformer": module}


def _asked(network: Any) -> dict[str, Any] | None:
    """How the folder's own pipeline asks the network; None where it does not know its family."""
    name = type(network).__name__
    if name == "Cosmos":
        fields = ("family", "sigma_data", "use_fps", "clean_time")
        return {field: getattr(network, field) for field in fields}
    if name == "Wan" and network.module.config.in_channels == network.module.config.out_channels:
        return {"family": "wan", "whole_times": network.whole_times, "text_tokens": network.text_tokens}
    return None


def _scale(network: Any) -> float:
    """Of the latents: an EDM network's state has the spread of its data."""
    return network.sigma_data if getattr(network, "family", "flow") == "edm" else 1.0


def _standalone(out: Path) -> Path | None:
    """The source of the folder's text encoder, if neither diffusers nor transformers has its class."""
    config = out / "text_encoder" / "config.json"
    model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
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
