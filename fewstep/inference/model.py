"""A model to be used: its network, how it is meant to be sampled, what it was trained on, and what belongs to it.

open_model("runs/kd@latest:student.ema")    a run's student; RUN:teacher is the teacher it had
open_model("student")                       a folder that `fewstep export` wrote
open_model("wan2.1-t2v-1.3b")               a pipeline of diffusers, folder or hub id: a teacher
open_model("base_model.pt+edge_control.pt") published Cosmos weights, in any form that networks/weights reads: a teacher

outline_of(ADDRESS) reads the small files alone: what is asked of a model is checked against it before any weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import parse
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.diffusion import EDM, Sampler, StudentSampler, TeacherSampler
from fewstep.diffusion import Path as Path_
from fewstep.errors import UserError
from fewstep.inference.card import FILE as CARD
from fewstep.inference.card import Envelope, StudentCard
from fewstep.inference.request import SamplerOptions
from fewstep.networks.causal import Causal
from fewstep.networks.contract import NOT_SHARED, Network, NetworkSpec
from fewstep.networks.encoders.codecs import Autoencoder, open_codec
from fewstep.networks.files import hub
from fewstep.networks.files.folders import on_meta
from fewstep.networks.files.pipeline import PipelineFolder, is_diffusers_folder
from fewstep.networks.grid import round_linear
from fewstep.networks.lora import Lora, merged
from fewstep.networks.roles import Networks, build
from fewstep.networks.weights.addresses import Piece, checkpoint_of, collect, load_into, pieces_of, read, tell
from fewstep.networks.weights.folders import spec_of
from fewstep.parallel import COMPUTE, World, place
from fewstep.untrusted.text import fault_of


@dataclass(frozen=True)
class Model:
    network: Network
    spec: NetworkSpec | None  # what built the network
    sampler: Sampler
    envelope: Envelope = Envelope()
    folder: Path | None = None  # where its codec and text encoder are, if it has them
    is_of_files: bool = False  # weights in files that say nothing of how the model is sampled

    @property
    def is_teacher(self) -> bool:
        return isinstance(self.sampler, TeacherSampler)


@dataclass(frozen=True)
class Outline:
    """A model whose weights have not been read."""

    spec: NetworkSpec
    load: Callable[[], Network]  # reads the weights
    sampler: Sampler | None = None  # None: as the pipeline says, or as published for the network
    pipeline: str | None = None  # address of a pipeline of diffusers
    envelope: Envelope = Envelope()
    folder: Path | None = None
    is_of_files: bool = False

    def open(self) -> Model:
        """The model with its weights, in eval mode and frozen."""
        return self._model(self.load())

    def skeleton(self) -> Model:
        """The model on torch's meta device: its traits, path and sampler are those of the model, but it has no weights."""
        with on_meta():
            return self._model(self.spec.build())

    def _model(self, network: Network) -> Model:
        network.module.eval().requires_grad_(False)
        sampler = self.sampler or teacher_sampler(network, self.pipeline)
        return Model(network, self.spec, sampler, self.envelope, self.folder, self.is_of_files)


def open_model(address: str | Path, *, controls: Sequence[str] = (), network: str | None = None) -> Model:
    """The model at `address`, in eval mode and frozen.

    controls: those that are used; the first is that of a branch whose files do not name it. network: which published one files
    of weights hold; None: as their shapes say.
    """
    return outline_of(address, controls=controls, network=network).open()


def outline_of(address: str | Path, *, controls: Sequence[str] = (), network: str | None = None) -> Outline:
    """What the small files at `address` say of a model. The arguments are those of `open_model`."""
    text = str(address)
    folder = Path(text)
    if is_export(folder):
        return _exported(folder)
    if is_run(text):
        return _of_run(text)
    pieces = None if is_diffusers_folder(folder) else pieces_of(text)
    if pieces is None and network is not None:
        raise UserError(f"--network {network}: {text} says itself what it is; the name is for files of weights")
    return _teacher(text, controls) if pieces is None else _of_files(pieces, controls, network)


