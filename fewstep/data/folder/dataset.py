"""A folder of clips, or of pairs made by a teacher, as a data set. Names and formats: docs/formats.md.

    Folder("datasets/robots", num_frames=17, video_size=(704, 1280), text=None)      # windows of clips, as pixels
    Folder("datasets/kd", x0="latents", pairs=("noise",), control=Edge())            # the input of KD

`open()` checks everything that needs no decoding, for all samples at once and by name: files, frame counts, sizes, rates,
captions. It reads the first sample whole. Everything else is checked when it is read.

A pair is the whole clip that its noise belongs to, never a window of it. Its control is the file that the teacher received,
never one computed again: the edges of the teacher's output are not the edges that the output had to follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.data import order
from fewstep.data.contract import BadSamples
from fewstep.data.controls import Control, Pixels, Span, made_of, seed_of
from fewstep.data.files import video
from fewstep.data.files.sizes import Fit, fit, nearest_shape
from fewstep.data.folder import layout, parts
from fewstep.data.folder.encoding import Encoder
from fewstep.data.folder.layout import Layout
from fewstep.data.folder.parts import Embedding
from fewstep.data.folder.samples import Sample, buckets_of, captions_of, each, packs_of, refuse, samples_of
from fewstep.data.folder.settings import FolderSettings
from fewstep.data.folder.texts import negative_of
from fewstep.errors import UserError
from fewstep.untrusted.text import read_json


@kind("folder", group="data")
@dataclass(frozen=True)
class Folder(FolderSettings):
    """Clips with their captions, controls and pairs, in the folder layout of Cosmos-Transfer1."""

    def open(self) -> FolderData:
        return FolderData(self)


class FolderData:
    """The samples of a `Folder`, checked. `stems` and `captions` have one entry per sample, as `batch` counts them."""

    def __init__(self, spec: Folder, place: Layout | None = None, samples: tuple[Sample, ...] | None = None):
        """samples: those of shards, which are checked already."""
        self.spec = spec
        self.layout = place or Layout.open(spec.dataset_dir)
        self.packs = {} if samples is not None else packs_of(spec, self.layout)
        self.left_out: dict[str, str] = {}  # samples whose clip cannot be opened, and why; data.max_bad of them at the most
        self.samples = samples_of(spec, self.layout, self.packs, self.left_out) if samples is None else samples
        self._bucket = buckets_of(spec, self.samples)
        self._members = [(self._bucket == bucket).nonzero()[:, 0] for bucket in self._bucket.unique().tolist()]
        self._encoder = Encoder(spec) if spec.x0 == "encode" else None
        self._path_times = spec.path_times or (_recorded_times(self.layout.root) if "path" in spec.pairs else ())
        self._negative = self._read_negative()
        self._like, self._first = self._read_first()
        self._memory = _Memory(self._first, len(self.samples), spec.ram_gib if len(self._members) == 1 else 0.0)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def max_bad(self) -> int:
        return self.spec.max_bad

    @property
    def block(self) -> int:
        """Samples of one bucket come in blocks of this many; 0: all samples are of one size."""
        return self.spec.bucket_block if len(self._members) > 1 else 0

    def samples_at(self, position: Tensor, seed: int) -> Tensor:
        """The sample for each position: blocks of one bucket each, and in each bucket every sample once per epoch of it."""
        if not self.block:
            return order.samples_at(position, len(self), seed)
        blocks = tuple(-(-len(members) // self.block) for members in self._members)
        bucket, place = order.interleaved(position, blocks, self.block, seed)
        out = torch.empty_like(position)
        for number, members in enumerate(self._members):
            here = bucket == number
            if bool(here.any()):
                own = order.samples_at(place[here], len(members), seed * len(blocks) + number)
                out[here] = members[own]
        return out

    @property
    def stems(self) -> list[str]:
        """The name of each sample's files; a clip with several windows is repeated."""
        return [sample.stem for sample in self.samples]

    @property
    def codec(self) -> str | None:
        packs = self.packs.get(self.spec.latents) if self.spec.x0 == "latents" else None
        return None if packs is None else packs.made_from.get("codec")

    def captions(self) -> list[str]:
        """The caption of each sample, from metas/*.txt or */prompt.txt; refuses missing and empty ones."""
        stems = list(dict.fromkeys(self.stems))
        problem = self.layout.missing(layout.CAPTIONS, stems)
        if problem:
            raise UserError(f"{self.layout.root}: {problem}")
        texts, problems = captions_of(self.layout, stems)
        refuse(self.layout, problems)
        return [texts[sample.stem] for sample in self.samples]

    def batch(self, index: Tensor) -> Batch:
        rows = index.tolist()
        todo = [row for row in dict.fromkeys(rows) if not self._memory.has(row)]
        buckets = self._bucket[index].unique().tolist() if rows else []
        if len(buckets) > 1:
            raise UserError(
                f"{self.layout.root}: samples of {len(buckets)} buckets cannot be in one batch. Set data.bucket_block to "
                "trainer.batch_size or a multiple of it"
            )
        read, bad = dict[int, dict[str, Tensor]](), dict[int, str]()
        for row, result in zip(todo, each(self._record_or_error, todo, self.spec.num_threads), strict=True):
            if isinstance(result, str):
                bad |= {place: result for place, other in enumerate(rows) if other == row}
            else:
                read[row] = result
        if bad:
            raise BadSamples(bad)
        columns = self._memory.stacked(rows, read)
        cond = Condition(
            text=_optional(columns.get("text"), torch.Tensor.float),
            text_mask=columns.get("text_mask") if self.spec.mask_text else None,
            pooled=_optional(columns.get("pooled"), torch.Tensor.float),
            control={} if self.spec.control is None else {self.spec.control.folder: _floats(columns["control"])},
            fps=columns.get("fps"),
            padding=columns.get("padding"),
        )
        negative = None
        if self._negative is not None:
            negative = negative_of(cond, self._negative)
        return Batch(
            x0=_floats(columns["x0"]),
            noise=columns.get("noise"),
            path=columns.get("path"),
            path_times=columns.get("path_times"),
            cond=cond,
            negative=negative,
            index=index.clone(),
        )

    # ---- one sample ------------------------------------------------------------------------------------------------

    def _record_or_error(self, row: int) -> dict[str, Tensor] | str:
        """A sample, or the error of reading it: damage, and files that were removed."""
        try:
            return self._checked(row)
        except (ValueError, OSError) as error:
            return str(error)

    def _read_first(self) -> tuple[str, dict[str, Tensor]]:
        """The name and content of the first sample that can be read. Raises UserError if the first max_bad + 1 cannot."""
        wrong: list[str] = []
        for sample in self.samples[: self.spec.max_bad + 1]:
            try:
                return sample.stem, self._read(sample)
            except (ValueError, OSError) as error:
                if not self.spec.max_bad:
                    raise
                wrong.append(str(error))
        raise UserError(f"{self.layout.root}: the first {len(wrong)} samples cannot be read:\n" + "\n".join(wrong[:5]))

    def _checked(self, row: int) -> dict[str, Tensor]:
        """A sample of the same shapes as the first one; otherwise they could not be in one batch."""
        sample = self.samples[row]
        record = self._read(sample)
        for name, first in self._first.items():
            tensor = record.get(name)
            # Sizes follow from the bucket; what else could differ is the number of frames.
            num = 1 if self._encoder is None else 2  # T of T H W 3, or C T of C T H W
            axes = {"x0": num, "control": num, "padding": 0}.get(name) if self.block else None
            if tensor is None or tensor.shape[:axes] != first.shape[:axes]:
                state = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise UserError(
                    f"{self.layout.root}: '{name}' of {sample.stem} {state}, but {tuple(first.shape)} in "
                    f"{self._like}. Samples of one data set have the same shapes: remove this one or prepare it again"
                )
        return record

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        """The tensors of a sample as they are stored: uint8 T H W 3, or latents C T H W in their own precision."""
        spec, record = self.spec, dict[str, Tensor]()
        if spec.x0 == "latents":
            record["x0"], fps = self._latents(sample, spec.latents)
            record |= {} if fps is None else {"fps": torch.tensor(float(fps))}
            record |= self._padding_of_latents(sample)
            if spec.control is not None:
                record["control"] = self._control_latents(sample, spec.control, record["x0"])
        else:
            assert sample.header is not None, sample
            record |= self._pixels_record(sample) if self._encoder is None else self._latents_record(sample, self._encoder)
            rate = sample.header.fps / sample.span.stride
            record |= {"fps": torch.tensor(rate)} if rate else {}
            record |= {"padding": torch.from_numpy(self._fit(sample).padding())} if spec.resize == "pad" else {}
        if spec.text is not None:
            embedding = self._embedding(sample)
            record |= {"text": embedding.text, "text_mask": embedding.mask}
            record |= {} if embedding.pooled is None else {"pooled": embedding.pooled}
        like = {"frames" if spec.x0 == "pixels" else "latents": record["x0"]}
        if "noise" in spec.pairs:
            record["noise"] = parts.noise(sample.files["noise"])
            parts.refuse_foreign_noise(sample.files["noise"], record["noise"], **like)
        if "path" in spec.pairs:
            record["path"], record["path_times"] = parts.states(sample.files["path"], self._path_times)
            parts.refuse_foreign_noise(sample.files["path"], record["path"][0], **like)  # the first state is nearly noise
        return record

    def _latents(self, sample: Sample, folder: str) -> tuple[Tensor, float | None]:
        """Latents and the fps of their clip, from a pack or a file of their own."""
        if folder in self.packs:
            packs, row = self.packs[folder], sample.rows[folder]
            return parts.checked_latents(packs.folder / sample.stem, packs.read(row)), packs.rows[row].facts.get("fps")
        return parts.latents(sample.files[folder]), parts.fact(sample.files[folder], "fps")

    def _embedding(self, sample: Sample) -> Embedding:
        folder = self.spec.text
        assert folder is not None
        if folder in self.packs:
            packs = self.packs[folder]
            return parts.padded(packs.folder / sample.stem, packs.read(sample.rows[folder]), self.spec.max_tokens)
        return parts.embedding(sample.files[folder], self.spec.max_tokens)

    def _padding_of_latents(self, sample: Sample) -> dict[str, Tensor]:
        """The margins of a clip that was padded before it was encoded."""
        packs = self.packs.get(self.spec.latents)
        if packs is None or packs.made_from.get("resize") != "pad":
            return {}
        facts = packs.rows[sample.rows[self.spec.latents]].facts
        own = int(facts.get("height", 0)), int(facts.get("width", 0))
        video.refuse_size(packs.folder / sample.stem, *own)
        fitted = fit(own, packs.video_size(), "pad")
        return {"padding": torch.from_numpy(fitted.padding())}

    def _pixels_record(self, sample: Sample) -> dict[str, Tensor]:
        frames = self._frames(sample)
        return {"x0": frames} | ({} if self.spec.control is None else {"control": self._control_frames(sample, lambda: frames)})

    def _latents_record(self, sample: Sample, encoder: Encoder) -> dict[str, Tensor]:
        """The latents of a clip and of its control; the clip is decoded once, and not at all if both are cached."""
        spec, clip = self.spec, sample.files["videos"]
        frames = lru_cache(maxsize=1)(lambda: self._frames(sample))
        record = {"x0": encoder.latents(sample, "videos", clip, lambda: _floats(frames()[None]))}
        if spec.control is not None:
            name, is_made = spec.control.folder, spec.control_from == "video"
            source = clip if is_made else sample.files[name]
            made_by = spec.control if is_made or source.suffix != ".mp4" else None  # which draws by its own settings

            def signal() -> Tensor:
                return _floats(self._control_frames(sample, frames)[None])

            record["control"] = encoder.latents(sample, name, source, signal, made_by)
        return record

    def _frames(self, sample: Sample) -> Tensor:
        """uint8 T H W 3."""
        fitted = self._fit(sample)
        return _tensor(fitted(video.read(sample.files["videos"], *_of(sample.span), size=fitted.scaled).frames))

    def _control_frames(self, sample: Sample, frames: Callable[[], Tensor]) -> Tensor:
        """uint8 T H W 3: made from the clip's frames, or from the control's own file."""
        spec = self.spec
        assert spec.control is not None
        if spec.control_from == "video":
            return _tensor(made_of(spec.control, frames().numpy(), seed_of(sample.stem, sample.span.start)))
        fitted = self._fit(sample)
        path = sample.files[spec.control.folder]
        signal = spec.control.read(path, sample.span, fitted.scaled)
        assert signal.shape == (sample.span.count, *fitted.scaled, 3), (path, signal.shape)
        return _tensor(fitted(signal))

    def _control_latents(self, sample: Sample, control: Control, x0: Tensor) -> Tensor:
        folder = layout.control_latents(control.folder, self.spec.latents).folder
        latents, _ = self._latents(sample, folder)
        if latents.shape[1:] != x0.shape[1:]:
            raise UserError(
                f"{self.layout.root / folder / sample.stem}: is {tuple(latents.shape)}, which does not fit its clip "
                f"{tuple(x0.shape)}. Encode it again"
            )
        return latents

    def _fit(self, sample: Sample) -> Fit:
        assert sample.header is not None, sample
        spec, own = self.spec, sample.header.size
        return fit(own, spec.buckets[nearest_shape(own, spec.buckets)] if spec.buckets else spec.video_size, spec.resize)

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        """A file of the data set that belongs to no sample."""
        yield self.layout.root / name

    def _read_negative(self) -> Embedding | None:
        spec = self.spec
        if spec.negative is None:
            return None
        like = self._embedding(self.samples[0])
        if spec.negative == "zeros":
            return like.zeros()
        try:
            with self._file(spec.negative) as path:
                return parts.negative_embedding(path, like, str(spec.text))
        except FileNotFoundError:
            raise UserError(
                f"{self.layout.root}: has no {spec.negative}, the text that guidance pushes away from. Make it with: fewstep "
                "prepare text --negative-prompt TEXT (the empty text is usual), or set data.negative=zeros"
            ) from None


