"""Whether the clips that a command describes fit the model, by its small files alone: no weights are read for an answer.

A teacher's calls must fit its codec and its network. Of a student, steps and guidance are part of its training and are refused
when others are given; a size, a number of frames or a rate beyond its envelope is a warning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewstep.diffusion import TeacherSampler
from fewstep.diffusion.sampling import Sampler, student_times
from fewstep.errors import UserError
from fewstep.inference.chunks import Chunk, chunks_of
from fewstep.inference.coming_from_cosmos import Print
from fewstep.inference.conditions import Shot, check_given, is_made_from_frames, is_origin
from fewstep.inference.model import Envelope, Model, Outline, changed, codec_address
from fewstep.inference.request import ClipRequest, GenerateRequest
from fewstep.networks.encoders.codecs import Autoencoder, open_codec
from fewstep.networks.files.folders import on_meta


@dataclass(frozen=True)
class Plan:
    """How the clips of a command will be made."""

    model: Model  # on torch's meta device
    codec: Autoencoder  # on torch's meta device
    sampler: Sampler
    shot: Shot
    chunks: tuple[Chunk, ...]
    noises_input: bool = False  # --sigma-max below the teacher's own: clips start from their noised --input, as Transfer1's do

    @property
    def window(self) -> int:
        """Frames made at once."""
        return self.chunks[0].num_frames

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """C t h w of a chunk, with the latent frames in front that the network needs and that are dropped."""
        channels, frames, height, width = self.codec.shape(self.window, self.shot.height, self.shot.width)
        return channels, self.num_dropped + frames, height, width

    @property
    def num_dropped(self) -> int:
        """Latent frames that are made in front and dropped, as upstream does for CogVideoX 1.5."""
        frames = self.codec.shape(self.window, self.shot.height, self.shot.width)[1]
        return -frames % self.model.network.traits.frame_multiple


def plan_of(request: GenerateRequest, outline: Outline, say: Print) -> Plan:
    """How the clips will be made; UserError for what does not fit, a line of `say` for what is beyond the envelope."""
    model = outline.skeleton()
    sampler = sampler_of(request, model, say)
    codec = _codec(request, model)
    model = replace(model, envelope=model.envelope.with_codec(codec.form))
    shot = _shot(request, model)
    chunks = tuple(_chunks(request, model, shot))
    window = chunks[0].num_frames
    streams = model.sampler.by_chunk is not None  # of any length
    trained = replace(shot, num_frames=model.envelope.num_frames if streams else window)
    for warning in () if model.is_teacher else beyond(model.envelope, trained):
        say(f"warning: {warning}")
    _check_sizes(request, model, codec, shot, window)
    for clip in request.clips:
        _check_clip(clip, request, model, codec, window)
    if len(chunks) > 1:
        check_given(chunks[1].overlap, window, codec, model.network.traits.first_frames, "--overlap")
        overlap = chunks[1].overlap
        say(f"{shot.num_frames} frames in {len(chunks)} chunks of {window}, {overlap} of them from the one before")
    noises_input = request.sampling.sigma_max is not None and is_below_own(sampler, model)
    if noises_input and any(is_origin(clip) for clip in request.clips):
        say(f"--sigma-max {request.sampling.sigma_max:g}: clips start from their --input with noise of this sigma")
    is_guided = sampler.guidance != 1.0 or getattr(sampler, "guidance_low", None) not in (None, 1.0)  # of a teacher
    if not is_guided and any(clip.negative or clip.negative_embedding for clip in request.clips):
        say("warning: --negative-prompt has no effect without guidance, w = 1")
    return Plan(model, codec, sampler, shot, chunks, noises_input)


def is_below_own(sampler: Sampler, model: Model) -> bool:
    """Whether a teacher's grid begins at less noise than its own does."""
    own = model.sampler
    return isinstance(sampler, TeacherSampler) and isinstance(own, TeacherSampler) and sampler.sigma_max < own.sigma_max


def sampler_of(request: GenerateRequest, model: Model, say: Print) -> Sampler:
    """The model's own sampler with the changes of the command. A student's schedule is part of it: changed by --force only."""
    own, options = model.sampler, request.sampling
    if isinstance(own, TeacherSampler):
        if request.student_only:
            return _published_student(request, model, say)
        usual = model.network.traits.guidance
        if request.published_guidance and usual is not None:
            say(f"guidance: none is given; as the original command does, g = {usual - 1:g}, which is w = {usual:g} here")
            options = replace(options, guidance=usual)
        return changed(own, options)
    if own.shift is not None and options.num_steps is not None:  # a flow map takes any number
        own = own.with_steps(options.num_steps)
    num, w = options.num_steps, 1.0 if options.guidance is None else options.guidance
    problems: list[str] = []
    if num not in (None, len(own.times)):
        problems.append(f"--num-steps {num}: this student takes {len(own.times)}, at times it was trained for")
    if w != 1.0:
        problems.append(f"guidance w = {w:g}: this student was trained to do without, w = 1")
    if problems and not request.force:
        raise UserError("; ".join(problems) + ". Leave it out, or see what happens with --force")
    for problem in problems:
        say(f"warning: {problem}")
    for name in options.names():
        if name not in ("--num-steps", "--guidance"):
            say(f"warning: {name} has no effect: a student takes the steps it was trained for")
    times = own.times if num in (None, len(own.times)) else student_times(num, own.path, 5.0)
    return replace(own, times=times, guidance=w)


