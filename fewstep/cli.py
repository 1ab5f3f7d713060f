"""The command `fewstep`: verbs only. Each imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep import TOY, __version__
from fewstep.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
UsageError: Any = typer.BadParameter.__base__  # of all wrong use; typer has no public name for it
# Options of a teacher's sampler, the same for every verb; what is not given is as published for the model.
JSON = "Print machine-readable output and nothing else."
FORMS = ("auto", "diffusers", "safetensors", "pt-original", "lora")
CONTROLS = ("edge", "vis", "depth", "seg", "keypoint")
DEVICE = typer.Option(help="Device, for instance cpu or cuda:0. Default: a GPU if there is one.")
# What `fewstep ls` lists, and the group of each.
LISTS = {
    "recipes": "recipe", "methods": "method", "networks": "network", "data": "data", "roles": "role", "heads": "head",
    "controls": "control", "paths": "path", "times": "times", "previews": "preview", "scorers": "scorer",
    "text_encoders": "text_encoder", "rewards": "reward", "sample_weights": "sample_weight",
}  # fmt: skip
STEPS = typer.Option("--steps", "--num-steps", help="Steps of a teacher's solver. Default: as published.")
SAMPLER = typer.Option(help="A teacher's solver: euler, heun, dpmpp_2m, unipc or res_2ab. Default: as published.")
SHIFT = typer.Option(help="Shift of a teacher's grid in flow time. Default: as published.")
SIGMA_MAX = typer.Option(help="Where the grid of an EDM teacher begins. Default: as published, 80.")
GUIDANCE = typer.Option(help="w in uncond + w (cond - uncond) of a teacher; 1 is off; Cosmos writes g = w - 1.")
OWN = typer.Option(help="FILE.py that registers networks, scorers or controls of your own.")
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}  # KEY=VALUE, and the lone dashes of Cosmos' commands


def one_of(*names: str) -> Any:  # Any: a callback, as typer has them
    """Refuses other values of an option than these, before anything is imported for the command."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}.")
        return value

    return check


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0 when it is done, 1 when it failed at its work, 2 when it was used wrongly.

    Errors that are meant for the user become one line; any other keeps its traceback.
    """
    from fewstep.config import ConfigError
    from fewstep.training.errors import TrainingError

    try:
        status = app(args=argv, prog_name="fewstep", standalone_mode=False)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fewstep"
        return _fail(f"{error.format_message()} ({where} --help)", 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except typer.Exit as end:
        return end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("aborted", 1)
    except (FileExistsError, NotADirectoryError) as error:
        if not error.filename:
            return _fail(str(error), 1)
        return _fail(f"{error.filename}: is a file, where a folder is needed. Choose another name, or move it", 1)
    except (UserError, TrainingError, OSError) as error:
        return _fail(str(error), 1)
    # typer returns the status of its Exit; 130 is what it makes of Ctrl-C.
    return _fail("aborted", 1) if status == 130 else status if isinstance(status, int) else 0


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

    --config FILE.py|FILE.yaml  imports your own recipes, methods and networks first

    --dryrun  prints the configuration and the memory it needs, and trains nothing
    """
    from fewstep.config import read_command
    from fewstep.recipes import refuse_unknown

    command = read_command(context.args)
    refuse_unknown(command)
    from fewstep.training.command import run

    run(command)


