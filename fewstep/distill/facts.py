"""What a teacher and a folder of clips say before anything heavy is loaded: the shapes, the sizes, how long to train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout
from fewstep.diffusion import EDM, TeacherSampler
from fewstep.distill.request import DistillRequest
from fewstep.errors import UserError, some
from fewstep.inference.model import changed, is_export
from fewstep.inference.request import SamplerOptions
from fewstep.inference.teacher import Teacher, teacher_at
from fewstep.networks.encoders.codecs import Form, form_of
from fewstep.networks.encoders.text import TextForm, text_form
from fewstep.networks.files.pipeline import PipelineFolder

MOST_PAIRS = 10_000  # as Transfer1 has
MOST_EVAL = 512
MOST_PROBED = 2_000  # clips whose headers are read here; `fewstep check data` reads all of them


@dataclass(frozen=True)
class Clips:
    """A data set by the headers of its files."""

    num: int
    lacks_captions: str | None  # the message about clips without a caption
    frames: int  # of the shortest clip
    sizes: tuple[tuple[int, int], ...]  # height, width; the commonest first
    is_uniform: bool  # all have the same number of frames


@dataclass(frozen=True)
class Facts:
    request: DistillRequest
    teacher: Teacher
    sampler: TeacherSampler  # with the guidance that the student learns
    clips: Clips
    codec: str
    text_encoder: str
    text: TextForm
    form: Form
    num_frames: int  # of a clip that the student makes
    size: tuple[int, int]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.form.latents(self.num_frames, *self.size)

    @property
    def warnings(self) -> list[str]:
        """What makes the student less than it could be; the report shows the same sentences."""
        trained = self.teacher.trained_on(self.form)
        frames, (height, width) = self.num_frames, self.size
        if trained is None or (frames <= trained[0] and height * width <= trained[1] * trained[2]):
            return []
        return [
            f"the clips are larger ({frames} frames of {height} x {width} pixels) than those that the teacher was trained on "
            f"({trained[0]} of {trained[1]} x {trained[2]}). Nobody knows what it makes at that size, and the student learns "
            "from it: look at the teacher's clips in the report, or choose a smaller --num-frames, --height and --width."
        ]

    @property
    def is_window(self) -> bool:
        """Whether clips are cut into windows."""
        return not self.clips.is_uniform or self.num_frames != self.clips.frames

    @property
    def scale(self) -> float:
        """Factor of the latents besides their normalisation."""
        path = self.teacher.path
        return path.sigma_data if isinstance(path, EDM) else 1.0

    @property
    def shift(self) -> float:
        """Of the student's times."""
        return self.teacher.published.shift if self.request.shift is None else self.request.shift

    @property
    def form_of_student(self) -> str:
        """The form of its export: diffusers, where diffusers has its network."""
        return self.teacher.spec.export_format()[0]

    @property
    def negative(self) -> str:
        """The unconditional prompt: zeros, or a file of the data set."""
        return "zeros" if (self.request.negative or self.teacher.published.negative) == "zeros" else "negative.pickle"

    @property
    def num_pairs(self) -> int:
        return min(self.clips.num, MOST_PAIRS if self.request.num_pairs is None else self.request.num_pairs)

    @property
    def num_eval(self) -> int:
        there = self.clips.num if self.request.heldout is None else clips_of(self.request.heldout).num
        return min(there, MOST_EVAL if self.request.num_eval is None else self.request.num_eval)

    @property
    def batch(self) -> int:
        """Samples of an iteration, by the trainer of the general recipes."""
        return (16 if self.teacher.is_small else 8) * self.request.processes

    def iters(self, training: str) -> int:
        """64 passes over the data, as Transfer1's KD; from a few hundred iterations up to as many as published runs take."""
        own, num, least, most = {
            "kd": (self.request.kd_iters, self.num_pairs, 250, 10_000),
            "dmd2": (self.request.iters, self.clips.num, 600, 24_000),
        }[training]
        return min(most, max(least, 64 * num // self.batch)) if own is None else own


def facts_of(request: DistillRequest) -> Facts:
    """Reads small files only. Raises UserError for what cannot be distilled, so that no time is spent on it."""
    teacher = teacher_at(request.teacher, () if request.control is None else (request.control,))
    base = teacher.base
    codec, text_encoder = request.codec or base, request.text_encoder or base
    if codec is None or text_encoder is None:
        raise UserError(f"{request.teacher}: has no pipeline beside it. Add --codec FOLDER and --text-encoder FOLDER")
    branches = teacher.spec.control_branches
    if request.control is not None and request.control not in branches:
        raise UserError(f"--control {request.control}: {request.teacher} has no branch for it; it has {branches or 'none'}")
    if (len(branches) > 1 and request.control is not None) or (branches and request.control is None):
        raise UserError(
            f"{request.teacher}: has control branches ({', '.join(branches)}). One is distilled at a time: give a teacher with "
            "one branch, and its name, --control NAME"
        )
    clips, form = clips_of(request.dataset), form_of(codec)
    if clips.lacks_captions and request.prompt is None:
        raise UserError(
            f"{request.dataset}: {clips.lacks_captions}. Write one for each clip, or, if none has one, give one to all: "
            "--prompt TEXT"
        )
    sampler = changed(teacher.sampler, SamplerOptions(num_steps=request.teacher_steps))
    guidance = teacher.published.guidance if request.guidance is None else request.guidance
    sampler = changed(sampler, SamplerOptions(guidance=guidance))
    if "kd" in request.trainings and request.steps > 1 and sampler.num_steps < 2 * request.steps:
        raise UserError(
            f"--teacher-steps {sampler.num_steps}: the pairs of a student of {request.steps} steps need at least "
            f"{2 * request.steps}"
        )
    _refuse_foreign(request.out)
    network = _sizes(teacher)
    if network.get("latent_channels", form.channels) != form.channels:
        raise UserError(f"--codec {codec}: makes {form.channels} channels, and this teacher has {network['latent_channels']}")
    frames, size = _frames(request, clips, form, network), _size(request, clips, form, network)
    return Facts(request, teacher, sampler, clips, codec, text_encoder, _text(teacher, text_encoder), form, frames, size)


def clips_of(folder: Path) -> Clips:
    """By the headers of at most MOST_PROBED of its files."""
    place = Layout.open(folder)
    files = list(place.files(layout.VIDEOS).values())
    if not files or place.form != "flat":
        raise UserError(f"{folder}: has no videos/*.mp4. `fewstep distill` begins with a folder of clips (docs/own-data.md)")
    headers = [video.probe(file) for file in files[:: -(-len(files) // MOST_PROBED)]]
    sizes = Counter(header.size for header in headers)
    counts = {header.num_frames for header in headers}
    lacking = place.missing(layout.CAPTIONS, place.files(layout.VIDEOS))
    return Clips(len(files), lacking, min(counts), tuple(size for size, _ in sizes.most_common()), len(counts) == 1)


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _frames(request: DistillRequest, clips: Clips, form: Form, network: Mapping[str, Any]) -> int:
    """As many frames of a clip as codec and network take."""
    frames = request.num_frames or clips.frames
    if frames > clips.frames:
        raise UserError(f"--num-frames {frames}: the shortest clip of {request.dataset} has {clips.frames} frames")
    if not form.sees_time:
        return 1
    fits = frames - (frames - 1) % form.frames_step
    most = _most(network, 0)
    return fits if most is None else min(fits, 1 + (most - 1) * form.time)


def _size(request: DistillRequest, clips: Clips, form: Form, network: Mapping[str, Any]) -> tuple[int, int]:
    """The size of the clips; refuses several, and one that codec and network do not take."""
    unit = form.space * _patches(network)[-1]
    height, width = request.size or clips.sizes[0]
    advice = f"--height {max(unit, height - height % unit)} --width {max(unit, width - width % unit)}"
    if request.size is None and len(clips.sizes) > 1:
        listed = some([f"{size[0]} x {size[1]}" for size in clips.sizes])
        raise UserError(
            f"{request.dataset}: holds clips of several sizes ({listed}; height x width). Choose one, {advice}, to which all "
            "are resized and cropped, or give those of one shape a folder of their own"
        )
    if height % unit or width % unit:
        raise UserError(f"{height} x {width} pixels: this teacher takes multiples of {unit}. Choose a size, {advice}")
    for axis, side in ((1, height), (2, width)):
        most = _most(network, axis)
        if most is not None and side > most * form.space:
            raise UserError(
                f"{height} x {width} pixels: this teacher was trained for {most * form.space} along a side at the most. Choose "
                "a smaller --height and --width"
            )
    return height, width


def _sizes(teacher: Teacher) -> Mapping[str, Any]:
    """The sizes of the network: those of the folder that its weights are from, or of its specification."""
    if teacher.spec.source is not None:
        return PipelineFolder(teacher.spec.source).denoiser
    spec: Any = teacher.spec  # a dataclass with fields of its own
    return {name: value for name, value in asdict(spec).items() if name in ("latent_channels", "patch_size", "max_size")}


def _patches(network: Mapping[str, Any]) -> tuple[int, ...]:
    patch = network.get("patch_size", 1)
    return tuple(patch) if isinstance(patch, list | tuple) else (1, patch, patch) if isinstance(patch, int) else (1, 1, 1)


def _most(network: Mapping[str, Any], axis: int) -> int | None:
    """Positions that the network has along an axis of the latents (Cosmos); None: as many as one wants."""
    sizes = network.get("max_size")
    return int(sizes[axis]) if isinstance(sizes, list | tuple) else None


def _text(teacher: Teacher, encoder: str) -> TextForm:
    return teacher.text if encoder == teacher.base else text_form(encoder)


def _refuse_foreign(out: Path) -> None:
    """Refuses a folder that the export would refuse in the end."""
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"--out {out}: holds something else than an earlier export; choose a new folder")
