"""`fewstep distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import CONTROLS, GUIDANCE, imports, one_of

METHODS = ("kd", "dmd2", "kd+dmd2")
RANK = 32  # of the adapters of --lora


@app.command(context_settings={"allow_extra_args": True})
def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Argument(help="The teacher: a pipeline's folder, or a run or export of a post-trained one.")],
    dataset: Annotated[Path, typer.Argument(help="Folder of clips: videos/*.mp4, with captions in metas/*.txt.")],
    out: Annotated[Path, typer.Option(help="Folder of the student; what it is made of goes to OUT.work.")],
    steps: Annotated[int, typer.Option(help="Network calls of the student for a clip.")] = 4,
    method: Annotated[
        str, typer.Option(help="How it is distilled: kd, dmd2, or one after the other.", callback=one_of(*METHODS))
    ] = "kd+dmd2",
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters over the teacher instead of all weights.")] = False,
    rank: Annotated[int | None, typer.Option(help=f"Rank of the adapters. Default with --lora: {RANK}.")] = None,
    control: Annotated[
        str | None, typer.Option(help=f"Control that the student follows: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))
    ] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the student's times. Default: as published.")] = None,
    teacher_steps: Annotated[
        int | None, typer.Option(help="Steps of the teacher's solver for its pairs. Default: as published.")
    ] = None,
    num_pairs: Annotated[int | None, typer.Option(help="Pairs of the teacher. Default: one a clip, at most 10000.")] = None,
    kd_iters: Annotated[int | None, typer.Option(help="Iterations of KD. Default: by the number of pairs.")] = None,
    iters: Annotated[int | None, typer.Option(help="Iterations of DMD2. Default: by the number of clips.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip. Default: as many as fit.")] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width. Default: those of the clips.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Caption of every clip, for a folder without metas/.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Folder of another text encoder than the teacher's.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder of another autoencoder than the teacher's.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Clips with captions for the scores. Default: DATASET.")] = None,
    num_eval: Annotated[int | None, typer.Option(help="Clips of an evaluation. Default: all, at most 512.")] = None,
    processes: Annotated[int, typer.Option(help="Processes of torchrun, one for each GPU.")] = 1,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16. Default: by the size of the network.", callback=one_of("fp32", "bf16"))
    ] = None,
    calls_per_s: Annotated[float | None, typer.Option(help="Network calls per second, for the hours of --dryrun.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of pairs, runs and records. Default: OUT.work.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if the student is worse than its teacher's own few steps.")
    ] = False,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print the commands, their sizes and costs; run nothing.")] = False,
) -> None:
    """Distil a teacher on a folder of clips: check, text, latents, pairs, KD, DMD2, export, scores. It resumes where it was.

    kd.KEY=VALUE and dmd2.KEY=VALUE change settings of the trainings: fewstep distill TEACHER CLIPS --out S dmd2.optim.lr=1e-6
    """
    from fewstep.distill.request import DistillRequest

    request = DistillRequest(
        teacher, dataset, out, steps, method, rank or (RANK if lora else 0), control, guidance, shift, teacher_steps, num_pairs,
        kd_iters, iters, num_frames, size, prompt, text_encoder, codec, heldout, num_eval, processes, precision, calls_per_s,
        work, strict, tuple(context.args),
    )  # fmt: skip
    with imports():
        from fewstep.distill.run import distill as run

    run(request, dryrun)
