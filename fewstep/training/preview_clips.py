"""`preview=clips`: what the student makes of fixed prompts and noises while it trains, beside its teacher and the truth.

The recipes of students have it; a run without a codec to decode its clips says so and goes on without.

    RUN/previews/step_000000500.mp4     all clips of the preview in one film, a row for each sample
    RUN/previews/step_000000500.png     first, middle and last frames of the same; in TensorBoard, too
    RUN/previews/fixed.safetensors      the columns that never change, made once: teacher and truth

The columns are the student; the teacher with all its steps and guidance; the teacher with as many network calls as the student,
which shows what the distillation adds; and the data's own clips. Columns that a run does not have are left out: a run
without a teacher has two. All start from the same noise: that of the pair where the data has one.

    preview/teacher_mse    mean squared difference of the student's and the teacher's latents from the same noise
    preview/truth_mse      of the student's and the data's latents, where the data holds the noise of its clips
    preview/motion, flicker, sharpness        of the student's clips, each with .._truth beside it

With `data` these are held-out samples, and the two errors are held-out losses. Clips are decoded and shrunk one at a time, so
that memory does not grow with their number. A preview that would make all previews together take more than `max_share` of the
run's time is left out; the first and the last are always made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import kind
from fewstep.data.contract import AnyData
from fewstep.data.files import video
from fewstep.data.loader import first_batch
from fewstep.diffusion import Rng, Sampler, TeacherSampler
from fewstep.evaluation import pixels
from fewstep.evaluation.features.contract import resized
from fewstep.files import write_bytes, write_tensors
from fewstep.inference.model import teacher_sampler
from fewstep.networks.encoders.codecs import Codec, codec_beside, to_uint8
from fewstep.training.preview import Scene
from fewstep.untrusted.safe_tensors import read_safetensors

Film = NDArray[np.uint8]  # T H W 3
_LEAST, _MOST = 64, 256  # pixels of the long side of a clip in a preview
_BAND = 14  # pixels above each column, for its name
STUDENT, TRUTH = "student", "truth"


@kind("clips", group="preview")
@dataclass(frozen=True)
class ClipsPreview:
    """Clips of fixed prompts and noises: student, teacher and truth, as a film, a sheet of frames and numbers."""

    num: int = 4  # clips
    every: int | None = 500  # iterations; none: only the first and the last
    data: AnyData | None = None  # held-out samples; none: the first ones of the training data
    codec: str | None = None  # folder or hub id of the autoencoder; none: the one beside the pipeline that the run starts from
    seed: int = 4321
    max_share: float = 0.05  # of the run's time that previews may take

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.num < 1:
            yield "num", f"must be at least 1, not {self.num}"
        if self.every is not None and self.every < 1:
            yield "every", f"must be at least 1, or none for the first and the last only, not {self.every}"
        if not 0 < self.max_share <= 1:
            yield "max_share", f"is a share of the run's time, above 0 and at most 1, not {self.max_share}"

    def show(self, scene: Scene) -> Mapping[str, float]:
        batch = first_batch(scene.data if self.data is None else self.data.open(), self.num)
        if batch.x0 is None or batch.x0.ndim != 5:
            return {}  # no clips: points, or data without answers
        codec = codec_beside(self.codec or scene.base, scene.latent_scale)
        if codec is None and batch.x0.shape[1] != 3:
            if scene.step == 0:
                beside = f" beside {scene.base}" if scene.base else ""
                scene.say(f"no previews: there is no codec{beside} to decode clips. Set preview.codec=FOLDER, or preview=none")
            return {}
        noise = batch.noise if batch.noise is not None else self._rng(batch, "cpu").normal(batch.x0.shape[1:])
        decode = Decoder(None if batch.x0.shape[1] == 3 else codec)
        fixed = self._fixed(scene, batch, noise, decode)
        latents = torch.cat([self._sample(scene.student, scene.sampler, scene, batch, noise, n) for n in range(len(noise))])
        films = {STUDENT: [decode(one) for one in latents.split(1)], **fixed.films}
        numbers = _numbers(latents, batch, fixed, films)
        if scene.is_main:
            self._write(scene, films)
        return {f"preview/{name}": value for name, value in numbers.items()}

    def _rng(self, batch: Batch, device: torch.device | str) -> Rng:
        return Rng(self.seed, 0, torch.arange(batch.size()), device)

    def _sample(self, network: Any, sampler: Sampler, scene: Scene, batch: Batch, noise: Tensor, row: int) -> Tensor:
        """The latents of one clip, on the CPU."""
        rows = torch.tensor([row])
        one = batch.rows(rows).to(scene.device)
        negative = one.negative if getattr(sampler, "guidance", 1.0) != 1.0 else None
        rng = Rng(self.seed, 1, rows, scene.device)
        return sampler(network, noise[row : row + 1].to(scene.device), one.cond or Condition(), rng, negative).float().cpu()

    def _fixed(self, scene: Scene, batch: Batch, noise: Tensor, decode: Decoder) -> Fixed:
        """The columns that never change, made by the first preview of a run and read by the others."""
        path = scene.folder / "fixed.safetensors"
        fixed = Fixed.read(path, self.seed, len(noise)) if path.is_file() else None
        if scene.agree(fixed is None):  # a sharded teacher needs every process
            fixed = self._make_fixed(scene, batch, noise, decode)
            if scene.is_main:
                fixed.write(path, self.seed)
        assert fixed is not None
        return fixed

    def _make_fixed(self, scene: Scene, batch: Batch, noise: Tensor, decode: Decoder) -> Fixed:
        assert batch.x0 is not None
        films: dict[str, list[Film]] = {}
        latents: Tensor | None = None
        for name, sampler in _of_teacher(scene, batch):
            solved = torch.cat([self._sample(scene.teacher, sampler, scene, batch, noise, n) for n in range(len(noise))])
            latents = solved if latents is None else latents  # of the first, with all its steps
            films[name] = [decode(one) for one in solved.split(1)]
        films[TRUTH] = [decode(one) for one in batch.x0.float().split(1)]
        return Fixed(films, latents)

    def _write(self, scene: Scene, films: Mapping[str, list[Film]]) -> None:
        film = grid(films)
        path = scene.folder / f"step_{scene.step:09d}.mp4"
        video.write(path, film, scene.fps or 16.0, quality=20)
        picture = sheet(films)
        import cv2

        write_bytes(path.with_suffix(".png"), cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
        scene.picture("preview/clips", picture)


def _of_teacher(scene: Scene, batch: Batch) -> list[tuple[str, TeacherSampler]]:
    """The ways in which the teacher is sampled: with all its steps, and with the calls of the student. None: no column."""
    if scene.teacher is None:
        return []
    guidance = scene.guidance if batch.negative is not None else 1.0
    network: Any = scene.teacher  # a Network: Scene promises a Denoiser only
    full = replace(teacher_sampler(network, scene.base), guidance=guidance)
    steps = max(1, scene.sampler.num_calls - (full.grid == "karras"))
    few = replace(full, num_steps=steps, guidance=1.0, solver="euler" if steps == 1 else full.solver)
    return [(f"teacher, {_calls(way)}", way) for way in (full, few)]


def _calls(sampler: Sampler) -> str:
    return f"{sampler.num_calls} call" + "s" * (sampler.num_calls != 1)


# ---- columns that never change ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """Films by column, and the teacher's latents from the same noise."""

    films: Mapping[str, list[Film]]
    latents: Tensor | None

    def write(self, path: Any, seed: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, column in self.films.items():
            tensors |= {f"{name}/{n}": torch.from_numpy(np.ascontiguousarray(film)) for n, film in enumerate(column)}
        if self.latents is not None:
            tensors["latents"] = self.latents
        write_tensors(path, tensors, {"seed": str(seed)})

    @classmethod
    def read(cls, path: Any, seed: int, num: int) -> Fixed | None:
        """None where the file is of another preview, or damaged."""
        films: dict[str, dict[int, Film]] = {}
        latents: Tensor | None = None
        try:
            tensors, metadata = read_safetensors(path, "")
            latents = tensors.pop("latents", None)
            for key, tensor in tensors.items():
                name, _, number = key.rpartition("/")
                films.setdefault(name, {})[int(number)] = tensor.numpy()
        except (OSError, ValueError):
            return None
        if metadata.get("seed") != str(seed):
            return None
        columns = {name: [rows[n] for n in sorted(rows)] for name, rows in films.items()}
        order = sorted(columns, key=lambda name: (name == TRUTH, -int(name.split()[1]) if name != TRUTH else 0))
        return cls({name: columns[name] for name in order}, latents) if all(len(c) == num for c in columns.values()) else None


# ---- pictures --------------------------------------------------------------------------------------------------------


class Decoder:
    """Latents (1, C, T, h, w), or pixels if there is no codec, to a film of a preview's size."""

    def __init__(self, codec: Codec | None) -> None:
        self._codec = codec

    def __call__(self, latents: Tensor) -> Film:
        if self._codec is not None:
            latents = self._codec.decode(latents).float().cpu()
        clip = to_uint8(latents.clamp(-1, 1), "preview")[0]
        long = max(clip.shape[1:3])
        if long < _LEAST:
            factor = math.ceil(_LEAST / long)
            return clip.repeat(factor, axis=1).repeat(factor, axis=2)
        scale = min(1.0, _MOST / long)
        return resized(clip, 2 * max(1, round(clip.shape[1] * scale / 2)), 2 * max(1, round(clip.shape[2] * scale / 2)))


def grid(films: Mapping[str, list[Film]]) -> Film:
    """All clips side by side, a row for each sample and a column for each model; shorter clips end on their last frame."""
    length = max(len(film) for column in films.values() for film in column)
    columns: list[Film] = []
    for name, column in films.items():
        width = column[0].shape[2]
        parts = [np.repeat(_band(name, width)[None], length, axis=0)]
        for film in column:
            frames = film[np.minimum(np.arange(length), len(film) - 1)]
            parts.append(np.pad(frames, ((0, 0), (2, 0), (0, 0), (0, 0))))
        columns.append(np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, 0), (2, 0), (0, 0))))
    whole = np.concatenate(columns, axis=2)
    return np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0)))


