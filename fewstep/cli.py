"""The command `fewstep`: verbs only. Each imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep import TOY, __version__
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.files import write_text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException: typer has carried its own click since 0.20
# Options of a teacher's sampler, the same for every verb; what is not given is as published for the model.
STEPS = typer.Option("--steps", "--num-steps", help="Steps of a teacher's solver. Default: as published.")
SAMPLER = typer.Option(help="A teacher's solver: euler, heun, dpmpp_2m, unipc or res_2ab. Default: as published.")
SHIFT = typer.Option(help="Shift of a teacher's grid in flow time. Default: as published.")
SIGMA_MAX = typer.Option(help="Where the grid of an EDM teacher begins. Default: as published, 80.")
GUIDANCE = typer.Option(help="w in uncond + w (cond - uncond) of a teacher; 1 is off; Cosmos writes g = w - 1.")
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # a.b=c, and the lone dashes of the seeds' commands


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 done, 1 failed at its work, 2 wrong use."""
    from fewstep.config import ConfigError

    try:
        status = app(args=argv, standalone_mode=False)
        if isinstance(status, int) and status:  # typer returns the status of its Exit; 130 is what Ctrl-C becomes there
            return _fail("aborted", 1) if status == 130 else status
    except ConfigError as error:
        return _fail(str(error), 2)
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("aborted", 1)
    except Exception as error:
        if isinstance(error, _CLICK_ERROR):
            return _fail(f"{_CLICK_ERROR.format_message(error)} (fewstep --help lists the verbs)", 2)
        from fewstep.training.errors import TrainingError

        if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
            return _fail(f"{error.filename}: is a file, where a folder is wanted. Choose another name, or move it", 1)
        if isinstance(error, (UserError, TrainingError, OSError)):  # a message for the user; anything else is our bug
            return _fail(str(error), 1)
        raise
    return 0


