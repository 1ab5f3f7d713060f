"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import (
    BATCH_SIZE,
    CONTROLS,
    DEVICE,
    GIVEN_FRAMES,
    GUIDANCE,
    MASK_TEXT,
    MAX_TOKENS,
    OWN,
    PRECISION,
    SAMPLER,
    SHIFT,
    SIGMA_MAX,
    STEPS,
    TEXT,
    UsageError,
    clips_to_read,
    folder_to_read,
    imports,
    load,
    next_step,
    option,
    scores_to_write,
    size_of,
)


@app.command(context_settings={"allow_extra_args": True})
def evaluate(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="A model (run, export, pipeline), codec:FOLDER, or a folder of clips."),
    ] = None,
    out: Annotated[
        Path | None,
        option("--out", "JSON file to write; the first clips go into a folder of that name.", callback=scores_to_write),
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts", "Data set with captions, text, controls and real clips of the same scenes.", callback=folder_to_read
        ),
    ] = None,
    real: Annotated[
        str | None, option("--real", "Real clips of other scenes: a data set, or a folder of mp4.", callback=clips_to_read)
    ] = None,
    truth: Annotated[
        Path | None,
        option("--truth", "Clips that each one should equal, by file name, for PSNR and SSIM.", callback=clips_to_read),
    ] = None,
    scorer: Annotated[
        str | None,
        option("--scorer", "Name of the scorer (fewstep ls scorers). Default: clips; toyworld for clips of the toy world."),
    ] = None,
    features: Annotated[
        str | None,
        option(
            "--features", "Feature networks of the scorer clips, NAME or NAME=FILE, separated by commas (fewstep ls features)."
        ),
    ] = None,
    config: Annotated[Path | None, OWN] = None,
    control: Annotated[
        str | None,
        option(
            "--control", f"Controls to score fidelity to: {', '.join(CONTROLS)}; several by commas. A model receives its own."
        ),
    ] = None,
    num: Annotated[int | None, option("--num", "Number of clips in a set. Default: 512, or as many as there are.")] = None,
    keep: Annotated[int, option("--keep", "Number of clips to keep beside the file, for the report.")] = 8,
    sets: Annotated[int, option("--sets", "Number of sets, each from noise of its own.")] = 3,
    seeds: Annotated[
        int | None,
        option("--seeds", "Keep the first two clips of a model from this many noises, for the report. Default: as --sets."),
    ] = None,
    num_frames: Annotated[
        int | None,
        option("--num-frames", "Number of frames of every clip. Default: as the model was trained, or all."),
    ] = None,
    height: Annotated[int | None, option("--height", "Pixels of generated clips. Default: as the model was trained.")] = None,
    width: Annotated[int | None, option("--width", "Pixels of generated clips. Default: as the model was trained.")] = None,
    calls: Annotated[
        int | None,
        option("--calls", "Score a teacher at its best with this many network calls, a student at times between its own."),
    ] = None,
    num_steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    given_frames: Annotated[int, GIVEN_FRAMES] = 0,
    codec: Annotated[str | None, option("--codec", "Folder of the autoencoder, for a model that has none.")] = None,
    text: Annotated[str, TEXT] = "t5_xxl",
    negative: Annotated[
        str, option("--negative", "Negative embedding for guidance: zeros, or a file of the data set.")
    ] = "zeros",
    max_tokens: Annotated[int, MAX_TOKENS] = 512,
    mask_text: Annotated[bool, MASK_TEXT] = False,
    batch_size: Annotated[int | None, BATCH_SIZE] = None,
    precision: Annotated[str, PRECISION] = "fp32",
    device: Annotated[str | None, DEVICE] = None,
    latency: Annotated[
        int, option("--latency", "Time one clip N times, stage by stage, after one to warm up.", metavar="N")
    ] = 0,
    protocol: Annotated[
        Path | None,
        option(
            "--protocol", "YAML file with all that decides the scores besides the model, as OUT/protocol.yaml of another model."
        ),
    ] = None,
    compare: Annotated[
        bool, option("--compare", "Compare files of scores: fewstep evaluate --compare A.json B.json C.json.")
    ] = False,
    pred_video_paths: Annotated[
        str | None, option("--pred-video-paths", "As the original tools spell it.", hidden=True)
    ] = None,
    gt_video_paths: Annotated[str | None, option("--gt-video-paths", "As the original tools spell it.", hidden=True)] = None,
    target_size: Annotated[tuple[int, int], option("--target-size", "As the original tools spell it.", hidden=True)] = (
        224,
        224,
    ),
) -> None:
    """Score the clips of a model, of a codec or of a folder, against real clips or the controls they were made for.

    KEY=VALUE sets a setting of the scorer: fewstep evaluate clips --out scores.json --scorer control preset=low
    """
    if compare:
        _compare([file for file in (what, *context.args) if file is not None], out)
        return
    if pred_video_paths is not None:  # as the original tools spell it: two patterns, all of their clips, one set
        if gt_video_paths is None:
            raise UsageError("--pred_video_paths needs --gt_video_paths, the real clips.")
        what, real, sets = pred_video_paths, gt_video_paths, 1
    if what is None:
        raise UsageError("Missing argument 'WHAT'.")
    if out is None:
        raise UsageError("Missing option '--out'.")
    size = size_of(height, width)
    from fewstep.inference.request import SamplerOptions

    sampling = SamplerOptions(num_steps, sampler, shift, sigma_max, guidance)
    with imports():
        from fewstep.inference.evaluate import line
        from fewstep.inference.evaluate import run as score
        from fewstep.inference.evaluation import Evaluation, Protocol, scorer_of

    load(config)
    instance = scorer_of(scorer, context.args, features)
    names = () if control is None else tuple(name.strip() for name in control.split(","))
    task = Evaluation(
        what, prompts, real, out, num, sets, calls, sampling,
        keep=keep, seeds=seeds, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num_frames=num_frames,
        size=size, given_frames=given_frames, batch_size=batch_size, codec=codec,
        scorers=() if instance is None else (instance,), controls=names, truth=truth, latency=latency, precision=precision,
        device=device,
    )  # fmt: skip
    results = score(task, None if protocol is None else Protocol.read(protocol))
    if results is None:
        print(f"{out}: this process has measured its share; the one that ends last writes the scores")
        return
    print(f"{out}: {line(results)}")
    next_step("fewstep", "report", out, "--out", out.with_suffix(".html"))


def _compare(files: list[str], out: Path | None) -> None:
    """Prints which differences between files of scores are real."""
    if len(files) < 2:
        raise UsageError("--compare needs two files or more: fewstep evaluate --compare A.json B.json.")
    from fewstep.evaluation.compare import compare, table, write

    rows = compare([Path(file) for file in files])
    print(table(rows))
    if out is not None:
        write(out, rows)
