"""`fewstep pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import CONTROLS, DEVICE, GUIDANCE, OWN, SAMPLER, SHIFT, SIGMA_MAX, STEPS, imports, load, one_of


@app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="The teacher: a pipeline's folder or hub id, or RUN@ITER:ROLE.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a data set of pairs.")],
    dataset: Annotated[
        Path | None, typer.Argument(help="Data set whose captions, text and controls the teacher receives; metas/ may be all.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts instead of a data set: .txt, one a line; or .jsonl.")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of a clip. Default: as the data set's latents or clips, or the teacher's.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: as for --num-frames.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: as for --num-frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: as for --num-frames, or 24.")] = None,
    num: Annotated[int | None, typer.Option(help="Use the first N samples. Default: all.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    guidance_low: Annotated[float | None, typer.Option(help="w of the low-noise expert of Wan A14B.")] = None,
    path_times: Annotated[
        str | None, typer.Option(help="States to keep: times of the teacher's path, separated by commas, or their number.")
    ] = None,
    student_shift: Annotated[
        float, typer.Option(help="Shift of the student's times, where --path-times is their number.")
    ] = 5.0,
    given_frames: Annotated[int, typer.Option(help="Number of clean latent frames of the clip that the teacher receives.")] = 0,
    control: Annotated[str | None, typer.Option(help=f"Control that the teacher receives: {', '.join(CONTROLS)}.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder or hub id of the autoencoder. Default: the teacher's.")] = None,
    text: Annotated[str, typer.Option(help="Folder of the text embeddings in the data set.")] = "t5_xxl",
    negative: Annotated[
        str | None, typer.Option(help="Negative embedding for guidance: zeros (default), or a file of the data set.")
    ] = None,
    negative_prompt: Annotated[
        str, typer.Option(help="With --prompts: the text that guidance pushes away from (default: the empty text).")
    ] = "",
    text_encoder: Annotated[
        str | None, typer.Option(help="With --prompts: folder or hub id of the text encoder. Default: the teacher's.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Number of tokens that text is padded to. Default: as the teacher's text encoder.")
    ] = None,
    mask_text: Annotated[
        bool, typer.Option("--mask-text", help="Give the network a mask of the padding; Cosmos has none.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    quality: Annotated[str, typer.Option(help="Quality of the mp4: lossless, or a CRF from 0 to 51.")] = "18",
    form: Annotated[
        str, typer.Option(help="Files to write: ours, or fastgen (a folder for each pair).", callback=one_of("ours", "fastgen"))
    ] = "ours",
    verify: Annotated[int, typer.Option(help="Solve this many of the pairs again, and compare.")] = 0,
    shard: Annotated[
        bool, typer.Option("--shard", help="torchrun's processes hold a part of the weights each, instead of all of them.")
    ] = False,
    precision: Annotated[str, typer.Option(help="Precision of the network and the codec: fp32 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Number of clips that go through the network together.")] = 32,
    device: Annotated[str | None, DEVICE] = None,
    config: Annotated[Path | None, OWN] = None,
) -> None:
    """Noise/clip pairs and ODE paths of a teacher, in the layout of Cosmos-Transfer1. torchrun's processes divide them."""
    from fewstep.inference.request import PairsRequest, SamplerOptions, Sizes, path_times_of

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance, guidance_low)
    request = PairsRequest(
        model, dataset, out, sampling, path_times_of(path_times), student_shift, given_frames,
        control=control, codec=codec, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num=num,
        seed=seed, quality=quality, precision=precision, batch_size=batch_size, device=device,
        sizes=Sizes(num_frames, height, width, fps), prompts=prompts, text_encoder=text_encoder,
        negative_prompt=negative_prompt, form=form, verify=verify, shard=shard,
    )  # fmt: skip
    load(config)
    with imports():
        from fewstep.inference.pairs import run
        from fewstep.progress import track

    print(run(request, track))