def _fail(message: str, status: int) -> int:
    print(f"fewstep: {message}", file=sys.stderr)
    return status


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Distil video world models into students of one to four steps, and post-train them."""
    if version:
        print(__version__)
        raise typer.Exit()


@app.command(context_settings=FREE)
def train(context: typer.Context) -> None:
    """Train: fewstep train experiment=NAME a.b=c ..., or fewstep train run.yaml a.b=c. The same command resumes.

    --config FILE.py|FILE.yaml  import your own recipes, methods, networks first

    --dryrun  print the configuration, train nothing
    """
    train_command(list(context.args))


def train_command(arguments: list[str]) -> None:
    """What `fewstep train` and `python -m fewstep.train` do."""
    from fewstep.config import compose, originals, read_command, to_yaml

    command = read_command(arguments)
    from fewstep.config import check
    from fewstep.training.loop import train as run_training
    from fewstep.training.run import Run

    run = compose(command, Run)
    is_main = ranks().is_main  # under torchrun one process speaks for all
    for warning in check(run) if is_main else ():
        print(f"warning: {warning}", file=sys.stderr)
    for file in originals(command) if is_main else ():
        print(f"note: {file} belongs to the original code and is left aside; {command.experiment} says all", file=sys.stderr)
    if command.dryrun:
        folder = run.job.folder()
        write_text(folder / "config.yaml", to_yaml(run))
        print(to_yaml(run), end="")
        from fewstep.training.plan.gpu_fit import dryrun

        print(dryrun(run), file=sys.stderr)
        print(f"dry run: {folder / 'config.yaml'} is written, nothing was trained", file=sys.stderr)
        return
    from fewstep.parallel import join_world, leave_world

    # Joined once for all stages: gloo cannot meet a second time under the same address.
    join_world(run.parallel.device, run.parallel.num_replicas, run.parallel.timeout_s)
    try:
        for stage in run.job.after:
            _train_stage(stage, run)
        run_training(run)
    finally:
        leave_world()


@app.command(context_settings=FREE)
def plan(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output and nothing else.")] = False,
) -> None:
    """Memory on each GPU: fewstep plan experiment=NAME a.b=c ... gpus=8 gpu=h100. No GPU and no weights are needed.

    shape=16x16x88x160 text=512x1024  shapes of a batch (C T H W; tokens, channels), where the data are not there yet
    """
    from fewstep.config import compose, read_command
    from fewstep.training.plan.gpu_fit import command, split_words
    from fewstep.training.run import Run

    words, asked = split_words(context.args)
    told, text = command(compose(read_command(words), Run), asked)
    print(json.dumps(told) if as_json else text)


def _train_stage(name: str, wanted_by: Any) -> None:
    """Trains the recipe `name` unless its run has finished: the stage that `wanted_by` starts from."""
    from fewstep.config import build_recipe
    from fewstep.training.loop import train as run_training

    stage: Any = build_recipe(name)
    if (stage.job.folder() / "summary.json").is_file():
        return
    if ranks().is_main:
        print(f"{wanted_by.job.name} starts from {name}, which is not there yet: training it first", file=sys.stderr)
    for earlier in stage.job.after:
        _train_stage(earlier, stage)
    run_training(replace(stage, parallel=wanted_by.parallel))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder, or RUN@ITER:ROLE.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="auto, diffusers, safetensors, pt-original or lora.")] = "auto",
    base: Annotated[
        Path | None, typer.Option(help="A pipeline's folder: its vae and text encoder complete the student.")
    ] = None,
) -> None:
    """Write the student of a run (its moving average): plain diffusers, or other forms, with a model card."""
    from fewstep.export.export import checked_form
    from fewstep.export.export import export as write

    for path in write(run, out, checked_form(form), base):
        print(path)


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(help="Weights in any form; with --base, what to write.")] = None,
    out: Annotated[Path | None, typer.Argument(help="OUT.pt, OUT.safetensors, or a folder for diffusers.")] = None,
    base: Annotated[str | None, typer.Option(help="The transformer, to put a control branch beside.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="Its control branch, FILE or NAME=FILE; may be repeated.")] = None,
    ctrl_type: Annotated[str | None, typer.Option("--ctrl-type", "--ctrl_type", help="As the seeds' script: edge, ..")] = None,
    checkpoint_dir: Annotated[
        str, typer.Option("--checkpoint-dir", "--checkpoint_dir", help="Of --ctrl-type.")
    ] = "checkpoints",
    model: Annotated[str | None, typer.Option(help="Which published model, or a folder with a config.json.")] = None,
    dtype: Annotated[str, typer.Option(help="keep, fp32, bf16 or fp16")] = "keep",
    lora_scale: Annotated[float | None, typer.Option(help="Add adapters in the file into its weights, times this.")] = None,
) -> None:
    """Weights from one form into another: original Cosmos, FastGen, distributed, diffusers; base and control into one."""
    from fewstep.networks.weights.convert import from_words

    for written in from_words(source, out, base, control or [], ctrl_type, checkpoint_dir, model, dtype, lora_scale):
        print(written)


@app.command(context_settings=FREE, add_help_option=False)
def generate(context: typer.Context) -> None:
    """Videos from a run, an exported student or a teacher: fewstep generate MODEL --prompt TEXT; --help tells all."""
    from fewstep.inference.generate import main as make

    make(list(context.args))


@app.command(name="ls")
def list_names(
    what: Annotated[str, typer.Argument(help="recipes, methods, networks, data, roles, paths, times or previews")] = "recipes",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output and nothing else.")] = False,
) -> None:
    """List what can be named in a configuration; of networks also their published sizes, licences and memory."""
    if what == "networks":
        from fewstep.networks import support

        print(json.dumps(support.as_json()) if as_json else support.text())
        return
    from fewstep.config import ConfigError, choices, presets, recipes

    if what == "recipes":
        rows = {name: found.doc for name, found in recipes().items()}
    else:
        group = what if what in ("data", "times") else what.removesuffix("s")
        found = dict(sorted((choices(group) | presets(group)).items()))
        if not found:
            raise ConfigError(
                f"ls: there are no '{what}'; one of recipes, methods, networks, data, roles, paths, times, previews"
            )
        rows = {name: _about(cls) for name, cls in found.items()}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in rows.items()]))
        return
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")


def _about(cls: Any) -> str:  # Any: a class, or a function that returns a preset
    """The first line a class says of itself; of its file, where it has no words of its own."""
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # what dataclass writes when there is no docstring
        doc = sys.modules[cls.__module__].__doc__ or ""
    return doc.strip().split("\n")[0]


prepare = typer.Typer(no_args_is_help=True, help="Make data sets and what they need; each command goes on where it was killed.")
app.add_typer(prepare, name="prepare")


@prepare.command(name="toyworld")
def prepare_toyworld(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    num: Annotated[int, typer.Option(help="Number of clips.")] = 512,
    seed: Annotated[int, typer.Option(help="Which endless series of clips.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels along each side.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that render; 0 renders in this one.")] = 2,
    only: Annotated[str | None, typer.Option(help="Only these folders, with commas: videos,metas,edge")] = None,
    encoder: Annotated[str | None, typer.Option(help="Of captions, a folder or hub id; the toy world's own.")] = None,
) -> None:
    """Render the toy world: videos, captions and their embeddings, edge, vis, depth, seg and keypoint files."""
    from fewstep.toyworld.dataset import write
    from fewstep.toyworld.physics import World

    world, names = World(height=size, width=size), only.split(",") if only is not None else None
    made = write(out, num, seed, world, workers, names, encoder or TOY)
    print(f"{out}: {num} clips, {made} of them new")


@prepare.command(name="text")
def prepare_text(
    folder: Annotated[Path, typer.Argument(help="The data set: DIR/metas/*.txt are embedded.", metavar="DIR")],
    encoder: Annotated[str, typer.Option(help="Folder or hub id of a text encoder, or of a pipeline that has one.")],
    prompt: Annotated[str | None, typer.Option(help="One caption for every clip.")] = None,
    negative: Annotated[str | None, typer.Option(help="Embed this text, too: DIR/negative.pickle, for data.negative.")] = None,
    into: Annotated[str, typer.Option(help="Folder of the embeddings, in DIR.")] = "t5_xxl",
    form: Annotated[str, typer.Option(help="pickle, as the seeds have it, or packed, for many small clips.")] = "pickle",
    max_tokens: Annotated[int | None, typer.Option(help="Longer texts are cut; as the encoder was trained.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
) -> None:
    """Embed captions, once: metas/*.txt to t5_xxl/*.pickle."""
    from fewstep.prepare.commands import text

    print(text(folder, encoder, prompt, negative, into, form, max_tokens, device))


@prepare.command(name="controls")
def prepare_controls(
    folder: Annotated[Path, typer.Argument(help="The data set: of DIR/videos/*.mp4.", metavar="DIR")],
    type_: Annotated[str, typer.Option("--type", help="edge, vis, depth, seg or keypoint.")],
    preset: Annotated[str, typer.Option(help="Of edge and vis: none, very_low ... very_high, or random.")] = "medium",
    model: Annotated[str | None, typer.Option(help="For depth: folder or hub id of a Depth-Anything model.")] = None,
    files: Annotated[Path | None, typer.Option("--from", help="A folder with a file for each clip: docs/prepare.md.")] = None,
    metric: Annotated[bool, typer.Option(help="Depth in --from is in metres, not inverse.")] = False,
    quality: Annotated[str | None, typer.Option(help="Of mp4: lossless, or crf 0..51; by size if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
) -> None:
    """Make control signals, once: edge, vis and depth videos, seg and keypoint pickles."""
    from fewstep.prepare.commands import controls

    print(controls(folder, type_, preset, model, files, metric, quality, device))


@prepare.command(name="shards")
def prepare_shards(
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR")],
    out: Annotated[str, typer.Option(help="Folder, or URL of any store that fsspec reaches: s3://bucket/set.")],
    parts: Annotated[str | None, typer.Option(help="Only these folders, with commas: videos,metas,edge")] = None,
    shard_mib: Annotated[int, typer.Option(help="A shard ends when it is this large.")] = 1024,
) -> None:
    """Pack a data set into tar files with an index, for data=shards."""
    from fewstep.prepare.commands import shards

    print(shards(folder, out, parts, shard_mib))


@prepare.command(name="latents")
def prepare_latents(
    folder: Annotated[Path, typer.Argument(help="The data set: DIR/videos/*.mp4 are encoded.", metavar="DIR")],
    codec: Annotated[str, typer.Option(help="Folder or hub id of an autoencoder, or of a pipeline that has one.")],
    control: Annotated[str | None, typer.Option(help="Encode this control, too: edge, vis, depth, seg or keypoint.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of a window; whole clips if not given.")] = None,
    sequence_interval: Annotated[int, typer.Option(help="Every k-th frame of the file.")] = 1,
    start_frame_interval: Annotated[int, typer.Option(help="Frames between the starts of two windows.")] = 1,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width to resize to; as the files are.")] = None,
    resize: Annotated[str, typer.Option(help="stretch or crop.")] = "stretch",
    scale: Annotated[float, typer.Option(help="Of the latents besides their normalisation; 0.5 for Cosmos 1.")] = 1.0,
    tile: Annotated[int | None, typer.Option(help="Pixels along a tile, to save memory; not exact.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,
) -> None:
    """Encode clips, once: videos/*.mp4 to latents/packs, for data.x0=latents."""
    from fewstep.prepare.commands import latents

    windows = {"sequence_interval": sequence_interval, "start_frame_interval": start_frame_interval}
    sizes = {"num_frames": num_frames, "video_size": size, "resize": resize}
    print(latents(folder, codec, control, dtype, device, {"scale": scale, "tile": tile}, **sizes, **windows))


check_app = typer.Typer(no_args_is_help=True, help="Look at what a run will be spent on, before it is.")
app.add_typer(check_app, name="check")


@check_app.command(name="data", context_settings=FREE)
def check_data(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output and nothing else.")] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write a contact sheet here: one file.")] = None,
    threads: Annotated[int | None, typer.Option(help="Samples read at once; as many as there are cores.")] = None,
) -> None:
    """Read a whole data set once and say what is in it: fewstep check data DIR [--html sheet.html] [num_frames=17 ...].

    Settings of the run it is meant for are checked too. Exit status 0: it can be trained on.
    """
    from fewstep.prepare.check import data

    text, is_trainable = data(folder, context.args, as_json=as_json, page=page, num_threads=threads)
    print(text)
    raise typer.Exit(0 if is_trainable else 1)


@app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="The teacher: a pipeline's folder or hub id, or RUN@ITER:ROLE.")],
    dataset: Annotated[Path, typer.Argument(help="Data set whose captions, text and controls the teacher is asked for.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a data set of pairs.")],
    num: Annotated[int | None, typer.Option(help="Of the data set's samples, the first so many; all.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    guidance_low: Annotated[float | None, typer.Option(help="w of the low-noise expert of Wan A14B.")] = None,
    path_times: Annotated[
        str | None, typer.Option(help="States to keep: times of the teacher's path with commas, or their number.")
    ] = None,
    student_shift: Annotated[
        float, typer.Option(help="Shift of the student's times, where --path-times is their number.")
    ] = 5.0,
    given_frames: Annotated[int, typer.Option(help="Latent frames of the data set's own clip shown to the teacher.")] = 0,
    control: Annotated[str | None, typer.Option(help="edge, vis, depth, seg or keypoint: what the teacher is led by.")] = None,
    codec: Annotated[str | None, typer.Option(help="Folder or hub id of the autoencoder; the teacher's own.")] = None,
    text: Annotated[str, typer.Option(help="Folder of the text embeddings in the data set.")] = "t5_xxl",
    negative: Annotated[str | None, typer.Option(help="zeros, or a file of the data set; needed by guidance.")] = "zeros",
    max_tokens: Annotated[int, typer.Option(help="Text is padded to so many tokens.")] = 512,
    mask_text: Annotated[
        bool, typer.Option("--mask-text", help="Tell the network which tokens are padding; Cosmos: no.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    quality: Annotated[str, typer.Option(help="Of the mp4: lossless, or a CRF.")] = "18",
    precision: Annotated[str, typer.Option(help="fp32 or bf16: of the network and the codec.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Clips that go through the network together.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ..; a GPU if there is one.")] = None,
) -> None:
    """Noise/clip pairs and ODE paths of a teacher, in the layout of Cosmos-Transfer1. torchrun's processes divide them."""
    from fewstep.inference.request import PairsRequest, SamplerOptions, path_times_of

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance, guidance_low)
    request = PairsRequest(
        model, dataset, out, sampling, path_times_of(path_times), student_shift, given_frames,
        control=control, codec=codec, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num=num,
        seed=seed, quality=quality, precision=precision, batch_size=batch_size, device=device,
    )  # fmt: skip
    from fewstep.inference.pairs import run
    from fewstep.progress import track

    print(run(request, track))


@app.command(context_settings={"allow_extra_args": True})
def evaluate(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="A model (run, export, pipeline), codec:FOLDER, or a folder with videos/.")],
    out: Annotated[Path, typer.Option(help="JSON to write; the first clips go into a folder of that name.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Data set with captions, text, controls and real clips of the same scenes.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Real clips of other scenes, for scorers that compare with some.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="What computes the scores (fewstep ls scorers). Default: what suits clips of this size.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="FILE.py with a scorer or a control of your own.")] = None,
    control: Annotated[str | None, typer.Option(help="Control of the data set that the model receives: edge, vis, ..")] = None,
    num: Annotated[int, typer.Option(help="Clips in a set.")] = 512,
    sets: Annotated[int, typer.Option(help="Sets, each from noise of its own.")] = 3,
    calls: Annotated[int | None, typer.Option(help="Of a teacher: the best it can do with so many network calls.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    codec: Annotated[str | None, typer.Option(help="Of a model that has none beside it: a folder of diffusers.")] = None,
) -> None:
    """Score the clips of a model, of a codec or of a folder, against real clips or the controls they were made for.

    KEY=VALUE sets a setting of the scorer: fewstep evaluate clips --out scores.json --scorer control preset=low
    """
    from fewstep.config import load_file
    from fewstep.inference.request import SamplerOptions

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance)
    from fewstep.inference.evaluate import Job, line, scorer_of
    from fewstep.inference.evaluate import run as score

    if config is not None:
        load_file(config)
    chosen = scorer_of(scorer, context.args)
    job = Job(what, prompts, real, out, num, sets, calls, sampling, codec=codec, scorer=chosen, control=control)
    print(f"{out}: {line(score(job))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: every stage, too short to be good.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Half an hour on two cores: as good as it gets here.")] = False,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train tokenizer and teacher, too: hours.")] = False,
) -> None:
    """The miniature, end to end, with a report. Interrupted, the same command goes on where it was."""
    from fewstep.toyworld.demo import demo as show

    if quick and long:
        raise UserError("--quick and --long: choose one")
    show(out, "quick" if quick else "long" if long else "default", from_scratch)


def script() -> None:
    """The entry point of the installed command."""
    raise SystemExit(main())
