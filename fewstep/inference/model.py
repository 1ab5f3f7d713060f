"""A model to be used: its network, how it is meant to be sampled, what it was trained on, and what belongs to it.

open_model("runs/kd@latest:student.ema")    a run's student; RUN:teacher is the teacher it had
open_model("student")                       a folder that `fewstep export` wrote
open_model("wan2.1-t2v-1.3b")               a pipeline of diffusers, folder or hub id: a teacher
open_model("base_model.pt+edge_control.pt") published Cosmos weights, in any form that networks/weights reads: a teacher
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import parse
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.diffusion import EDM, StudentSampler, TeacherSampler
from fewstep.errors import UserError
from fewstep.files import read_json
from fewstep.inference.card import Envelope, StudentCard
from fewstep.inference.request import SamplerOptions
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Autoencoder, open_codec
from fewstep.networks.families.upstream import told_by_pipeline
from fewstep.networks.families.wan.experts import Experts
from fewstep.networks.files import hub
from fewstep.networks.lora import Lora, merged
from fewstep.networks.roles import Networks, build
from fewstep.networks.weights.addresses import Piece, checkpoint_of, collect, load_into, pieces_of, read, tell
from fewstep.parallel import World, place


@dataclass(frozen=True)
class Model:
    network: Network
    spec: Any  # what built the network; Any: whatever is registered in group "network"
    sampler: StudentSampler | TeacherSampler
    envelope: Envelope = Envelope()
    folder: Path | None = None  # where its codec and text encoder are, if it has them

    @property
    def is_teacher(self) -> bool:
        return isinstance(self.sampler, TeacherSampler)


def open_model(address: str | Path, *, controls: Sequence[str] = (), known: str | None = None) -> Model:
    """The model at `address`, in eval mode and frozen.

    controls: what leads it, for a branch whose files do not say. known: which published network files of weights hold; None: as
    their shapes say.
    """
    text = str(address)
    folder = Path(text)
    if (folder / "student.json").is_file() and not (folder / "checkpoints").is_dir():
        model = _exported(folder)
    elif _is_run(text):
        model = of_run(text)
    else:
        pieces = None if _of_diffusers(folder) else pieces_of(text)
        if pieces is None and known is not None:
            raise UserError(f"--network {known}: {text} says itself what it is; the name is for files of weights")
        model = _teacher(text, controls) if pieces is None else _of_files(pieces, controls, known)
    model.network.module.eval().requires_grad_(False)
    return model


def folder_of(address: str) -> Path | None:
    """Where codec and text encoder of the model at `address` are: its folder or hub id; None for runs and files of weights."""
    folder = Path(address)
    if (folder / "student.json").is_file() and not (folder / "checkpoints").is_dir():
        return folder
    if _is_run(address) or not (_of_diffusers(folder) or pieces_of(address) is None):
        return None
    if not folder.is_dir():
        hub.expect_id(address, "model")
    return folder


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NetworksOfRun:
    networks: Networks


def networks_of(run: Path) -> Networks:
    """The networks in the configuration of a run folder. Raises ConfigError if a kind is not registered."""
    config = run / "config.yaml"
    mapping = read_yaml_mapping(read_text(config), str(config))
    return parse(_NetworksOfRun, {"networks": mapping.get("networks")}).networks


def of_run(address: str) -> Model:
    """The model of a run address: its student, of which LoRA adapters are merged into a plain network; RUN:teacher too."""
    place, _, role = address.partition(":")
    folder = checkpoint_of(place)
    run = folder.parent.parent
    networks = networks_of(run)
    if role == "teacher":
        network: Any = build(networks, ("teacher",), 0)["teacher"]
        pretrained = getattr(networks.teacher, "pretrained", None)  # of networks that may come from a pipeline
        return Model(network, networks.teacher, teacher_sampler(network, pretrained))
    card = StudentCard.read(run, "It is written anew when the run goes on")
    network = student_network(networks, read(address), address)
    return Model(network, networks.student.network or networks.teacher, card.sampler, card.envelope)


def student_network(nets: Networks, tensors: Mapping[str, Tensor], source: str) -> Network:
    """A plain network with the student's weights; adapters are merged into the teacher's."""
    role = nets.student
    if not isinstance(role, Lora):
        spec: Any = role.network or nets.teacher
        network = spec.build()
        load_into(network.module, tensors, source)
        return network
    network = build(nets, ("teacher",), 0)["teacher"]
    whole = merged(network.module.state_dict(), tensors, role.scale)
    load_into(network.module, whole, source)
    return network


def _is_run(address: str) -> bool:
    try:
        checkpoint_of(address.partition(":")[0])
    except ValueError:
        return False
    return True


# ---- folders ---------------------------------------------------------------------------------------------------------


def _exported(folder: Path) -> Model:
    card = StudentCard.read(folder, "Export the student again")
    spec: Any = card.spec()
    weights = folder / "student.safetensors"
    if weights.is_file():
        network = spec.build()
        load_into(network.module, read(str(weights)), str(folder))
    else:
        spec = _from(spec, folder)
        network = spec.build()
    return Model(network, spec, card.sampler, card.envelope, folder)


def _from(spec: Any, folder: Path) -> Any:  # Any: whatever is registered in group "network"
    """The configuration that builds the network from this folder of diffusers."""
    if hasattr(spec, "boundary"):
        low = replace(_from(spec.low, folder), subfolder="transformer_2")
        return replace(spec, high=_from(spec.high, folder), low=low)
    branches = {"branches": (str(folder),)} if hasattr(spec, "branches") else {}
    return replace(spec, pretrained=str(folder), **branches)


def _teacher(address: str, controls: Sequence[str] = ()) -> Model:
    """The denoiser of a pipeline of diffusers."""
    spec = spec_of(address, controls)
    folder = Path(address)
    network = spec.build()
    return Model(network, spec, teacher_sampler(network, address), folder=folder)


def teacher_sampler(network: Network, address: str | None) -> TeacherSampler:
    """How a teacher is sampled: as the pipeline at `address` says, else as published for the network's path."""
    sampler = TeacherSampler.for_path(network.path)
    if isinstance(network, Experts):
        sampler = replace(sampler, boundary=network.boundary)
    scheduler = {} if address is None else told_by_pipeline(address)
    is_euler, has_karras = scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler", scheduler.get("use_karras_sigmas")
    if sampler.grid == "flow" and is_euler and has_karras:  # Predict2: a flow on the grid of Cosmos 1
        sampler = replace(sampler, solver="res_2ab", grid="karras")
    if sampler.grid == "karras":
        return replace(sampler, **{name: float(scheduler[name]) for name in ("sigma_max", "sigma_min") if scheduler.get(name)})
    if sampler.grid == "even" or has_karras:  # Predict2.5: published with shift 5, whatever its pipeline's scheduler says
        return sampler
    if scheduler.get("use_dynamic_shifting"):  # Flux and Qwen-Image: the shift of their largest pictures
        sampler = replace(sampler, shift=round(math.exp(scheduler.get("max_shift") or 1.15), 4))
    else:
        sampler = replace(sampler, shift=float(scheduler.get("flow_shift") or scheduler.get("shift") or sampler.shift))
    return replace(sampler, solver="euler") if is_euler else sampler


