"""The clips of an evaluation: made by a model or a codec when they are asked for, or read from files.

Clips of a model start from noise that depends on the set and on the number of the prompt alone: every model is given the same
noise, and neither the size of a batch nor the number of processes changes a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Batch, first_frames
from fewstep.config import choices
from fewstep.data.controls import Span
from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.dataset import Folder, FolderData
from fewstep.data.folder.layout import CAPTIONS, VIDEOS, Layout
from fewstep.data.folder.samples import read_caption
from fewstep.diffusion import Rng
from fewstep.diffusion.sampling import Sampler
from fewstep.errors import UserError
from fewstep.evaluation.clips import Files, clip_files
from fewstep.evaluation.features.contract import resized
from fewstep.evaluation.measured import Divisible
from fewstep.evaluation.score import Clip, ClipSet, Signals
from fewstep.inference.evaluation import Evaluation, is_data_set
from fewstep.inference.model import Model
from fewstep.networks.contract import Network
from fewstep.networks.encoders.codecs import Codec, to_uint8

SEEDS = 1000  # noise of evaluation set k has seed SEEDS + k: never that of training or of pairs
_KEPT = 2 << 30  # bytes of a set's generated clips that stay in memory; beyond, they are generated again if asked for again


@dataclass(frozen=True)
class Source:
    """A model with all that its clips are made of."""

    model: Model
    sampler: Sampler
    codec: Codec
    data: FolderData
    controls: Mapping[str, FolderData] = field(default_factory=dict[str, FolderData])  # that the model receives, by name

    @property
    def network(self) -> Network:
        """The model's network, whose branches without a control count nothing."""
        network = self.model.network
        if set(self.controls) == set(network.traits.controls):
            return network
        return network.with_control_weights(dict.fromkeys(self.controls, 1.0))

    def batch(self, rows: Tensor) -> Batch:
        """Samples of the data set, with every control that the network reads: black for one that it does not receive."""
        batch = self.data.batch(rows)
        control = {name: data.batch(rows).cond.control[name] for name, data in self.controls.items()}
        if control:
            black = torch.full_like(next(iter(control.values())), -1.0)
            control = {name: control.get(name, black) for name in self.model.network.traits.controls}
        return replace(batch, cond=replace(batch.cond, control=control))

    def clips(self, task: Evaluation, num: int, number: int) -> ClipSet:
        """The first `num` clips of evaluation set `number`, generated when they are asked for."""
        max_bytes = 0 if all(isinstance(scorer, Divisible) for scorer in task.scorers) else _KEPT
        samples = set_of(Made(self._maker(task, number), num, _batch(task), max_bytes), self.data, task)
        return replace(samples, num_given=self._num_given(task))

    def _num_given(self, task: Evaluation) -> int:
        """Frames that the given latent frames become."""
        if not task.given_frames:
            return 0
        pixels = self.data.batch(torch.tensor([0])).x0
        assert pixels is not None
        num = pixels.shape[2]
        factor = max(1, round((num - 1) / max(1, self.codec.shape(*pixels.shape[2:])[1] - 1)))
        return min(num, 1 + (task.given_frames - 1) * factor)

    def generated(self, task: Evaluation, num: int, number: int) -> np.ndarray:
        """The same, all in memory."""
        make = self._maker(task, number)
        return np.concatenate([make(rows) for rows in torch.arange(num).split(_batch(task))])

    def _maker(self, task: Evaluation, number: int) -> Callable[[Tensor], np.ndarray]:
        """What generates rows of evaluation set `number`."""
        network, codec, device = self.network, self.codec, task.where

        @torch.no_grad()
        def make(rows: Tensor) -> np.ndarray:
            batch, rng = self.batch(rows).to(device), Rng(SEEDS + number, 0, rows, device)
            assert batch.x0 is not None
            num = batch.x0.shape[2] if task.num_frames is None else task.num_frames  # more than those of the data set's clips
            noise = rng.normal(codec.shape(num, *batch.x0.shape[3:]))
            control = {name: codec.encode(frames) for name, frames in batch.cond.control.items()}
            cond = replace(batch.cond, control=control)
            if task.given_frames:
                mask = first_frames(torch.full((len(rows),), task.given_frames, device=device), noise.shape[2]).to(noise.dtype)
                cond = network.given(cond, codec.encode(batch.x0), mask)
            negative = (
                None if batch.negative is None else replace(cond, text=batch.negative.text, text_mask=batch.negative.text_mask)
            )
            return to_uint8(codec.decode(self.sampler(network, noise, cond, rng, negative)), task.what)

        return make


