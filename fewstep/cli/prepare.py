"""`fewstep prepare ..`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep import TOY
from fewstep.cli.app import app
from fewstep.cli.options import CONTROLS, DEVICE, one_of

prepare = typer.Typer(no_args_is_help=True, help="Make data sets and what they need; a killed command resumes.")
app.add_typer(prepare, name="prepare")


@prepare.command(name="toyworld")
def prepare_toyworld(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    num: Annotated[int, typer.Option(help="Number of clips to render.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the series of clips.")] = 0,
    size: Annotated[int, typer.Option(help="Height and width of a clip in pixels.")] = 32,
    workers: Annotated[int, typer.Option(help="Number of processes that render; 0 renders in this one.")] = 2,
    only: Annotated[str | None, typer.Option(help="Write only these folders, separated by commas: videos,metas,edge.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Text encoder of the captions, a folder or hub id. Default: the toy world's.")
    ] = None,
) -> None:
    """Render the toy world: videos, captions and their embeddings, edge, vis, depth, seg and keypoint files."""
    from fewstep.toyworld.dataset import write
    from fewstep.toyworld.physics import World

    world, names = World(height=size, width=size), only.split(",") if only is not None else None
    made = write(out, num, seed, world, workers, names, encoder or TOY)
    print(f"{out}: {num} clips, {made} of them new")


@prepare.command(name="text")
def prepare_text(
    folder: Annotated[Path, typer.Argument(help="The data set; DIR/metas/*.txt are embedded.", metavar="DIR")],
    encoder: Annotated[str, typer.Option(help="Folder or hub id of a text encoder, or of a pipeline that has one.")],
    prompt: Annotated[str | None, typer.Option(help="Use this caption for every clip.")] = None,
    negative: Annotated[
        str | None, typer.Option(help="Embed this text, too, as DIR/negative.pickle (of another --into: INTO_negative.pickle).")
    ] = None,
    into: Annotated[str, typer.Option(help="Folder of the embeddings in DIR.")] = "t5_xxl",
    form: Annotated[
        str,
        typer.Option(help="pickle (as Cosmos has it), or packed (for many small clips).", callback=one_of("pickle", "packed")),
    ] = "pickle",
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut texts after this many tokens. Default: as the encoder was trained.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Embed captions, once: metas/*.txt to t5_xxl/*.pickle."""
    from fewstep.prepare.commands import text

    print(text(folder, encoder, prompt, negative, into, form, max_tokens, device))


@prepare.command(name="words")
def prepare_words(
    folder: Annotated[Path, typer.Argument(help="The data set; the encoder is trained on DIR/metas/*.txt.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder to write, for prepare text --encoder.")],
    steps: Annotated[int, typer.Option(help="Number of steps of the training.")] = 2000,
    dim: Annotated[int, typer.Option(help="Numbers of an embedding of one word.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the gaps.")] = 0,
) -> None:
    """Train a small text encoder on the captions of a data set: for small worlds, of words that the captions have."""
    from fewstep.prepare.words import write

    print(write(folder, out, num_steps=steps, dim=dim, seed=seed))


@prepare.command(name="codec")
def prepare_codec(
    folder: Annotated[Path, typer.Argument(help="The data set; the codec is trained on DIR/videos/*.mp4.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder to write, for prepare latents --codec.")],
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of a training window. Default: 17, or as many as the shortest clip has.")
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width to train at. Default: that of the first clip.")
    ] = None,
    latent_channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 8,
    steps: Annotated[int, typer.Option(help="Number of steps of the training.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Number of windows in a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
) -> None:
    """Train a small video codec on the clips of a data set: for small worlds that no published codec reconstructs."""
    from fewstep.toyworld.own_codec import write

    sizes = {"num_frames": num_frames, "size": size, "latent_channels": latent_channels}
    print(write(folder, out, **sizes, num_steps=steps, batch_size=batch_size, seed=seed))


@prepare.command(name="controls")
def prepare_controls(
    folder: Annotated[Path, typer.Argument(help="The data set; the controls are made from DIR/videos/*.mp4.", metavar="DIR")],
    type_: Annotated[str, typer.Option("--type", help=f"Kind of control: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))],
    preset: Annotated[
        str, typer.Option(help="Strength of edge and vis: none, very_low, low, medium, high, very_high or random.")
    ] = "medium",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a Depth-Anything model (for depth).")] = None,
    files: Annotated[Path | None, typer.Option("--from", help="Folder with a file for each clip (docs/prepare.md).")] = None,
    metric: Annotated[bool, typer.Option(help="Depth in --from is in metres, not inverse.")] = False,
    quality: Annotated[
        str | None, typer.Option(help="Quality of the mp4: lossless, or a CRF from 0 to 51. Default: by the clip's size.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Make control signals, once: edge, vis and depth videos, seg and keypoint pickles."""
    from fewstep.prepare.commands import controls

    print(controls(folder, type_, preset, model, files, metric, quality, device))


@prepare.command(name="shards")
def prepare_shards(
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR")],
    out: Annotated[str, typer.Option(help="Folder, or URL of any store that fsspec reaches: s3://bucket/set.")],
    parts: Annotated[str | None, typer.Option(help="Write only these folders, separated by commas: videos,metas,edge.")] = None,
    shard_mib: Annotated[int, typer.Option(help="Size in MiB at which a shard ends.")] = 1024,
) -> None:
    """Pack a data set into tar files with an index, for data=shards."""
    from fewstep.prepare.commands import shards

    print(shards(folder, out, parts, shard_mib))


@prepare.command(name="latents")
def prepare_latents(
    folder: Annotated[Path, typer.Argument(help="The data set; DIR/videos/*.mp4 are encoded.", metavar="DIR")],
    codec: Annotated[str, typer.Option(help="Folder or hub id of an autoencoder, or of a pipeline that has one.")],
    control: Annotated[
        str | None, typer.Option(help=f"Encode this control, too: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a window. Default: whole clips.")] = None,
    sequence_interval: Annotated[int, typer.Option(help="Take every k-th frame of a file.")] = 1,
    start_frame_interval: Annotated[
        int | None, typer.Option(help="Frames between the starts of two windows. Default: windows lie side by side.")
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width to resize to. Default: those of the files.")
    ] = None,
    resize: Annotated[
        str, typer.Option(help="How to resize: stretch, crop or pad.", callback=one_of("stretch", "crop", "pad"))
    ] = "stretch",
    into: Annotated[str, typer.Option(help="Folder of the latents in DIR; a second codec needs one of its own.")] = "latents",
    measure: Annotated[int, typer.Option(help="Number of clips whose reconstruction is measured; 0: none.")] = 8,
    scale: Annotated[float, typer.Option(help="Factor of the latents besides their normalisation; 0.5 for Cosmos 1.")] = 1.0,
    tile: Annotated[int | None, typer.Option(help="Pixels along a tile, to save memory; not exact.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the latents: float16 or bfloat16.", callback=one_of("float16", "bfloat16"))
    ] = "float16",
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Encode clips, once: videos/*.mp4 to latents/packs, for data.x0=latents."""
    from fewstep.prepare.commands import latents

    windows = {"sequence_interval": sequence_interval, "start_frame_interval": start_frame_interval}
    sizes = {"num_frames": num_frames, "video_size": size, "resize": resize}
    print(latents(folder, codec, control, dtype, device, {"scale": scale, "tile": tile}, into, measure, **sizes, **windows))
