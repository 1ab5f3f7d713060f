"""Writes the weights of the toy recipes into the shipped stack, in half precision, in the layout of diffusers.

    python -m fewstep.toyworld.release tokenizer toyworld/basic/toy_tokenizer TRAIN --out fewstep/toyworld/stack/vae
    python -m fewstep.toyworld.release transformer toyworld/basic/toy_teacher --out fewstep/toyworld/stack/transformer
    python -m fewstep.toyworld.release control toyworld/basic/toy_edge --out fewstep/toyworld/stack/controlnet_edge

The tokenizer's folder carries the mean and spread of each latent channel, measured on clips of the data set, so that
latents have unit spread.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fewstep.data.folder.dataset import Folder
from fewstep.errors import UserError
from fewstep.files import whole_folder, write_json
from fewstep.networks.weights.addresses import load_into, read
from fewstep.toyworld.tokenizer import TokenizerSpec

app = typer.Typer(help=__doc__)
SCHEDULER = {  # how the teacher is sampled: on an even grid of its flow
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 1.0,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
TRAINED_ON = {"num_frames": 17, "height": 32, "width": 32}
NUM_MEASURED = 1024  # clips: the mean of a channel is known to 1 / sqrt(80 x 1024) of its spread


@app.command()
def tokenizer(
    run: Annotated[str, typer.Argument(help="The finished run of the tokenizer.")],
    data: Annotated[Path, typer.Argument(help="Clips on which the latents are measured.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """The video tokenizer, with the statistics of its latents."""
    from fewstep.toyworld.train_tokenizer import LATENT_CHANNELS

    torch.set_num_threads(1)
    spec = TokenizerSpec(latent_channels=LATENT_CHANNELS)
    vae, std = with_statistics(spec, run, Folder(str(data), text=None), NUM_MEASURED)
    _save(vae, out)
    print(f"{out}: spread of the channels {std.min():.2f} .. {std.max():.2f}")


def with_statistics(spec: TokenizerSpec, run: str, data: Folder, num: int) -> tuple[Any, torch.Tensor]:
    """The tokenizer of a run, with mean and spread of its latents measured on `num` clips; and the spread of each channel."""
    tokenizer = spec.build()
    load_into(tokenizer.module, read(f"{run}:tokenizer.ema"), run)
    vae: Any = tokenizer.module.vae
    vae.eval().half().float()  # measured as it will be used: with the weights that are written
    clips = data.open()
    index = torch.arange(min(num, len(clips)))
    latents = torch.cat([_latents(vae, clips.batch(some).x0) for some in index.split(16)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae, std


@app.command()
def decoder(
    run: Annotated[str, typer.Argument(help="The finished run of the decoder.")],
    out: Annotated[Path, typer.Option(help="The tokenizer's folder, whose decoder is replaced.")],
) -> None:
    """A decoder that was trained alone. Encoder and statistics, and so every latent, stay the same."""
    tokenizer = TokenizerSpec(pretrained=str(out)).build()
    before = {name: value.clone() for name, value in tokenizer.module.state_dict().items()}
    load_into(tokenizer.module, read(f"{run}:tokenizer.ema"), run)
    moved = [name for name, value in tokenizer.module.state_dict().items() if not torch.equal(value, before[name])]
    if any(name.startswith(("vae.encoder.", "vae.quant_conv.")) for name in moved):
        raise UserError(f"{run}: its encoder is not that of {out}; what was trained on its latents would be void")
    _save(tokenizer.module.vae, out)
    print(f"{out}: {len(moved)} tensors of the decoder replaced")


@torch.no_grad()
def _latents(vae: Any, pixels: torch.Tensor | None) -> torch.Tensor:
    return vae.encode(pixels).latent_dist.mode()


@app.command()
def transformer(
    run: Annotated[str, typer.Argument(help="The finished run of toy_teacher, or another of its shape.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """The teacher: the moving average of the run's student."""
    from fewstep.toyworld.recipes import TEACHER

    network = TEACHER.build()
    load_into(network.module, read(run), run)
    _save(network.module, out)
    print(f"{out}: {sum(p.numel() for p in network.module.parameters()):,} weights")


@app.command()
def control(
    run: Annotated[str, typer.Argument(help="The finished run of toy_edge, toy_vis or toy_depth.")],
    out: Annotated[Path, typer.Option(help="Folder to write, controlnet_CONTROL beside transformer/.")],
) -> None:
    """A control branch of the teacher. The pipeline's index does not name it: a caller has to name it."""
    from fewstep.toyworld.recipes import CONTROLLED

    name = out.name.removeprefix("controlnet_")
    network = replace(CONTROLLED, controls=(name,), pretrained=str(out.parent)).build()
    load_into(network.module, read(run), run)
    branches: Any = network.module.branches
    _save(branches[name], out)
    print(f"{out}: {sum(p.numel() for p in branches.parameters()):,} weights, of them those it shares with its teacher")


def _save(module: Any, out: Path) -> None:
    """Writes a part of the shipped pipeline."""
    save(module, out)
    _index(out.parent)


def save(module: Any, out: Path) -> None:
    """Writes a model of diffusers in half precision, whole or not at all; one that is there is replaced."""
    with whole_folder(out, replaces=True) as partial:
        module.half().save_pretrained(str(partial))
        config = json.loads((partial / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it lay on this machine is nobody's business
        write_json(partial / "config.json", config, indent=2)
        for path in partial.iterdir():
            path.chmod(0o644)


def _index(pipeline: Path) -> None:
    """Writes model_index.json for the parts in the folder."""
    parts = {name: pipeline / name / "config.json" for name in ("transformer", "vae")}
    configs = {name: json.loads(path.read_text()) for name, path in parts.items() if path.is_file()}
    version = max(config["_diffusers_version"] for config in configs.values())
    index = {"_class_name": "DiffusionPipeline", "_diffusers_version": version, "_trained_on": TRAINED_ON}
    index |= {name: ["diffusers", config["_class_name"]] for name, config in configs.items()}
    index["scheduler"] = ["diffusers", SCHEDULER["_class_name"]]
    scheduler = {**SCHEDULER, "_diffusers_version": version}
    write_json(pipeline / "scheduler" / "scheduler_config.json", scheduler, indent=2)
    write_json(pipeline / "model_index.json", index, indent=2)


if __name__ == "__main__":
    app()
