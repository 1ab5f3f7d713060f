"""The records in a run folder: config.yaml, env.json, student.json, summary.json."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.batch import Batch
from fewstep.config import dump
from fewstep.data.contract import Dataset, Encoded
from fewstep.data.mix import Mix
from fewstep.diffusion import EDM, Sampler
from fewstep.errors import UserError
from fewstep.files import own_folder, write_json
from fewstep.inference.card import FILE as CARD
from fewstep.inference.card import Envelope, StudentCard
from fewstep.inference.model import check_sampler, teacher_sampler
from fewstep.methods import Finetune, SelfForcing
from fewstep.networks.causal import CausalSpec
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import codec_beside
from fewstep.networks.files.folders import Configurations
from fewstep.networks.files.pipeline import is_diffusers_folder
from fewstep.networks.roles import Full, Networks
from fewstep.networks.weights.addresses import checkpoint_of
from fewstep.parallel import World, peak_memory_gib
from fewstep.training.checkpoint import Progress
from fewstep.training.resume import write_config
from fewstep.training.run import Run
from fewstep.untrusted.text import read_json

MODELS = "models.json"


def write_records(run: Run, folder: Path, sampler: Sampler, first: Batch, noted: Configurations) -> Path | None:
    """Writes the run's settings, its environment, and the card of what it trains. first: a batch of its data.

    noted: the configurations of the models that its networks came from.

    Returns where settings that changed are kept, as `write_config` does.
    """
    own_folder(folder / "previews")
    old_config = write_config(folder, run)
    write_json(folder / "env.json", environment())
    if noted:
        write_json(folder / MODELS, noted)
    network: Any = run.networks.spec_of("student")  # Any: @kind gives it the attribute
    card = StudentCard(
        network={"kind": network.kind, **dump(network)},
        sampler=sampler,
        envelope=envelope(run, first),
        rounding=run.networks.rounding_of("student"),
    )
    card.write(folder)
    return old_config


def noted_in(folder: Path) -> Configurations:
    """The configurations of models that a run noted when it began; {} where it read none."""
    path, advice = folder / MODELS, "Remove it; the folders of its networks are read again"
    noted = read_json(path, advice) if path.is_file() else {}
    if not isinstance(noted, dict) or not all(isinstance(value, dict) for value in noted.values()):
        raise UserError(f"{path}: expected a mapping of mappings. {advice}")
    return noted


def sampler_of(run: Run, network: Network, resumed: Path | None = None) -> Sampler:
    """How the student is sampled: as its method says; after post-training, as the pipeline that its network came from.

    resumed: the folder of a run that goes on, whose card stands for a pipeline that is gone.
    """
    sampler = run.method.sampler(network.path)
    check_sampler(sampler, network)
    base = base_of(run.networks)
    if base is None or not isinstance(run.method, Finetune):
        return sampler
    if resumed is not None and not Path(base).exists() and (resumed / CARD).is_file():
        return StudentCard.read(resumed, "Remove it, and put the pipeline back").sampler
    return run.method.in_own_steps(teacher_sampler(network, base))


def base_of(networks: Networks) -> str | None:
    """The pipeline's folder or hub id that the student's weights come from; None where they come from elsewhere."""
    student = networks.student
    if isinstance(student, Full) and student.init not in ("teacher", "random"):
        weights: str | None = student.init  # in place of those that its network was built with
    elif student.network is not None:
        return student.network.source
    else:
        weights = networks.teacher_init
    if weights is None:
        return None if networks.teacher is None else networks.teacher.source
    return weights if is_diffusers_folder(Path(weights)) else None


def pipeline_of(networks: Networks) -> str | None:
    """The pipeline that the teacher's or the student's weights come from, with its codec."""
    teacher = networks.teacher
    return base_of(networks) if teacher is None or teacher.source is None else teacher.source


def refuse_untrained_span(run: Run, first: Batch) -> None:
    """Raises UserError where a causal student would reach farther back than in any clip that it is trained on."""
    spec = run.networks.spec_of("student")
    if not isinstance(spec, CausalSpec) or first.x0 is None or first.x0.ndim != 5:
        return
    frames = first.x0.shape[2]
    if isinstance(run.method, SelfForcing):
        frames = max(frames, run.method.student.num_frames or 0)
    if spec.span > frames:
        raise UserError(
            f"networks.student: a causal span of {spec.span} latent frames, but clips of {frames} are trained on: positions "
            f"beyond would never be trained. Set span={frames}, of the recipe or of networks.student.causal"
        )


def refuse_parted_branches(run: Run, world: World) -> None:
    """Raises UserError where processes that hold the weights together would run different control branches: all would wait."""
    data, num = run.data, run.trainer.batch_size * world.num_readers
    if run.parallel.mode != "fsdp" or world.num_readers == 1 or not isinstance(data, Mix) or data.block % num == 0:
        return
    controls = {getattr(source.data, "control", None) for source in data.sources}
    student = run.networks.spec_of("student")
    if student is not None and len(student.control_branches) > 1 and len(controls) > 1:
        raise UserError(
            f"data.block={data.block}: {world.num_readers} processes share the weights and must all run the branch of one "
            f"control at a time. Set data.block={num}, or a multiple of it"
        )


def envelope(run: Run, first: Batch) -> Envelope:
    """What the student is trained on, from the first batch, so that it is known when the data are gone."""
    data, x0 = run.data, first.x0
    height, width = getattr(data, "video_size", None) or (None, None)  # no part of the contract: of folders of clips
    guidance = getattr(run.method, "guidance", None)  # of methods with a teacher
    facts = Envelope(
        num_frames=getattr(data, "num_frames", None),
        height=height,
        width=width,
        guidance_in_teacher=None if guidance is None else float(guidance),
    )
    if x0 is None or x0.ndim != 5:
        return facts
    channels, frames, height, width = x0.shape[1:]
    fps = None if first.cond.fps is None else round(float(first.cond.fps[0]), 3)
    if getattr(data, "x0", None) == "pixels" or channels == 3:
        return replace(facts, num_frames=frames, height=height, width=width, fps=fps)
    return replace(facts, latent_shape=(channels, frames, height, width), fps=fps)


def other_shapes(run: Run, first: Batch) -> list[str]:
    """Warnings about roles that begin with the weights of a run whose latents had another shape than these data."""
    if first.x0 is None or first.x0.ndim != 5:
        return []
    shape = tuple(first.x0.shape[1:])
    out: list[str] = []
    inits = {f"networks.{role}.init": getattr(run.networks, role).init for role in ("student", "critic")}
    for key, address in {**inits, "networks.teacher_init": run.networks.teacher_init}.items():
        if address in (None, "teacher", "random") or (before := _shape_of_run(address)) in (None, shape):
            continue
        out.append(
            f"{key}: {address} was trained on latents of {before}, and these data are {shape} (channels, frames, height, "
            "width). If that is not meant: the data of both stages have one shape (fewstep pairs --num-frames --height --width)"
        )
    return out


def other_codec(run: Run, data: Dataset, network: Network) -> list[str]:
    """A warning if the latents are those of another codec than the pipeline's, or have another scale: they train, too."""
    address = getattr(run.preview, "codec", None) or pipeline_of(run.networks)  # of previews without clips there is none
    path = network.path
    scale = float(path.sigma_data) if isinstance(path, EDM) else 1.0
    origin = data.codec if isinstance(data, Encoded) else None
    codec = None if origin is None else codec_beside(address, scale)
    if codec is None or codec.fingerprint == origin:
        return []
    words = f"--codec {address}" + ("" if scale == 1.0 else f" --scale {scale:g}")
    return [
        f"data: the latents were made by another codec than that of {address}, at another scale, or in tiles. If that is not "
        f"meant, make them anew: fewstep prepare latents DIR {words}"
    ]


