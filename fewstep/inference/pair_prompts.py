"""What a teacher makes pairs of: the captions of a data set, with or without its clips, or a file of prompts.

The clips of pairs have the shape of the data set's prepared latents if it has them, else that of its clips, else the size at
which the teacher was published; `--num-frames --height --width --fps` change it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.data.files import cache, video
from fewstep.data.files.packs import Packs, has_packs, open_packs
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder, FolderData
from fewstep.data.folder.layout import Layout, Part
from fewstep.data.folder.parts import Embedding, embedding
from fewstep.data.folder.texts import Texts, condition_of, negative_of
from fewstep.errors import UserError
from fewstep.inference.card import FILE as CARD
from fewstep.inference.card import StudentCard
from fewstep.inference.conditions import Shot
from fewstep.inference.model import folder_of
from fewstep.inference.request import Sizes, read_prompts
from fewstep.networks.encoders.codecs import Autoencoder, Codec, to_uint8
from fewstep.networks.encoders.text import TextEncoder, stored_embedding, stored_pooled
from fewstep.networks.files.pipeline import PipelineFolder

PUBLISHED = "the size at which the teacher was published"
AS_THE_DATA = Sizes()
FIRST_WINDOW_ONLY = 10**9  # frames between the starts of two windows


@dataclass(frozen=True)
class Material:
    """What a batch of clips is made from."""

    cond: Condition  # controls are pixels B 3 T H W
    negative: Condition | None
    pixels: Tensor | None = None  # of the data set's own clips


class PairPrompts(Protocol):
    """The clips to be made, in order."""

    @property
    def stems(self) -> Sequence[str]: ...

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def shot(self) -> Shot:
        """Frames, size and rate of the clips; the rate is that of the first."""
        ...

    @property
    def origin(self) -> str:
        """Where the shape comes from, for the user."""
        ...

    def material(self, rows: Sequence[int]) -> Material: ...

    def text(self, row: int) -> Path | Mapping[str, Tensor] | None:
        """The embedding of a caption: a file, or its arrays, "text" and perhaps "pooled"."""
        ...

    def controls(self, row: int, received: Mapping[str, np.ndarray]) -> Mapping[Part, Path | np.ndarray]:
        """What is stored of the controls: their files; or, of a window, or resized, its frames."""
        ...

    def record(self) -> dict[str, Any]:
        """What decides the clips, but for the captions and embeddings of single ones."""
        ...


# ---- a data set ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderPrompts:
    """The captions of a data set. `clips` are opened where the shape or the teacher needs them."""

    spec: Folder
    texts: Texts
    clips: FolderData | None
    shot: Shot
    origin: str
    rates: Mapping[str, float] = field(default_factory=dict[str, float])  # by stem
    whole_files: bool = True  # whether the teacher receives the whole of each control file

    @classmethod
    def of(
        cls,
        spec: Folder,
        sizes: Sizes = AS_THE_DATA,
        *,
        codec: Codec | None = None,
        needs_clips: bool = False,
        teacher: Shot | None = None,
    ) -> FolderPrompts:
        """spec: a folder of pixels. codec: the teacher's; its prepared latents are preferred to those of another codec.

        needs_clips: for a control or for given frames. teacher: the size at which it was published.
        """
        texts = Texts.open(spec)
        has_clips = bool(texts.place.files(layout.VIDEOS) or texts.place.files(layout.IMAGES))
        if needs_clips and not has_clips:
            raise UserError(f"{spec.dataset_dir}: has no videos/: a control and given frames are of clips")
        prepared = prepared_window(texts.place, codec)
        windowed = replace(spec, text=None, negative=None) if prepared is None else prepared.of(spec)
        changed = {name: value for name, value in (("num_frames", sizes.num_frames), ("video_size", sizes.size)) if value}
        windowed = replace(windowed, **changed, start_frame_interval=FIRST_WINDOW_ONLY) if changed else windowed
        is_plain = prepared is None and not changed
        if has_clips and (needs_clips or is_plain):
            clips = replace(windowed, text=spec.text, negative=spec.negative).open()
            return cls._of_clips(spec, texts, clips, sizes, prepared, is_plain)
        shot = shot_of(sizes, prepared, _header(texts.place) if has_clips else None, teacher, str(spec.dataset_dir))
        rates = dict[str, float]()
        if sizes.fps is None and has_clips:
            stride = windowed.sequence_interval
            headers = {stem: video.probe(path) for stem, path in texts.place.files(texts.place.pixels()).items()}
            rates = {stem: header.fps / stride for stem, header in headers.items() if header.fps}
        elif sizes.fps is None and prepared is not None and prepared.fps is not None:
            rates = dict.fromkeys(texts.stems, prepared.fps)
        origin = sizes.text() or (prepared.origin if prepared is not None else PUBLISHED)
        return cls(spec, texts, None, shot, origin, rates)

    @classmethod
    def _of_clips(
        cls, spec: Folder, texts: Texts, clips: FolderData, sizes: Sizes, prepared: Prepared | None, is_plain: bool
    ) -> FolderPrompts:
        first = clips.samples[0]
        assert first.header is not None, first
        height, width = clips.spec.video_size or first.header.size
        fps = sizes.fps or first.header.fps / first.span.stride or 16.0
        rates = {} if sizes.fps is None else dict.fromkeys(clips.stems, sizes.fps)
        texts = replace(texts, stems=tuple(clips.stems), captions=tuple(clips.captions()))
        origin = sizes.text() or (prepared.origin if prepared is not None else "the clips of the data set")
        return cls(spec, texts, clips, Shot(first.span.count, height, width, fps), origin, rates, whole_files=is_plain)

    @property
    def stems(self) -> Sequence[str]:
        return self.texts.stems

    @property
    def captions(self) -> Sequence[str]:
        return self.texts.captions

    def material(self, rows: Sequence[int]) -> Material:
        if self.clips is not None:
            batch = self.clips.batch(torch.tensor(rows))
            fps = self._rates(rows) if self.rates else batch.cond.fps
            return Material(replace(batch.cond, fps=fps), batch.negative, batch.x0)
        cond, negative = self.texts.conditions(rows)
        return Material(replace(cond, fps=self._rates(rows)), negative)

    def text(self, row: int) -> Path | Mapping[str, Tensor] | None:
        if self.spec.text is None:
            return None
        return self.texts.files.get(self.stems[row]) or {"text": self.texts.tokens(row)}

    def controls(self, row: int, received: Mapping[str, np.ndarray]) -> Mapping[Part, Path | np.ndarray]:
        control = self.spec.control
        if control is None or self.clips is None:
            return {}
        part, file = layout.control(control.folder, control.suffix), self.clips.samples[row].files[control.folder]
        return {part: file if self.whole_files or file.suffix != ".mp4" else received[control.folder]}

    def record(self) -> dict[str, Any]:
        spec = self.spec
        _, negative = self.texts.conditions([0])
        return {
            "source": str(spec.dataset_dir),
            "text": spec.text,
            "negative": spec.negative,
            "negative_tensor": None if negative is None else hash_of(negative.text),
            "max_tokens": spec.max_tokens,
            "mask_text": spec.mask_text,
            "control": None if spec.control is None else spec.control.folder,
        }

    def _rates(self, rows: Sequence[int]) -> Tensor | None:
        return torch.tensor([self.rates.get(self.stems[row], self.shot.fps) for row in rows])


@dataclass(frozen=True)
class Prepared:
    """The shape of the latents that a data set holds."""

    folder: str
    num_frames: int | None
    size: tuple[int, int] | None  # None: that of the files, which only their codec knows
    is_whole: bool  # whole clips
    resized_to: tuple[int, int] | None
    stride: int
    resize: str
    fps: float | None

    @property
    def origin(self) -> str:
        return f"the data set's prepared latents ({self.folder}/)"

    def of(self, spec: Folder) -> Folder:
        """The clips as they were encoded, the first window of each."""
        windows: dict[str, Any] = {"sequence_interval": self.stride, "video_size": self.resized_to, "resize": self.resize}
        windows |= {"num_frames": None if self.is_whole else self.num_frames, "start_frame_interval": FIRST_WINDOW_ONLY}
        return replace(spec, text=None, negative=None, **windows)


def prepared_window(place: Layout, codec: Codec | None) -> Prepared | None:
    """The shape of the latents that `prepare latents` wrote, those of this codec if there are any; None without."""
    if place.form != "flat" or not place.root.is_dir():
        return None
    folders = [path for path in sorted(place.root.iterdir()) if not path.name.startswith(".") and has_packs(path)]
    packed = [packs for packs in map(open_packs, folders) if packs.made_from.get("part") == "videos"]
    ours = [packs for packs in packed if codec is not None and packs.made_from.get("codec") == codec.fingerprint]
    first = next(iter(ours or packed), None)
    return None if first is None else _prepared(first, codec)


def _prepared(packs: Packs, codec: Codec | None) -> Prepared:
    label, origin = packs.rows[0], packs.made_from
    size = packs.video_size()
    pixels: tuple[int, int] | None = None
    if isinstance(codec, Autoencoder) and origin.get("codec") == codec.fingerprint:
        channels, frames, height, width = packs.shapes[0]
        pixels = codec.form.pixels((channels, frames, height, width))[1:]
    return Prepared(
        packs.folder.name,
        int(label.facts["num_frames"]) if "num_frames" in label.facts else None,
        size or pixels,
        origin.get("num_frames") == "whole",
        size,
        int(label.facts.get("stride", 1)),
        "stretch" if size is None else origin.get("resize", "stretch"),
        label.facts.get("fps"),
    )


def _header(place: Layout) -> video.Header:
    return video.probe(next(iter(place.files(place.pixels()).values())))


def shot_of(
    sizes: Sizes,
    prepared: Prepared | None = None,
    header: video.Header | None = None,
    teacher: Shot | None = None,
    source: str = "the command",
) -> Shot:
    """Each number from the options, else from the latents, else from the clips, else as the teacher was published."""
    num = (
        sizes.num_frames
        or (prepared and prepared.num_frames)
        or (header and header.num_frames)
        or (teacher and teacher.num_frames)
    )
    size = (
        sizes.size or (prepared and prepared.size) or (header and header.size) or (teacher and (teacher.height, teacher.width))
    )
    fps = sizes.fps or (prepared and prepared.fps) or (header and header.fps) or (teacher and teacher.fps) or 24.0
    missing = [*(["--num-frames"] if not num else []), *(["--height", "--width"] if not size else [])]
    if missing:
        raise UserError(
            f"{source} has no clips and no latents, and the teacher does not say what clips it makes: give {', '.join(missing)}"
        )
    assert num and size
    return Shot(num, *size, float(fps))


def published_shot(address: str) -> Shot | None:
    """The size that the pipeline at `address` makes when it is not given one; None where it does not say."""
    import diffusers

    folder = folder_of(address)
    if folder is None:
        return None
    if (folder / CARD).is_file():
        envelope = StudentCard.read(folder, "Export it again").envelope
        sizes = (envelope.num_frames, envelope.height, envelope.width, envelope.fps)
    else:
        cls = getattr(diffusers, PipelineFolder(address).pipeline or "DiffusionPipeline", diffusers.DiffusionPipeline)
        defaults = {name: value.default for name, value in inspect.signature(cls.__call__).parameters.items()}
        sizes = tuple(defaults.get(name) for name in ("num_frames", "height", "width", "fps"))
    num, height, width, fps = sizes
    if not (isinstance(num, int) and isinstance(height, int) and isinstance(width, int)):
        return None
    return Shot(num, height, width, float(fps) if isinstance(fps, (int, float)) else 24.0)


# ---- a file of prompts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePrompts:
    """Prompts alone, one a line. Their embeddings wait in a hidden folder until their pairs are written."""

    path: Path
    stems: Sequence[str]
    captions: Sequence[str]
    shot: Shot
    origin: str
    negative: str | None  # the text that guidance pushes away from, zeros for none; None: no guidance
    waiting: Path  # folder of the embeddings
    encoder: str  # fingerprint
    max_tokens: int
    mask_text: bool

    def embed(self, encoder: TextEncoder, rows: Sequence[int]) -> int:
        """Embeds the prompts of these rows, and the negative; the encoder is not needed after that. Returns the most tokens."""
        texts = [self.captions[row] for row in rows] + ([] if self.negative in (None, ZEROS) else [str(self.negative)])
        for text in dict.fromkeys(texts):
            if not self._file(text).is_file():
                pooled = stored_pooled(encoder, text)
                tensors = {"text": stored_embedding(encoder, text)} | ({} if pooled is None else {"pooled": pooled})
                cache.write(self._file(text), tensors)
        return max(cache.read(self._file(text)).shapes["text"][0] for text in texts)

    def material(self, rows: Sequence[int]) -> Material:
        cond = condition_of([self._embedding(self.captions[row]) for row in rows], self.mask_text)
        cond = replace(cond, fps=torch.full((len(rows),), self.shot.fps))
        if self.negative is None:
            return Material(cond, None)
        first = self._embedding(self.captions[rows[0]])
        return Material(cond, negative_of(cond, first.zeros() if self.negative == ZEROS else self._embedding(self.negative)))

    def text(self, row: int) -> Mapping[str, Tensor]:
        return cache.read(self._file(self.captions[row])).tensors

    def negative_text(self) -> Mapping[str, Tensor] | None:
        """The embedding of the negative prompt, as `text`."""
        return None if self.negative in (None, ZEROS) else cache.read(self._file(str(self.negative))).tensors

    def controls(self, row: int, received: Mapping[str, np.ndarray]) -> Mapping[Part, Path | np.ndarray]:
        return {}

    def record(self) -> dict[str, Any]:
        return {
            "source": str(self.path),
            "encoder": self.encoder,
            "negative": self.negative,
            "max_tokens": self.max_tokens,
            "mask_text": self.mask_text,
            "control": None,
        }

    def _file(self, text: str) -> Path:
        return self.waiting / f"{hashlib.sha256(f'{self.encoder} {text}'.encode()).hexdigest()[:32]}.safetensors"

    def _embedding(self, text: str) -> Embedding:
        return embedding(self._file(text), self.max_tokens)


ZEROS = "zeros"  # the name of an embedding of zeros


def read_captions(path: Path) -> tuple[list[str], list[str]]:
    """Names and texts of a file of prompts: lines of text, or of json with "prompt" and optionally "name"."""
    rows = read_prompts(path)
    texts: list[str] = []
    names: list[str] = []
    for number, row in enumerate(rows):
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"--prompts {path}, row {number + 1}: has no text under 'prompt'")
        texts.append(text.strip())
        names.append(str(row.get("name", f"{number:06d}")))
    wrong = [name for name in names if Path(name).name != name or name.startswith(".")]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if wrong or twice:
        raise UserError(
            f"--prompts {path}: the name {(wrong or twice)[0]!r} " + ("is no file name" if wrong else "comes twice")
        )
    return names, texts


def hash_of(tensor: Tensor | None) -> str:
    """16 hex digits over the numbers of a tensor."""
    assert tensor is not None
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes()).hexdigest()[:16]


def frames_of(control: Mapping[str, Tensor], row: int) -> dict[str, np.ndarray]:
    """The frames uint8 T H W 3 of the controls of one clip."""
    return {name: to_uint8(pixels[row : row + 1].cpu(), name)[0] for name, pixels in control.items()}