def folder_of(address: str) -> Path | None:
    """Where codec and text encoder of the model at `address` are: its folder or hub id; None for runs and files of weights."""
    folder = Path(address)
    if is_export(folder):
        return folder
    if is_run(address) or not (is_diffusers_folder(folder) or pieces_of(address) is None):
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
    return _of_run(address).open()


def _of_run(address: str) -> Outline:
    place, _, role = address.partition(":")
    folder = checkpoint_of(place)
    run = folder.parent.parent
    networks = networks_of(run)
    if role == "teacher":
        if networks.teacher is None:
            raise UserError(f"{address}: this run has no teacher")
        return Outline(networks.teacher, lambda: build(networks, ("teacher",), 0)["teacher"], pipeline=networks.teacher.source)
    card = StudentCard.read(run, "It is written anew when the run goes on")
    spec = networks.spec_of("student")
    if spec is None:
        raise UserError(f"{address}: the configuration of this run names no network for its student")
    return Outline(spec, lambda: student_network(networks, read(address), address), card.sampler, envelope=card.envelope)


def student_network(nets: Networks, tensors: Mapping[str, Tensor], source: str) -> Network:
    """A plain network with the student's weights, rounded as it was trained; adapters are merged into the teacher's."""
    role = nets.student
    if not isinstance(role, Lora):
        spec: Any = nets.spec_of("student")
        with fault_of(source):  # sizes for which there is no memory
            network = spec.build()
        load_into(network.module, tensors, source)
        grid = nets.rounding_of("student")
        if grid is not None:
            round_linear(network.module, grid)
        return network
    network = build(nets, ("teacher",), 0)["teacher"]
    whole = merged(network.module.state_dict(), tensors, role.scale_of)
    load_into(network.module, whole, source)
    return network if role.causal is None else Causal.of(network, role.causal)


def is_export(folder: Path) -> bool:
    """Whether `fewstep export` wrote the folder."""
    return (folder / "student.json").is_file() and not (folder / "checkpoints").is_dir()


def is_run(address: str) -> bool:
    """Whether the address is that of a run with a checkpoint."""
    try:
        checkpoint_of(address.partition(":")[0])
    except ValueError:
        return False
    return True


# ---- folders ---------------------------------------------------------------------------------------------------------


def _exported(folder: Path) -> Outline:
    card = StudentCard.read(folder, "Export the student again")
    spec = card.spec()
    files = ["student.safetensors", *(["model_ema_fp32.pt"] if card.role.endswith(".ema") else []), "model.pt"]
    weights = next((folder / name for name in files if (folder / name).is_file()), None)
    if weights is None:
        spec = spec.in_folder(str(folder))

    def load() -> Network:
        with fault_of(folder / CARD, "Export the student again"):
            network = spec.build()
        if weights is not None:
            load_into(network.module, read(str(weights), network.module), str(weights))
        return network

    return Outline(spec, load, card.sampler, envelope=card.envelope, folder=folder)


def _teacher(address: str, controls: Sequence[str] = ()) -> Outline:
    """The denoiser of a pipeline of diffusers."""
    spec = spec_of(address, controls)
    return Outline(spec, spec.build, pipeline=address, folder=Path(address))


def teacher_sampler(network: Network, address: str | None) -> TeacherSampler:
    """How a teacher is sampled: as the pipeline at `address` says, else as published for the network's path."""
    return replace(published_sampler(network.path, address), boundary=network.traits.boundary)


def published_sampler(path: Path_, address: str | None) -> TeacherSampler:
    """How a teacher on `path` is sampled: as the pipeline at `address` says, else as published for the path."""
    sampler = TeacherSampler.for_path(path)
    scheduler = {} if address is None else PipelineFolder(address).scheduler
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


