"""`fewstep pairs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import (
    BATCH_SIZE,
    CONTEXT,
    CONTROLS,
    DEVICE,
    GIVEN_FRAMES,
    GUIDANCE,
    GUIDANCE_LOW,
    MASK_TEXT,
    OWN,
    PRECISION,
    QUALITY,
    SAMPLER,
    SHARD,
    SHIFT,
    SIGMA_MAX,
    STEPS,
    TEXT,
    UsageError,
    folder_to_read,
    folder_to_write,
    imports,
    load,
    next_step,
    one_of,
    option,
)


@app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="The teacher: a pipeline's folder or hub id, or RUN@ITER:ROLE.")],
    out: Annotated[Path, option("--out", "Folder to write: a data set of pairs.", callback=folder_to_write)],
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="Data set whose captions, text and controls the teacher receives; metas/ may be all.", callback=folder_to_read
        ),
    ] = None,
    prompts: Annotated[
        Path | None, option("--prompts", "File of prompts instead of a data set: .txt, one a line; or .jsonl.")
    ] = None,
    num_frames: Annotated[
        int | None, option("--num-frames", "Frames of a clip. Default: as the data set's latents or clips, or the teacher's.")
    ] = None,
    height: Annotated[int | None, option("--height", "Pixels. Default: as for --num-frames.")] = None,
    width: Annotated[int | None, option("--width", "Pixels. Default: as for --num-frames.")] = None,
    fps: Annotated[float | None, option("--fps", "Frames per second. Default: as for --num-frames, or 24.")] = None,
    num: Annotated[int | None, option("--num", "Use the first N samples. Default: all.")] = None,
    num_steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    guidance_low: Annotated[float | None, GUIDANCE_LOW] = None,
    path_times: Annotated[
        str | None, option("--path-times", "States to keep: times of the teacher's path, separated by commas, or their number.")
    ] = None,
    student_shift: Annotated[
        float, option("--student-shift", "Shift of the student's times, where --path-times is their number.")
    ] = 5.0,
    given_frames: Annotated[int, GIVEN_FRAMES] = 0,
    control: Annotated[str | None, option("--control", f"Control that the teacher receives: {', '.join(CONTROLS)}.")] = None,
    codec: Annotated[str | None, option("--codec", "Folder or hub id of the autoencoder. Default: the teacher's.")] = None,
    text: Annotated[str, TEXT] = "t5_xxl",
    negative: Annotated[
        str | None, option("--negative", "Negative embedding for guidance: zeros (default), or a file of the data set.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        option(
            "--negative-prompt",
            "With --prompts: the text that guidance pushes away from (default: the empty text; of SDXL zeros).",
        ),
    ] = None,
    text_encoder: Annotated[
        str | None, option("--text-encoder", "With --prompts: folder or hub id of the text encoder. Default: the teacher's.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        option("--max-tokens", "Number of tokens that text is padded to. Default: as the teacher's text encoder."),
    ] = None,
    mask_text: Annotated[bool, MASK_TEXT] = False,
    seed: Annotated[int, option("--seed", "Seed of the noise.")] = 0,
    quality: Annotated[str, QUALITY] = "18",
    form: Annotated[
        str,
        option("--format", "Files to write: ours, or fastgen (a folder for each pair).", callback=one_of("ours", "fastgen")),
    ] = "ours",
    verify: Annotated[int, option("--verify", "Solve this many of the pairs again, and compare.")] = 0,
    shard: Annotated[bool, SHARD] = False,
    context: Annotated[int, CONTEXT] = 1,
    precision: Annotated[str, PRECISION] = "fp32",
    batch_size: Annotated[int, BATCH_SIZE] = 32,
    device: Annotated[str | None, DEVICE] = None,
    config: Annotated[Path | None, OWN] = None,
) -> None:
    """Noise/clip pairs and ODE paths of a teacher, in the layout of Cosmos-Transfer1. torchrun's processes divide them."""
    from fewstep.inference.request import PairsRequest, SamplerOptions, Sizes, path_times_of

    sampling = SamplerOptions(num_steps, sampler, shift, sigma_max, guidance, guidance_low)
    request = PairsRequest(
        model, dataset, out, sampling, path_times_of(path_times), student_shift, given_frames,
        control=control, codec=codec, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num=num,
        seed=seed, quality=quality, precision=precision, batch_size=batch_size, device=device,
        sizes=Sizes(num_frames, height, width, fps), prompts=prompts, text_encoder=text_encoder,
        negative_prompt=negative_prompt, form=form, verify=verify, shard=shard, context=context,
    )  # fmt: skip
    if control is not None and control not in CONTROLS and config is None:
        raise UsageError(f"--control {control}: is none of {', '.join(CONTROLS)}; --config FILE.py may add one of your own.")
    load(config)
    with imports():
        from fewstep.inference.pairs import run
        from fewstep.progress import track

    print(run(request, track))
    next_step("fewstep", "train", "experiment=kd", f"teacher={model}", f"data.dataset_dir={out}")
