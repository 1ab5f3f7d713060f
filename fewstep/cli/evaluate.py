"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import CONTROLS, DEVICE, GUIDANCE, OWN, SAMPLER, SHIFT, SIGMA_MAX, STEPS, imports, load, one_of


def _size(value: str | None) -> str | None:
    """Refuses what is no HEIGHTxWIDTH."""
    if value is not None and not all(part.isdigit() and int(part) for part in (value.split("x") if "x" in value else ["?"])):
        raise typer.BadParameter(f"{value!r} is no HEIGHTxWIDTH, for instance 704x1280.")
    return value


@app.command(context_settings={"allow_extra_args": True})
def evaluate(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(help="A model (run, export, pipeline), codec:FOLDER, or a folder of clips."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output_file", help="JSON file to write; the first clips go into a folder of that name."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Data set with captions, text, controls and real clips of the same scenes.")
    ] = None,
    real: Annotated[str | None, typer.Option(help="Real clips of other scenes: a data set, or a folder of mp4.")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Clips that each one should equal, by file name, for PSNR and SSIM.")
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="Name of the scorer (fewstep ls scorers). Default: clips; toyworld for clips of the toy world."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Feature networks of the scorer clips, NAME or NAME=FILE, separated by commas (fewstep ls features)."
        ),
    ] = None,
    config: Annotated[Path | None, OWN] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help=f"Controls to score fidelity to: {', '.join(CONTROLS)}; several by commas. A model receives its own."
        ),
    ] = None,
    num: Annotated[int | None, typer.Option(help="Number of clips in a set. Default: 512, or as many as there are.")] = None,
    keep: Annotated[int, typer.Option(help="Number of clips to keep beside the file, for the report.")] = 8,
    sets: Annotated[int, typer.Option(help="Number of sets, each from noise of its own.")] = 3,
    num_frames: Annotated[
        int | None,
        typer.Option(
            "--num-frames", "--num_frames", help="Number of frames of every clip. Default: as the model was trained, or all."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(callback=_size, help="HEIGHTxWIDTH of generated clips. Default: as the model was trained.")
    ] = None,
    calls: Annotated[int | None, typer.Option(help="Score a teacher at its best with this many network calls.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    given_frames: Annotated[int, typer.Option(help="Number of clean latent frames of the clip that the model receives.")] = 0,
    codec: Annotated[str | None, typer.Option(help="Folder of the autoencoder, for a model that has none.")] = None,
    text: Annotated[str, typer.Option(help="Folder of the text embeddings in the data set.")] = "t5_xxl",
    negative: Annotated[str, typer.Option(help="Negative embedding for guidance: zeros, or a file of the data set.")] = "zeros",
    max_tokens: Annotated[int, typer.Option(help="Number of tokens that text is padded to.")] = 512,
    mask_text: Annotated[
        bool, typer.Option("--mask-text", help="Give the network a mask of the padding; Cosmos has none.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Number of clips that go through the network together.")] = 64,
    precision: Annotated[
        str, typer.Option(callback=one_of("fp32", "bf16"), help="Precision of the network and the codec: fp32 or bf16.")
    ] = "fp32",
    device: Annotated[str | None, DEVICE] = None,
    latency: Annotated[int, typer.Option(metavar="N", help="Time one clip N times, stage by stage, after one to warm up.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare files of scores: fewstep evaluate --compare A.json B.json C.json.")
    ] = False,
    pred_video_paths: Annotated[str | None, typer.Option("--pred_video_paths", hidden=True)] = None,
    gt_video_paths: Annotated[str | None, typer.Option("--gt_video_paths", hidden=True)] = None,
    target_size: Annotated[tuple[int, int], typer.Option("--target_size", hidden=True)] = (224, 224),
) -> None:
    """Score the clips of a model, of a codec or of a folder, against real clips or the controls they were made for.

    KEY=VALUE sets a setting of the scorer: fewstep evaluate clips --out scores.json --scorer control preset=low
    """
    if compare:
        _compare([file for file in (what, *context.args) if file is not None], out)
        return
    if pred_video_paths is not None:  # as the original tools spell it: two patterns, all of their clips, one set
        if gt_video_paths is None:
            raise typer.BadParameter("--pred_video_paths needs --gt_video_paths, the real clips.")
        what, real, sets = pred_video_paths, gt_video_paths, 1
    if what is None:
        raise typer.BadParameter("Missing argument 'WHAT'.")
    if out is None:
        raise typer.BadParameter("Missing option '--out'.")
    from fewstep.inference.request import SamplerOptions

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance)
    with imports():
        from fewstep.inference.evaluate import Evaluation, line, scorer_of
        from fewstep.inference.evaluate import run as score

    load(config)
    names = () if control is None else tuple(name.strip() for name in control.split(","))
    shape = None if size is None else (int(size.split("x")[0]), int(size.split("x")[1]))
    task = Evaluation(
        what, prompts, real, out, num, sets, calls, sampling,
        keep=keep, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num_frames=num_frames, size=shape,
        given_frames=given_frames, batch_size=batch_size, codec=codec, scorer=scorer_of(scorer, context.args, features),
        controls=names, truth=truth, latency=latency, precision=precision, device=device,
    )  # fmt: skip
    print(f"{out}: {line(score(task))}")


def _compare(files: list[str], out: Path | None) -> None:
    """Prints which differences between files of scores are real."""
    if len(files) < 2:
        raise typer.BadParameter("--compare needs two files or more: fewstep evaluate --compare A.json B.json.")
    from fewstep.evaluation.compare import compare, table, write

    rows = compare([Path(file) for file in files])
    print(table(rows))
    if out is not None:
        write(out, rows)