def check_sampler(sampler: Sampler, network: Network) -> None:
    """Raises UserError if the network cannot be sampled so: a flow map's jumps need a network that reads their end."""
    if isinstance(sampler, StudentSampler) and sampler.renoise == "map" and not network.traits.reads_end:
        raise UserError(
            "a flow map needs a network that reads where a jump ends, and this one does not. Choose "
            "networks.student.network=anyflow for Wan, networks.student.network.end_gate=0.25 for Cosmos, or a network of your "
            "own whose traits say reads_end"
        )


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


def student_of(sampler: StudentSampler, options: SamplerOptions, calls: int | None) -> StudentSampler:
    """The sampler with --num-steps N, which a flow map has, or with --calls N, which measures any student at N calls."""
    if others := [name for name in options.names() if name != "--num-steps"]:
        raise UserError(
            f"{', '.join(others)}: this is a student, whose sampler is saved with it. Leave it out: it is for a teacher"
        )
    if calls is not None and options.num_steps is not None:
        raise UserError("--calls and --num-steps: give one of them")
    if calls is not None:
        return sampler.with_calls(calls)
    return sampler if options.num_steps is None else sampler.with_steps(options.num_steps)


def place_network(
    model: Model, device: torch.device, precision: str, world: World | None = None, *, shard: bool = False
) -> None:
    """Moves the network to its device, whole or as this process's shard, in the precision in which it computes; where
    processes of `world` share clips, it computes this one's share of their tokens."""
    network, compute = model.network, COMPUTE[precision]
    mode = "fsdp" if shard else "ddp"
    place(network.module, network.blocks, world or World(0, 1, device, None), mode=mode, compute=compute, trained=False)
    if world is not None and world.context is not None:
        network.share_tokens(world.context)


def refuse_context(spec: NetworkSpec | None, world: World | None, name: str) -> None:
    """Refuses a network without a plan for sharing tokens, before its weights are read."""
    if world is not None and world.context is not None and spec is not None and not spec.shares_tokens:
        raise UserError(f"--context {world.context.size}: {name} {NOT_SHARED}")


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
    address = codec_address(model, name, address)
    return open_codec(address, scale=scale, tile=tile, dtype=COMPUTE[precision], device=device)


def text_encoder_address(address: str | None, folder: Path | None, name: str, options: str) -> str:
    """`address`, or that of the text encoder in the folder of the model that the user called `name`. options: what to give."""
    if address is not None:
        return address
    if folder is None or (folder.is_dir() and not (folder / "text_encoder").is_dir()):
        raise UserError(f"{name} has no text encoder beside it: give {options}")
    return str(folder)


def codec_address(model: Model, name: str, address: str | None) -> str:
    if address is not None:
        return address
    if model.folder is None or not ((model.folder / "vae").is_dir() or not model.folder.exists()):
        raise UserError(f"{name}: has no codec beside it. Add --codec, the folder of an autoencoder or of its pipeline")
    return str(model.folder)


def _of_files(pieces: Sequence[Piece], controls: Sequence[str], name: str | None) -> Outline:
    """The published Cosmos network whose weights these are; it has no codec and no text encoder beside it."""
    from fewstep.networks.families.cosmos.models import FIRST_CLIPS, SECOND_CLIPS
    from fewstep.networks.weights.convert import published_spec

    if controls and not any(control for control, _, _ in pieces):
        pieces = [*pieces[:-1], (controls[0], *pieces[-1][1:])]
    weights = collect(pieces)
    published, spec = published_spec(weights, name)
    envelope = Envelope()
    if published is not None and "image" not in published:  # of sizes never published nobody knows
        clips = FIRST_CLIPS if spec.family == "edm" else SECOND_CLIPS
        envelope = Envelope(num_frames=clips[0], height=clips[1], width=clips[2], fps=clips[3])

    def load() -> Network:
        tell(weights)
        network = spec.build()
        load_into(network.module, {n: one.read() for n, one in weights.tensors.items()}, " and ".join(p[1] for p in pieces))
        return network

    return Outline(spec, load, envelope=envelope, is_of_files=True)