class Made(Sequence[Clip]):
    """Clips that are generated, a batch at a time, when they are asked for; as many stay in memory as fit into `max_bytes`."""

    def __init__(self, make: Callable[[Tensor], np.ndarray], num: int, batch_size: int, max_bytes: int = _KEPT) -> None:
        self._make, self._num, self._batch_size, self._max_bytes = make, num, batch_size, max_bytes
        self._batches: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, place: Any) -> Any:  # Any: a number or a slice
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(self._num))]
        if not 0 <= place < self._num:
            raise IndexError(place)
        number, row = divmod(place, self._batch_size)
        if number not in self._batches:
            first = number * self._batch_size
            batch = self._make(torch.arange(first, min(first + self._batch_size, self._num)))
            if sum(other.nbytes for other in self._batches.values()) + batch.nbytes > self._max_bytes:
                self._batches.clear()
            self._batches[number] = batch
        return self._batches[number][row]


def opened(task: Evaluation, *, reads_frames: bool = False, control: str | None = None) -> FolderData:
    """The data set of the prompts: the first `num_frames` frames of each clip, at the size of the task. Where a model makes
    longer clips from text alone, nothing but the size of its own matters.

    reads_frames: whether the model receives controls. control: one that is read from the data set.
    """
    folder = task.prompts_folder
    header = video.probe(next(iter(task.files().values())))
    needs_frames = reads_frames or task.given_frames > 0 or task.what.startswith("codec:")
    is_whole = task.num_frames in (None, header.num_frames) or (task.num_frames > header.num_frames and not needs_frames)
    data = Folder(
        str(folder),
        text=task.text,
        max_tokens=task.max_tokens,
        mask_text=task.mask_text,
        negative=task.negative,
        control=None if control is None else control_kinds((control,))[control](),
        num_frames=None if is_whole else task.num_frames,
        start_frame_interval=1 if is_whole else 1 << 30,  # one window of each clip
        video_size=None if task.size in (None, header.size) else task.size,
    ).open()
    if len(data) < task.per_set:
        raise UserError(f"--num {task.num}: {task.prompts} has {len(data)} prompts")
    return data


def through(codec: Codec, data: FolderData, task: Evaluation) -> ClipSet:
    """The real clips of the prompts, encoded and decoded."""

    @torch.no_grad()
    def make(rows: Tensor) -> np.ndarray:
        pixels = data.batch(rows).x0
        assert pixels is not None
        return to_uint8(codec.decode(codec.encode(pixels.to(task.where))), task.what)

    return set_of(Made(make, task.per_set, _batch(task)), data, task, data.layout)


def set_of(clips: Sequence[Clip], data: FolderData, task: Evaluation, truth: Layout | None = None) -> ClipSet:
    """Clips that were made for the first samples of the data set."""
    stems = data.stems[: len(clips)]
    files = {} if truth is None else clip_files(truth.root)
    files = files if task.truth is None else clip_files(task.truth)
    own = data.layout.files(VIDEOS)
    fps = data.batch(torch.tensor([0])).cond.fps
    return ClipSet(
        clips,
        stems,
        data.captions()[: len(clips)],
        _signals(stems, data.layout, None, task.controls),
        _truth(stems, files, task),
        [own.get(stem) for stem in stems],
        None if fps is None else round(float(fps[0]), 3),
    )


def _truth(stems: Sequence[str], files: Mapping[str, Path], task: Evaluation) -> list[Path | None]:
    """The clip that each one should equal; refuses a folder that has none of them."""
    found = [files.get(stem) for stem in stems]
    if task.truth is not None and not any(found):
        raise UserError(f"--truth: {task.truth} has no clip named like those that are scored, {stems[0]} for instance")
    return found if any(found) else []


