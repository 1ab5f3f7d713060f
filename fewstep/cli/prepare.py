"""`fewstep prepare ..`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep import TOY
from fewstep.cli.app import Verbs, app
from fewstep.cli.options import (
    CONTROLS,
    DEVICE,
    PRESETS,
    UsageError,
    crf,
    folder_to_read,
    folder_to_write,
    next_step,
    one_of,
    option,
    positive,
    size_of,
    store_to_write,
)

prepare = Verbs(no_args_is_help=True, help="Make data sets and what they need; a killed command resumes.")
app.add_typer(prepare, name="prepare")


@prepare.command(name="toyworld")
def prepare_toyworld(
    out: Annotated[Path, option("--out", "Folder to write.", callback=folder_to_write)],
    num: Annotated[int, option("--num", "Number of clips to render.")] = 512,
    seed: Annotated[int, option("--seed", "Seed of the series of clips.")] = 0,
    height: Annotated[int, option("--height", "Height of a clip in pixels.")] = 32,
    width: Annotated[int, option("--width", "Width of a clip in pixels.")] = 32,
    gravity: Annotated[float, option("--gravity", "Gravity of every clip, in units of the world's own.")] = 1.0,
    palette: Annotated[
        str,
        option(
            "--palette", "Colours of the objects: bright, or deep (the same hues, darker).", callback=one_of("bright", "deep")
        ),
    ] = "bright",
    workers: Annotated[int, option("--workers", "Number of processes that render; 0 renders in this one.")] = 2,
    only: Annotated[str | None, option("--only", "Write only these folders, separated by commas: videos,metas,edge.")] = None,
    text_encoder: Annotated[
        str | None, option("--text-encoder", "Text encoder of the captions, a folder or hub id. Default: the toy world's.")
    ] = None,
) -> None:
    """Render the toy world: videos, captions and their embeddings, edge, vis, depth, seg and keypoint files."""
    if not 0 < gravity < float("inf"):
        raise UsageError(f"--gravity {gravity:g}: give a number above 0, in units of the world's own gravity.")
    from fewstep.toyworld.dataset import write
    from fewstep.toyworld.physics import World

    world = World(height=height, width=width, gravity_scale=(gravity, gravity), palette=palette)  # pyright: ignore[reportArgumentType]  # one of the two, which the option checks
    names = only.split(",") if only is not None else None
    num_new = write(out, num, seed, world, workers, names, text_encoder or TOY)
    print(f"{out}: {num} clips, {num_new} of them new")
    next_step("fewstep", "check", "data", out)


@prepare.command(name="text")
def prepare_text(
    folder: Annotated[
        Path, typer.Argument(help="The data set; DIR/metas/*.txt are embedded.", metavar="DIR", callback=folder_to_read)
    ],
    text_encoder: Annotated[
        str, option("--text-encoder", "Folder or hub id of a text encoder, or of a pipeline that has one.")
    ],
    prompt: Annotated[str | None, option("--prompt", "Use this caption for every clip.")] = None,
    negative_prompt: Annotated[
        str | None,
        option("--negative-prompt", "Embed this text, too, as DIR/negative.pickle (of another --into: INTO_negative.pickle)."),
    ] = None,
    negative: Annotated[str | None, option("--negative", "As --negative-prompt.", hidden=True)] = None,
    into: Annotated[str, option("--into", "Folder of the embeddings in DIR.")] = "t5_xxl",
    form: Annotated[
        str,
        option("--format", "pickle (as Cosmos has it), or packed (for many small clips).", callback=one_of("pickle", "packed")),
    ] = "pickle",
    max_tokens: Annotated[
        int | None, option("--max-tokens", "Cut texts after this many tokens. Default: as the encoder was trained.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Embed captions, once: metas/*.txt to t5_xxl/*.pickle."""
    from fewstep.prepare.commands import text

    wording = negative if negative_prompt is None else negative_prompt
    print(text(folder, text_encoder, prompt, wording, into, form, max_tokens, device))
    next_step("fewstep", "prepare", "latents", folder, "--codec", "PIPELINE")


@prepare.command(name="words")
def prepare_words(
    folder: Annotated[
        Path,
        typer.Argument(help="The data set; the encoder is trained on DIR/metas/*.txt.", metavar="DIR", callback=folder_to_read),
    ],
    out: Annotated[Path, option("--out", "Folder to write, for prepare text --text-encoder.", callback=folder_to_write)],
    iters: Annotated[int, option("--iters", "Number of iterations of the training.")] = 2000,
    dim: Annotated[int, option("--dim", "Numbers of an embedding of one word.")] = 64,
    seed: Annotated[int, option("--seed", "Seed of the weights and of the gaps.")] = 0,
) -> None:
    """Train a small text encoder on the captions of a data set: for small worlds, of words that the captions have."""
    from fewstep.prepare.words import write

    print(write(folder, out, num_steps=iters, dim=dim, seed=seed))
    next_step("fewstep", "prepare", "text", folder, "--text-encoder", out)