class _Memory:
    """Samples that were read once, if there is room for all of them; else nothing."""

    def __init__(self, first: Mapping[str, Tensor], num: int, gib: float):
        needed = num * sum(tensor.nbytes for tensor in first.values())
        # torch.empty takes no memory until it is written: it grows with what is read.
        fits = needed <= gib * 2**30
        self._columns = {n: torch.empty((num, *t.shape), dtype=t.dtype) for n, t in first.items()} if fits else None
        self._there = torch.zeros(num, dtype=torch.bool)

    def has(self, row: int) -> bool:
        return bool(self._there[row])

    def stacked(self, rows: Sequence[int], read: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The columns of `rows`, those in `read` among them, which are kept from now on if there is room."""
        if self._columns is None:
            names = next(iter(read.values())).keys()
            return {name: torch.stack([read[row][name] for row in rows]) for name in names}
        for row, record in read.items():
            for name, column in self._columns.items():
                column[row] = record[name]
            self._there[row] = True
        index = torch.tensor(rows)
        return {name: column[index] for name, column in self._columns.items()}


def _recorded_times(root: Path) -> tuple[float, ...]:
    """The times of the states that `fewstep pairs` wrote; FastGen's files have none themselves."""
    record = root / "pairs.json"
    return tuple(read_json(record, "Make the pairs again", _Pairs).path_times or ()) if record.is_file() else ()


@dataclass(frozen=True)
class _Pairs:
    """What is read of pairs.json."""

    path_times: list[float] | None = None


def _of(span: Span) -> tuple[int, int, int]:
    return span.start, span.count, span.stride


def _tensor(frames: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames))


def _floats(column: Tensor) -> Tensor:
    """float32, B C T H W: pixels in -1..1, latents as they are."""
    if column.dtype != torch.uint8:
        return column.float()
    return column.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _optional(value: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if value is None else change(value)