def _shape_of_run(address: str) -> tuple[int, ...] | None:
    """The shape of the latents that the run at an address was trained on; None for other addresses, or if it is not said."""
    try:
        run = checkpoint_of(address.partition(":")[0]).parent.parent
        return StudentCard.read(run, "").envelope.latent_shape
    except UserError:
        return None


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "fewstep": fewstep.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "command": _typed_command(),
    }


def _typed_command() -> str:
    """The command of this process, as one would type it."""
    program, *words = sys.argv
    name = "fewstep" if Path(program).name in ("fewstep", "__main__.py") else program
    root = os.environ.get("OUTPUT_ROOT")
    return (f"OUTPUT_ROOT={shlex.quote(root)} " if root else "") + shlex.join([name, *words])


def summary(
    run: Run, first: Mapping[str, float], last: Mapping[str, float], progress: Progress, world: World
) -> dict[str, Any]:
    """summary.json: `last` value of each metric, those of the `first` look as NAME_undistilled, cost, device, versions."""
    values: dict[str, Any] = {"recipe": run.job.name, "method": run.method.kind}  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it
    values |= {"step": progress.step, "samples": progress.samples}
    values |= {"student_updates": progress.updates, "rollbacks": progress.rollbacks}
    values |= dict(last) | {f"{name}_undistilled": value for name, value in first.items()}
    values |= {"wall_s": round(progress.wall_s, 2), "peak_memory_gib": round(peak_memory_gib(world.device), 3)}
    versions = {key: value for key, value in environment().items() if key in ("fewstep", "python", "torch")}
    return values | {"device": str(world.device), "num_processes": world.size, "versions": versions}