def changed(sampler: TeacherSampler, options: SamplerOptions) -> TeacherSampler:
    """The sampler with what a command line says; refuses options that its grid does not have."""
    for name, grid in (("shift", "flow"), ("sigma_max", "karras")):
        if getattr(options, name) is not None and sampler.grid != grid:
            raise UserError(
                f"{options.SPELLED[name]} has no effect on this teacher, whose grid is {sampler.grid}: leave it out"
            )
    if options.guidance_low is not None and sampler.boundary is None:
        raise UserError("--guidance-low: this model is no pair of experts, one for high and one for low noise")
    return replace(sampler, **options.values())


def place_network(model: Model, device: torch.device, precision: str, world: World | None = None) -> None:
    """Moves the network to its device, or to its shards in `world`, in the precision in which it computes."""
    network, compute = model.network, torch.bfloat16 if precision == "bf16" else torch.float32
    alone = World(0, 1, device, None)
    place(network.module, network.blocks, world or alone, mode="fsdp", compute=compute, trained=False)


def codec_of(
    model: Model,
    name: str,
    address: str | None = None,
    *,
    tile: int | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """The codec at `address`, or the one beside the model that the user called `name`, at the scale of the model's latents."""
    path = model.network.path
    scale = path.sigma_data if isinstance(path, EDM) else 1.0  # the latents of an EDM network have the spread of its data
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return open_codec(codec_address(model, name, address), scale=scale, tile=tile, dtype=dtype, device=device)


def codec_address(model: Model, name: str, address: str | None) -> str:
    if address is not None:
        return address
    if model.folder is None or not ((model.folder / "vae").is_dir() or not model.folder.exists()):
        raise UserError(f"{name}: has no codec beside it. Add --codec, the folder of an autoencoder or of its pipeline")
    return str(model.folder)


def _of_files(pieces: Sequence[Piece], controls: Sequence[str], known: str | None) -> Model:
    """The published Cosmos network whose weights these are; it has no codec and no text encoder beside it."""
    from fewstep.networks.families.cosmos.models import MODELS
    from fewstep.networks.weights.convert import model_of

    if known is not None and known not in MODELS:
        raise UserError(f"--network {known}: is none of {', '.join(MODELS)}")
    if len(controls) == 1 and not any(name for name, _, _ in pieces):
        pieces = [*pieces[:-1], (controls[0], *pieces[-1][1:])]
    found = collect(pieces)
    tell(found)
    name, module = model_of(found, known)
    spec: Any = MODELS[name]
    if hasattr(spec, "branches"):
        spec = replace(spec, controls=tuple(module.branches))  # pyright: ignore[reportArgumentType]  # a ModuleDict
    network = spec.build()
    load_into(network.module, {n: stored.read() for n, stored in found.tensors.items()}, " and ".join(p[1] for p in pieces))
    return Model(network, spec, teacher_sampler(network, None))


def _of_diffusers(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model_index.json", "transformer", "unet", "config.json"))


def _published(config: Mapping[str, Any]) -> Any:  # Any: a CosmosSpec, whose room is opened where it is needed
    """The published Cosmos network with the dimensions of this config.json, beside which no pipeline says how it is asked."""
    from fewstep.networks.families.cosmos.models import MODELS

    def told(spec: Any) -> tuple[Any, ...]:
        has_mask, projects = spec.frame_mask, spec.text_projection_from is not None
        return spec.num_heads, spec.num_layers, list(spec.rope_scale), has_mask, projects

    has_mask = config.get("in_channels", 0) > config.get("out_channels", 0)
    names = ("num_attention_heads", "num_layers", "rope_scale")
    ours = (*(config.get(name) for name in names), has_mask, bool(config.get("use_crossattn_projection")))
    return next((spec for spec in MODELS.values() if not hasattr(spec, "branches") and told(spec) == ours), None)


def _branches(folder: Path, controls: Sequence[str]) -> dict[str, Path]:
    """The control branches beside a transformer, by name: controlnet_NAME, or controlnet, which is what is asked for.

    Where the folder's index names other parts only, the pipeline is whole without them: those come along that are asked for.
    """
    found = {path.name.removeprefix("controlnet_"): path for path in sorted(folder.glob("controlnet_*")) if path.is_dir()}
    if not found and (folder / "controlnet").is_dir():
        found = {controls[0] if len(controls) == 1 else "control": folder / "controlnet"}
    index = folder / "model_index.json"
    if not index.is_file() or any(part.startswith("controlnet") for part in json.loads(index.read_text())):
        return found
    return {name: path for name, path in found.items() if name in controls}


def spec_of(address: str, controls: Sequence[str] = ()) -> Any:  # Any: whatever is registered in group "network"
    """The configuration of the network in a diffusers folder or hub id, by the classes it names."""
    from fewstep.config import choices

    pipeline, config = _told(address)
    kinds = choices("network")
    name = config.get("_class_name")
    if name == "CosmosTransformer3DModel":
        is_first = pipeline in ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
        if is_first or config.get("extra_pos_embed_type") == "learnable":
            return kinds["cosmos"](pretrained=address, family="edm", sigma_data=0.5, use_fps=True, clean_time=None)
        branches = _branches(Path(address), controls)
        if branches:
            told = json.loads((next(iter(branches.values())) / "config.json").read_text())
            return kinds["cosmos_control"](
                pretrained=address,
                latent_channels=config["out_channels"],
                num_layers=config["num_layers"],
                num_control_blocks=told["n_controlnet_blocks"],
                hint_channels=told["in_channels"] - 2,  # beside the masks of given frames and of padding
                controls=tuple(branches),
                branches=tuple(map(str, branches.values())),
            )
        published = None if pipeline else _published(config)
        if published is not None:
            return replace(published, pretrained=address)
        return kinds["cosmos"](pretrained=address, use_fps=pipeline == "Cosmos2VideoToWorldPipeline")
    known = {
        "WanTransformer3DModel": "experts",  # two of them, or the one
        "CogVideoXTransformer3DModel": "cogvideox",
        "FluxTransformer2DModel": "flux",
        "QwenImageTransformer2DModel": "qwen_image",
        "UNet2DConditionModel": "unet",
        "DiTTransformer2DModel": "dit",
    }
    kind: Any = kinds.get(known.get(str(name), ""))
    if kind is not None:
        return kind.of(address) if hasattr(kind, "of") else kind(pretrained=address)
    raise UserError(f"{address}: its denoiser is a {name}, for which there is no adapter; there are {', '.join(kinds)}")


def _told(address: str) -> tuple[str, dict[str, Any]]:
    """The pipeline's class (or ""), and the config.json of its denoiser."""
    folder = Path(address)
    if folder.is_dir():
        index = folder / "model_index.json"
        said = read_json(index, "Copy that folder again").get("_class_name", "") if index.is_file() else ""
        if "StudentPipeline" in said:
            raise UserError(f"{folder}: a student without its student.json, which says how it is sampled. Export it again")
        for part in ("transformer", "unet", ""):
            file = folder / part / "config.json"
            if file.is_file():
                return str(said), read_json(file, "Copy that folder again")
        raise UserError(f"no model at {address}: it has no transformer/, no unet/ and no config.json")
    hub.expect_id(address, "model")  # it is no run either
    told = hub.read_json(address, "model_index.json") or {}
    part = "transformer" if "transformer" in told else "unet"
    return str(told.get("_class_name", "")), hub.read_json(address, f"{part}/config.json") or {}