@prepare.command(name="codec")
def prepare_codec(
    folder: Annotated[
        Path,
        typer.Argument(help="The data set; the codec is trained on DIR/videos/*.mp4.", metavar="DIR", callback=folder_to_read),
    ],
    out: Annotated[Path, option("--out", "Folder to write, for prepare latents --codec.", callback=folder_to_write)],
    num_frames: Annotated[
        int | None, option("--num-frames", "Frames of a training window. Default: 17, or as many as the shortest clip has.")
    ] = None,
    height: Annotated[int | None, option("--height", "Height to train at. Default: that of the first clip.")] = None,
    width: Annotated[int | None, option("--width", "Width to train at. Default: that of the first clip.")] = None,
    latent_channels: Annotated[int, option("--latent-channels", "Channels of the latents.")] = 8,
    iters: Annotated[int, option("--iters", "Number of iterations of the training.")] = 3000,
    batch_size: Annotated[int, option("--batch-size", "Number of windows in an iteration.")] = 8,
    seed: Annotated[int, option("--seed", "Seed of the training.")] = 0,
) -> None:
    """Train a small video codec on the clips of a data set: for small worlds that no published codec reconstructs."""
    size = size_of(height, width)
    from fewstep.toyworld.own_codec import write

    sizes = {"num_frames": num_frames, "size": size, "latent_channels": latent_channels}
    print(write(folder, out, **sizes, num_steps=iters, batch_size=batch_size, seed=seed))
    next_step("fewstep", "prepare", "latents", folder, "--codec", out)


@prepare.command(name="controls")
def prepare_controls(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The data set; the controls are made from DIR/videos/*.mp4.", metavar="DIR", callback=folder_to_read
        ),
    ],
    type_: Annotated[str, option("--type", f"Kind of control: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))],
    preset: Annotated[
        str, option("--preset", f"Strength of edge and vis: {', '.join(PRESETS)}.", callback=one_of(*PRESETS))
    ] = "medium",
    model: Annotated[str | None, option("--model", "Folder or hub id of a Depth-Anything model (for depth).")] = None,
    files: Annotated[
        Path | None, option("--from", "Folder with a file for each clip (docs/prepare.md).", callback=folder_to_read)
    ] = None,
    metric: Annotated[bool, option("--metric", "Depth in --from is in metres, not inverse.")] = False,
    quality: Annotated[
        str | None,
        option("--quality", "Quality of the mp4: lossless, or a CRF from 0 to 51. Default: by the clip's size.", callback=crf),
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Make control signals, once: edge, vis and depth videos, seg and keypoint pickles."""
    from fewstep.prepare.commands import controls

    print(controls(folder, type_, preset, model, files, metric, quality, device))
    next_step("fewstep", "prepare", "latents", folder, "--codec", "PIPELINE", "--control", type_)


@prepare.command(name="shards")
def prepare_shards(
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR", callback=folder_to_read)],
    out: Annotated[
        str, option("--out", "Folder, or URL of any store that fsspec reaches: s3://bucket/set.", callback=store_to_write)
    ],
    parts: Annotated[str | None, option("--parts", "Write only these folders, separated by commas: videos,metas,edge.")] = None,
    shard_mib: Annotated[int, option("--shard-mib", "Size in MiB at which a shard ends.")] = 1024,
) -> None:
    """Pack a data set into tar files with an index, for data=shards."""
    from fewstep.prepare.commands import shards

    print(shards(folder, out, parts, shard_mib))


@prepare.command(name="latents")
def prepare_latents(
    folder: Annotated[
        Path, typer.Argument(help="The data set; DIR/videos/*.mp4 are encoded.", metavar="DIR", callback=folder_to_read)
    ],
    codec: Annotated[str, option("--codec", "Folder or hub id of an autoencoder, or of a pipeline that has one.")],
    control: Annotated[
        str | None, option("--control", f"Encode this control, too: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))
    ] = None,
    num_frames: Annotated[int | None, option("--num-frames", "Frames of a window. Default: whole clips.")] = None,
    sequence_interval: Annotated[int, option("--sequence-interval", "Take every k-th frame of a file.")] = 1,
    start_frame_interval: Annotated[
        int | None,
        option("--start-frame-interval", "Frames between the starts of two windows. Default: windows lie side by side."),
    ] = None,
    height: Annotated[int | None, option("--height", "Height to resize to. Default: as the files have it.")] = None,
    width: Annotated[int | None, option("--width", "Width to resize to. Default: as the files have it.")] = None,
    resize: Annotated[
        str, option("--resize", "How to resize: stretch, crop or pad.", callback=one_of("stretch", "crop", "pad"))
    ] = "stretch",
    into: Annotated[str, option("--into", "Folder of the latents in DIR; a second codec needs one of its own.")] = "latents",
    measure: Annotated[int, option("--measure", "Number of clips whose reconstruction is measured; 0: none.")] = 8,
    scale: Annotated[
        float, option("--scale", "Factor of the latents besides their normalisation; 0.5 for Cosmos 1.", callback=positive)
    ] = 1.0,
    tile: Annotated[int | None, option("--tile", "Pixels along a tile, to save memory; not exact.")] = None,
    dtype: Annotated[
        str, option("--dtype", "Type of the latents: float16 or bfloat16.", callback=one_of("float16", "bfloat16"))
    ] = "float16",
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Encode clips, once: videos/*.mp4 to latents/packs, for data.x0=latents."""
    size = size_of(height, width)
    from fewstep.prepare.commands import latents

    windows = {"sequence_interval": sequence_interval, "start_frame_interval": start_frame_interval}
    sizes = {"num_frames": num_frames, "video_size": size, "resize": resize}
    print(latents(folder, codec, control, dtype, device, {"scale": scale, "tile": tile}, into, measure, **sizes, **windows))
    next_step("fewstep", "pairs", "TEACHER", folder, "--out", "PAIRS")