def _published_student(request: GenerateRequest, model: Model, say: Print) -> Sampler:
    """The sampler of a published student, whose file of weights says nothing of it: --use_distilled does."""
    usual, num = model.network.traits.student, request.sampling.num_steps
    if usual is None or not model.is_of_files:
        raise UserError(f"--use_distilled: {request.model} is a teacher, nothing in it says how a student is sampled")
    if num is not None and num > len(usual.times):
        raise UserError(f"--num-steps {num}: the published students of this network take {len(usual.times)} at most")
    student = replace(usual, times=usual.times[:num])
    say(f"{request.model}: by --use_distilled a student of {len(student.times)} steps, sampled as the published ones are")
    return student


def beyond(envelope: Envelope, shot: Shot) -> list[str]:
    """What of the clip the student was never trained on."""
    units = {"num_frames": "frames", "height": "pixels high", "width": "pixels wide", "fps": "frames per second"}
    out: list[str] = []
    for name, unit in units.items():
        trained, value = getattr(envelope, name), getattr(shot, name)
        if trained is not None and abs(trained - value) > 0.01 * trained:
            out.append(
                f"{value:g} {unit}: this student was trained on {trained:g}; beyond its envelope nobody knows what it does"
            )
    return out


def check_text(channels: int, model: Model, source: str) -> None:
    """Refuses embeddings whose channels are not those that the network reads."""
    trained = model.network.traits.text_channels
    if trained is not None and channels != trained:
        raise UserError(
            f"{source}: its embeddings have {channels} channels, but this network reads {trained}. Give the text encoder that "
            "it was trained with: --text-encoder FOLDER"
        )


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _codec(request: GenerateRequest, model: Model) -> Autoencoder:
    address = codec_address(model, request.model, request.codec)
    with on_meta():
        codec = open_codec(address, device="meta")
    channels = model.network.traits.latent_channels
    if channels is not None and codec.form.channels != channels:
        raise UserError(
            f"{address}: its latents have {codec.form.channels} channels, but {request.model} works on {channels}. Give the "
            "codec that it was trained with: --codec FOLDER"
        )
    return codec


def _shot(request: GenerateRequest, model: Model) -> Shot:
    envelope = model.envelope
    values = {name: getattr(request, name) or getattr(envelope, name) for name in ("num_frames", "height", "width")}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"{request.model} does not say what clips it makes: give {', '.join(missing)}")
    return Shot(**values, fps=float(request.fps or envelope.fps or 24))


def _chunks(request: GenerateRequest, model: Model, shot: Shot) -> list[Chunk]:
    """All at once, unless --chunk-frames says how many at a time; a student made for given frames takes its own number.

    A causal model generates clips of any length by itself, chunk after chunk from its own latents.
    """
    window = request.chunk_frames
    if model.sampler.by_chunk is not None:
        if window is not None:
            raise UserError(f"--chunk-frames {window}: {request.model} is causal, and its chunks are those it was trained with")
        return chunks_of(shot.num_frames, shot.num_frames, 1)
    if window is None and not model.is_teacher and model.network.traits.first_frames in ("mask", "picture"):
        window = model.envelope.num_frames
    chunks = chunks_of(shot.num_frames, window or shot.num_frames, 1 if request.overlap is None else request.overlap)
    if len(chunks) == 1:
        return chunks
    if model.network.traits.first_frames == "none":
        raise UserError(
            f"--chunk-frames {window}: a clip of {shot.num_frames} frames would be made chunk after chunk, each from the last "
            "frames of the one before; this network cannot be given frames"
        )
    if request.save_noise:
        raise UserError("--save-noise: a clip made in several chunks has no one noise; leave it out, or ask for a shorter clip")
    return chunks


def _check_sizes(request: GenerateRequest, model: Model, codec: Autoencoder, shot: Shot, window: int) -> None:
    _, _, height, width = codec.shape(window, shot.height, shot.width)
    multiple, space = model.network.traits.side_multiple, codec.form.space
    for name, pixels, side in (("height", shot.height, height), ("width", shot.width, width)):
        if side % multiple:
            step = multiple * space
            low = pixels - pixels % step
            fits = f"{low} or {low + step}" if low else f"{step}"
            raise UserError(f"--{name} {pixels}: {request.model} makes multiples of {step} pixels, {fits} for instance")


def _check_clip(clip: ClipRequest, request: GenerateRequest, model: Model, codec: Autoencoder, window: int) -> None:
    traits = model.network.traits
    wrong = sorted(set(clip.control) - set(traits.controls))
    if wrong:
        raise UserError(f"control '{wrong[0]}': this network is led by {', '.join(traits.controls) or 'no control'}")
    if clip.num_input_frames:
        if traits.first_frames == "none":
            raise UserError(f"--num-input-frames {clip.num_input_frames}: {request.model} cannot be given frames")
        check_given(clip.num_input_frames, window, codec, traits.first_frames, "--num-input-frames")
    elif traits.first_frames == "picture":
        raise UserError("this network makes a clip that begins with a picture: give --input FILE")
    for name, control in clip.control.items():
        if control.source is not None:
            continue
        if clip.source is None:
            raise UserError(f"control '{name}' has no file, and there is no --input to make it from: --control {name}=FILE.mp4")
        if not is_made_from_frames(name):
            raise UserError(f"control '{name}' cannot be made from a video here, as edge and vis can: fewstep prepare controls")