@app.command(context_settings=FREE)
def plan(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Memory on each GPU: fewstep plan experiment=NAME a.b=c ... gpus=8 gpu=h100. No GPU and no weights are needed.

    shape=16x16x88x160 text=512x1024  shapes of a batch (C T H W; tokens, channels), where there are no data yet
    """
    from fewstep.config import compose, read_command
    from fewstep.recipes import refuse_unknown
    from fewstep.training.plan.request import split_words

    words, request = split_words(context.args)
    command = read_command(words)
    refuse_unknown(command)
    from fewstep.training.plan.gpu_fit import answer
    from fewstep.training.run import Run

    record, text = answer(compose(command, Run), request)
    print(json.dumps(record) if as_json else text)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder, or RUN@ITER:ROLE.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help=f"Form of the files: {', '.join(FORMS)}.", callback=one_of(*FORMS))
    ] = "auto",
    base: Annotated[
        Path | None, typer.Option(help="Folder of a pipeline whose vae and text encoder complete the student.")
    ] = None,
    config: Annotated[Path | None, OWN] = None,
) -> None:
    """Write the student of a run (its moving average) as plain diffusers or in another form, with a model card."""
    _load(config)
    from fewstep.export.export import checked_form
    from fewstep.export.export import export as write

    for path in write(run, out, checked_form(form), base):
        print(path)


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(help="Weights in any form; with --base, the file to write.")] = None,
    out: Annotated[Path | None, typer.Argument(help="OUT.pt, OUT.safetensors, or a folder for diffusers.")] = None,
    base: Annotated[str | None, typer.Option(help="Weights of the transformer that a control branch is added to.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Weights of the control branch, FILE or NAME=FILE; may be repeated.")
    ] = None,
    ctrl_type: Annotated[
        str | None,
        typer.Option("--ctrl-type", "--ctrl_type", help="Take base and control of Cosmos-Transfer1 7B: edge, depth, .."),
    ] = None,
    checkpoint_dir: Annotated[
        str, typer.Option("--checkpoint-dir", "--checkpoint_dir", help="Folder that --ctrl-type looks in.")
    ] = "checkpoints",
    model: Annotated[str | None, typer.Option(help="Name of the published model, or a folder with a config.json.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Type of the tensors: keep, fp32, bf16 or fp16.", callback=one_of("keep", "fp32", "bf16", "fp16")),
    ] = "keep",
    lora_scale: Annotated[
        float | None, typer.Option(help="Add adapters in the file to its weights, multiplied by this number.")
    ] = None,
) -> None:
    """Convert weights between forms (original Cosmos, FastGen, distributed, diffusers), or join a base and its control."""
    if ctrl_type is not None and (base is not None or control):
        raise typer.BadParameter("--ctrl-type names both files; leave --base and --control out.")
    if ctrl_type is None and source is None and base is None:
        raise typer.BadParameter("give either SRC, or --base with --control.")
    if base is not None and not control and ctrl_type is None:
        raise typer.BadParameter("--base wants the --control to put beside it.")
    from fewstep.networks.weights.convert import from_words

    for written in from_words(source, out, base, control or [], ctrl_type, checkpoint_dir, model, dtype, lora_scale):
        print(written)


@app.command(context_settings=FREE, add_help_option=False)
def generate(context: typer.Context) -> None:
    """Make videos with a run, an exported student or a teacher: fewstep generate MODEL --prompt TEXT."""
    from fewstep.inference.request import read_command

    request = read_command(context.args)
    from fewstep.inference.generate import run

    run(request)


def _load(config: Path | None) -> None:
    """Imports a file of the user's own for the kinds that it registers."""
    from fewstep.config import load_file

    if config is not None:
        load_file(config)


@app.command(name="ls")
def list_names(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(LISTS)}, settings.")] = "recipes",
    names: Annotated[
        list[str] | None, typer.Argument(metavar="GROUP=NAME", help="With settings: method=dmd2, experiment=NAME, ..")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """List the names that a configuration can use, or every setting of one of them: fewstep ls settings method=dmd2."""
    if what not in (*LISTS, "settings"):
        raise typer.BadParameter(f"there is no list of {what!r}; there are {', '.join(LISTS)} and settings.")
    if (what == "settings") != bool(names):
        raise typer.BadParameter("fewstep ls settings GROUP=NAME, for instance method=dmd2 or experiment=analytic_kd.")
    from fewstep.config import choices, presets, recipes, settings_help

    if what == "networks":
        from fewstep.networks import support

        print(json.dumps(support.as_json()) if as_json else support.text())
        return
    if what == "settings":
        settings = [row for name in names or () for row in settings_help(name)]
        rows = {
            row.key: f"{row.type} = {row.value}".ljust(32) + (f"  # {row.comment}" if row.comment else "") for row in settings
        }
        if as_json:
            print(json.dumps([row._asdict() for row in settings]))
            return
    elif what == "recipes":
        rows = {name: recipe.doc for name, recipe in recipes().items()}
    else:
        group = LISTS[what]
        rows = {name: _about(entry) for name, entry in sorted((choices(group) | presets(group)).items())}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in rows.items()]))
        return
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:{width}}  {text}".rstrip())


def _about(cls: Any) -> str:  # Any: a class, or a function that returns a preset
    """The first line of its docstring; of its file's docstring, where it has none of its own."""
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # what dataclass writes when there is no docstring
        doc = sys.modules[cls.__module__].__doc__ or ""
    return doc.strip().split("\n")[0]


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
        str | None, typer.Option(help="Embed this text, too, as DIR/negative.pickle (for data.negative).")
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
    start_frame_interval: Annotated[int, typer.Option(help="Frames between the starts of two windows.")] = 1,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width to resize to. Default: those of the files.")
    ] = None,
    resize: Annotated[
        str, typer.Option(help="How to resize: stretch or crop.", callback=one_of("stretch", "crop"))
    ] = "stretch",
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
    print(latents(folder, codec, control, dtype, device, {"scale": scale, "tile": tile}, **sizes, **windows))


