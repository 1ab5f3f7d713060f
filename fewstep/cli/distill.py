"""`fewstep distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import app
from fewstep.cli.options import CONTROLS, GUIDANCE, folder_to_read, folder_to_write, imports, one_of, option, positive, size_of
from fewstep.distill.request import METHODS, DistillRequest

RANK = 32  # of the adapters of --lora


@app.command(context_settings={"allow_extra_args": True})
def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Argument(help="The teacher: a pipeline's folder, or a run or export of a post-trained one.")],
    dataset: Annotated[
        Path, typer.Argument(help="Folder of clips: videos/*.mp4, with captions in metas/*.txt.", callback=folder_to_read)
    ],
    out: Annotated[
        Path, option("--out", "Folder of the student; what it is made of goes to OUT.work.", callback=folder_to_write)
    ],
    steps: Annotated[int, option("--steps", "Network calls of the student for a clip.")] = 4,
    method: Annotated[
        str, option("--method", "How it is distilled: kd, dmd2, or one after the other.", callback=one_of(*METHODS))
    ] = "kd+dmd2",
    lora: Annotated[bool, option("--lora", "Train adapters over the teacher instead of all weights.")] = False,
    rank: Annotated[int | None, option("--rank", f"Rank of the adapters. Default with --lora: {RANK}.")] = None,
    control: Annotated[
        str | None, option("--control", f"Control that the student follows: {', '.join(CONTROLS)}.", callback=one_of(*CONTROLS))
    ] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    negative: Annotated[
        str | None,
        option(
            "--negative",
            "What guidance pushes away from: zeros, or empty, the empty text. Default: as published.",
            callback=one_of("zeros", "empty"),
        ),
    ] = None,
    shift: Annotated[
        float | None, option("--shift", "Shift of the student's times. Default: as published.", callback=positive)
    ] = None,
    teacher_steps: Annotated[
        int | None, option("--teacher-steps", "Steps of the teacher's solver for its pairs. Default: as published.")
    ] = None,
    num_pairs: Annotated[int | None, option("--num-pairs", "Pairs of the teacher. Default: one a clip, at most 10000.")] = None,
    kd_iters: Annotated[int | None, option("--kd-iters", "Iterations of KD. Default: by the number of pairs.")] = None,
    iters: Annotated[int | None, option("--iters", "Iterations of DMD2. Default: by the number of clips.")] = None,
    num_frames: Annotated[int | None, option("--num-frames", "Frames of a clip. Default: as many as fit.")] = None,
    height: Annotated[int | None, option("--height", "Pixels. Default: as the clips have it.")] = None,
    width: Annotated[int | None, option("--width", "Pixels. Default: as the clips have it.")] = None,
    size: Annotated[tuple[int, int] | None, option("--size", "As --height and --width.", hidden=True)] = None,
    prompt: Annotated[str | None, option("--prompt", "Caption of every clip, for a folder without metas/.")] = None,
    text_encoder: Annotated[str | None, option("--text-encoder", "Folder of another text encoder than the teacher's.")] = None,
    codec: Annotated[str | None, option("--codec", "Folder of another autoencoder than the teacher's.")] = None,
    heldout: Annotated[
        Path | None, option("--heldout", "Clips with captions for the scores. Default: DATASET.", callback=folder_to_read)
    ] = None,
    num_eval: Annotated[int | None, option("--num-eval", "Clips of an evaluation. Default: all, at most 512.")] = None,
    processes: Annotated[int, option("--processes", "Processes of torchrun, one for each GPU.")] = 1,
    precision: Annotated[
        str | None, option("--precision", "fp32 or bf16. Default: by the size of the network.", callback=one_of("fp32", "bf16"))
    ] = None,
    calls_per_s: Annotated[
        float | None, option("--calls-per-s", "Network calls per second, for the hours of --dryrun.", callback=positive)
    ] = None,
    work: Annotated[
        Path | None, option("--work", "Folder of pairs, runs and records. Default: OUT.work.", callback=folder_to_write)
    ] = None,
    strict: Annotated[bool, option("--strict", "Fail if the student is worse than its teacher in as many steps.")] = False,
    dryrun: Annotated[bool, option("--dryrun", "Print the commands, their sizes and costs; run nothing.")] = False,
) -> None:
    """Distil a teacher on a folder of clips: check, text, latents, pairs, KD, DMD2, export, scores. It resumes where it was.

    kd.KEY=VALUE and dmd2.KEY=VALUE change settings of the trainings: fewstep distill TEACHER CLIPS --out S dmd2.optim.lr=1e-6
    """
    from fewstep.recipes import refuse_mistyped

    request = DistillRequest(
        teacher, dataset, out, steps, method, rank or (RANK if lora else 0), control, guidance, shift=shift, negative=negative,
        teacher_steps=teacher_steps, num_pairs=num_pairs, kd_iters=kd_iters, iters=iters, num_frames=num_frames,
        size=size or size_of(height, width), prompt=prompt, text_encoder=text_encoder, codec=codec, heldout=heldout,
        num_eval=num_eval, processes=processes, precision=precision, calls_per_s=calls_per_s, work=work, strict=strict,
        settings=tuple(context.args),
    )  # fmt: skip
    for training in request.trainings:
        refuse_mistyped(request.settings_of(training), training)
    with imports():
        from fewstep.distill.run import distill as run

    run(request, dryrun)