def sheet(films: Mapping[str, list[Film]]) -> Film:
    """The first, middle and last frame of every clip: a row for each sample, three pictures for each model."""
    triples = {
        name: [np.concatenate([film[n] for n in (0, len(film) // 2, len(film) - 1)], axis=1)[None] for film in column]
        for name, column in films.items()
    }
    return grid(triples)[0]


def _band(name: str, width: int) -> Film:
    import cv2

    band = np.full((_BAND, width, 3), 24, np.uint8)
    cv2.putText(band, name, (2, _BAND - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.32, (235, 235, 235), 1, cv2.LINE_AA)
    return band


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _numbers(latents: Tensor, batch: Batch, fixed: Fixed, films: Mapping[str, list[Film]]) -> dict[str, float]:
    out: dict[str, float] = {}
    if fixed.latents is not None:
        out["teacher_mse"] = float((latents - fixed.latents).square().mean())
    if batch.noise is not None and batch.x0 is not None:
        out["truth_mse"] = float((latents - batch.x0.float()).square().mean())
    for name in ("motion", "flicker", "sharpness"):
        for who, end in ((STUDENT, ""), (TRUTH, "_truth")):
            values = [pixels.in_time(film)[name] for film in films[who]]
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                out[name + end] = sum(finite) / len(finite)
    return out