check_app = typer.Typer(no_args_is_help=True, help="Check a data set before a run is spent on it.")
app.add_typer(check_app, name="check")


@check_app.command(name="data", context_settings=FREE)
def check_data(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The data set.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write a contact sheet to this file.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Number of samples to read at once. Default: the number of cores.")
    ] = None,
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
    dataset: Annotated[Path, typer.Argument(help="Data set whose captions, text and controls the teacher receives.")],
    out: Annotated[Path, typer.Option(help="Folder to write: a data set of pairs.")],
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
        str | None, typer.Option(help="Negative embedding for guidance: zeros, or a file of the data set.")
    ] = "zeros",
    max_tokens: Annotated[int, typer.Option(help="Number of tokens that text is padded to.")] = 512,
    mask_text: Annotated[
        bool, typer.Option("--mask-text", help="Give the network a mask of the padding; Cosmos has none.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    quality: Annotated[str, typer.Option(help="Quality of the mp4: lossless, or a CRF from 0 to 51.")] = "18",
    precision: Annotated[str, typer.Option(help="Precision of the network and the codec: fp32 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Number of clips that go through the network together.")] = 32,
    device: Annotated[str | None, DEVICE] = None,
    config: Annotated[Path | None, OWN] = None,
) -> None:
    """Noise/clip pairs and ODE paths of a teacher, in the layout of Cosmos-Transfer1. torchrun's processes divide them."""
    from fewstep.inference.request import PairsRequest, SamplerOptions, path_times_of

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance, guidance_low)
    request = PairsRequest(
        model, dataset, out, sampling, path_times_of(path_times), student_shift, given_frames,
        control=control, codec=codec, text=text, negative=negative, max_tokens=max_tokens, mask_text=mask_text, num=num,
        seed=seed, quality=quality, precision=precision, batch_size=batch_size, device=device,
    )  # fmt: skip
    _load(config)
    from fewstep.inference.pairs import run
    from fewstep.progress import track

    print(run(request, track))


@app.command(context_settings={"allow_extra_args": True})
def evaluate(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="A model (run, export, pipeline), codec:FOLDER, or a folder with videos/.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; the first clips go into a folder of that name.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Data set with captions, text, controls and real clips of the same scenes.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Real clips of other scenes, for scorers that compare with some.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Name of the scorer (fewstep ls scorers). Default: one that suits clips of this size.")
    ] = None,
    config: Annotated[Path | None, OWN] = None,
    control: Annotated[str | None, typer.Option(help="Control of the data set that the model receives: edge, vis, ..")] = None,
    num: Annotated[int, typer.Option(help="Number of clips in a set.")] = 512,
    sets: Annotated[int, typer.Option(help="Number of sets, each from noise of its own.")] = 3,
    calls: Annotated[int | None, typer.Option(help="Score a teacher at its best with this many network calls.")] = None,
    steps: Annotated[int | None, STEPS] = None,
    sampler: Annotated[str | None, SAMPLER] = None,
    shift: Annotated[float | None, SHIFT] = None,
    sigma_max: Annotated[float | None, SIGMA_MAX] = None,
    guidance: Annotated[float | None, GUIDANCE] = None,
    codec: Annotated[str | None, typer.Option(help="Folder of the autoencoder, for a model that has none.")] = None,
) -> None:
    """Score the clips of a model, of a codec or of a folder, against real clips or the controls they were made for.

    KEY=VALUE sets a setting of the scorer: fewstep evaluate clips --out scores.json --scorer control preset=low
    """
    from fewstep.inference.request import SamplerOptions

    sampling = SamplerOptions(steps, sampler, shift, sigma_max, guidance)
    from fewstep.inference.evaluate import Evaluation, line, scorer_of
    from fewstep.inference.evaluate import run as score

    _load(config)
    chosen = scorer_of(scorer, context.args)
    job = Evaluation(what, prompts, real, out, num, sets, calls, sampling, codec=codec, scorer=chosen, control=control)
    print(f"{out}: {line(score(job))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run every stage in two minutes, too short for good students.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="Train for half an hour on two cores, for the best students.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the tokenizer and the teacher, too, which takes hours.")
    ] = False,
) -> None:
    """Run the whole method on a toy world, with a report. The same command resumes an interrupted demo."""
    if quick and long:
        raise typer.BadParameter("choose one of --quick and --long.")
    from fewstep.toyworld.demo import demo as show

    show(out, "quick" if quick else "long" if long else "default", from_scratch)


def script() -> None:
    """The entry point of the installed command."""
    raise SystemExit(main())