def sets_of(task: Evaluation, needs_captions: bool) -> Iterator[ClipSet]:
    """The clips of the folder, `task.num` at a time, as many whole sets as there are, up to `task.sets`.

    Captions are the folder's own, or those of --prompts by file name. So are the controls that the clips were conditioned on.
    Given latent frames count as four frames each, after the first.
    """
    folder, files = Path(task.what), clip_files(task.what)
    own = Layout.open(folder) if is_data_set(folder) else None
    theirs = own if task.prompts is None else Layout.open(task.prompts)
    captions = {} if own is None else own.files(CAPTIONS)
    captions = captions or ({} if theirs is None else theirs.files(CAPTIONS))
    if len(files) < task.per_set or (needs_captions and not set(captions) >= set(files)):
        raise UserError(f"{folder}: has {len(files)} clips and {len(captions)} captions; a set needs {task.num} of both")
    truth = {} if task.truth is None else clip_files(task.truth)
    sources = {} if task.prompts is None or theirs is None else theirs.files(VIDEOS)
    stems = list(files)
    for k in range(min(task.sets, len(files) // task.per_set)):
        part = stems[k * task.per_set : (k + 1) * task.per_set]
        prompts = [read_caption(captions[stem]) if stem in captions else "" for stem in part]
        controls = {} if theirs is None else _signals(part, theirs, own if theirs != own else None, task.controls)
        clips = Files([files[stem] for stem in part], task.num_frames)
        fps = round(video.probe(files[part[0]]).fps, 3) or None
        real = [sources.get(stem) for stem in part]
        yield ClipSet(
            clips, part, prompts, controls, _truth(part, truth, task), real, fps,
            num_given=1 + 4 * (task.given_frames - 1) if task.given_frames else 0,
        )  # fmt: skip


def _signals(stems: Sequence[str], conditioned: Layout, measured: Layout | None, names: Sequence[str]) -> dict[str, Signals]:
    """The control files of these clips, of the named controls or of all that the data set has."""
    found: dict[str, Signals] = {}
    for name, cls in control_kinds(names).items():
        part = layout.control(cls.folder, cls.suffix)
        theirs = conditioned.files(part)
        own = {} if measured is None else measured.files(part)
        if theirs.keys() & set(stems):
            found[name] = Signals(cls(), [theirs.get(stem) for stem in stems], [own.get(stem) for stem in stems])
    return found


def control_kinds(names: Sequence[str]) -> dict[str, Any]:
    kinds: dict[str, Any] = choices("control")
    for name in names:
        if name not in kinds:
            raise UserError(f"--control {name}: there are {', '.join(kinds)}")
    return {name: kinds[name] for name in names or kinds}


def keep(clip: Clip, row: int, samples: ClipSet, task: Evaluation, number: int) -> None:
    """Writes a clip to look at beside OUT: of the first set NN.mp4, its real clip and controls; of others two, NN.seedK.mp4."""
    folder, fps = task.out.with_suffix(""), samples.fps or 16.0
    if row >= (min(2, task.keep) if number else task.keep):
        return
    if number:
        video.write(folder / f"{row:02d}.seed{number}.mp4", clip, fps, quality="lossless")
        return
    video.write(folder / f"{row:02d}.mp4", clip, fps, quality="lossless")
    source = samples.sources[row] if samples.sources else None
    if source is not None and source.is_file():
        real = resized(video.read(source).frames[: len(clip)], *clip.shape[1:3])
        video.write(folder / f"{row:02d}.real.mp4", real, fps, quality="lossless")
    for name, signals in samples.controls.items():
        target = signals.conditioned[row]
        if target is not None and name in task.controls:
            signal = signals.control.read(target, Span(0, len(clip)), (clip.shape[1], clip.shape[2]))
            video.write(folder / f"{row:02d}.{name}.mp4", signal, fps, quality="lossless")


def _batch(task: Evaluation) -> int:
    assert task.batch_size is not None, "counted by `run`"
    return task.batch_size
