"""Computes the control signals of a data set's clips once: DIR/edge|vis|depth/*.mp4, DIR/seg|keypoint/*.pickle.

    edge, vis    from the frames, with a preset's numbers or random ones of each clip's own (fewstep/data/controls.py)
    depth        by a Depth-Anything model of transformers, or from arrays
    seg          from label maps, or from pickles
    keypoint     from arrays, or from pickles

Files that another program wrote are left as they are: the control of a pair must be the one that its teacher received.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fewstep.config import ConfigError, choices
from fewstep.data.controls import Edge, Pixels, Preset, Vis, seed_of
from fewstep.data.files import arrays, keypoints, masks, video
from fewstep.data.folder import layout
from fewstep.data.folder.encoding import hash_of
from fewstep.data.folder.layout import Layout
from fewstep.errors import UserError, some
from fewstep.files import write_bytes
from fewstep.prepare.latents import ahead_of
from fewstep.prepare.ledger import NAME, open_ledger
from fewstep.prepare.summary import Summary
from fewstep.progress import track
from fewstep.untrusted.text import ANY_SIZE, read_bytes

Type = Literal["edge", "vis", "depth", "seg", "keypoint"]
_SMALL = 256 * 256  # pixels; below, halved chroma costs more than the bytes of a lossless file


class Maker(Protocol):
    """Makes the file of one clip."""

    @property
    def type(self) -> Type: ...

    @property
    def made_from(self) -> Mapping[str, str]:
        """The settings and weights that decide its files, besides the bytes of `source`."""
        ...

    def source(self, stem: str, clip: Path) -> Path:
        """The file whose bytes decide what is made."""
        ...

    def work(self, stem: str, clip: Path) -> Any:
        """The work that may run beside that for other clips: decoding, filters."""
        ...

    def write(self, path: Path, work: Any) -> None:
        """Writes the file from the result of `work`, one clip at a time."""
        ...


def write(dataset_dir: str | Path, maker: Maker, ahead: int = 2) -> Summary:
    """Makes the control of every clip that has none, or whose clip changed. Clips that fail are named when the rest is done."""
    place = Layout.open(dataset_dir)
    part = layout.control(maker.type, choices("control")[maker.type].suffix)
    clips = place.files(layout.VIDEOS)
    if not clips:
        raise UserError(f"{place.root}: has no {place.pattern(layout.VIDEOS)} to make controls of")
    path = place.root / maker.type / NAME if place.form == "flat" else place.root / f"{NAME}.{maker.type}"
    new = foreign = 0
    failed: list[str] = []
    with open_ledger(path, maker.made_from, lambda stem: place.file(part, stem)) as ledger:

        def work(stem: str) -> tuple[str, str, Any]:
            try:
                content = hash_of(maker.source(stem, clips[stem]))
                state = ledger.state(stem, content)
                return state, content, maker.work(stem, clips[stem]) if state == "todo" else None
            except (ValueError, OSError) as error:
                return "failed", str(error), None

        everything = track(ahead_of(work, clips, ahead), len(clips), f"making {maker.type}")
        for stem, (state, content, result) in zip(clips, everything, strict=True):
            if state == "todo":
                try:
                    ledger.begin(stem, content)
                    maker.write(place.file(part, stem), result)
                    new += 1
                except ValueError as error:
                    state, content = "failed", str(error)
            foreign += state == "foreign"
            failed += [content] if state == "failed" else []
    if failed:
        raise UserError(f"{place.root}: {len(failed)} of {len(clips)} failed, the others are done: {some(failed, 3)}")
    return Summary(len(clips), new, foreign)


# ---- makers --------------------------------------------------------------------------------------------------------


class OfFrames:
    """Makes edge and vis from the frames."""

    def __init__(self, type: Literal["edge", "vis"], preset: Preset = "medium", quality: video.Quality | None = None):
        if preset not in get_args(Preset):
            raise ConfigError(f"there is no preset {preset!r}; one of {', '.join(get_args(Preset))}")
        self.type: Type = type
        self.control = Edge(preset) if type == "edge" else Vis(preset)
        self.quality: video.Quality | None = quality
        self.made_from = {"type": type, "preset": preset, "quality": str(quality or "by size")}

    def source(self, stem: str, clip: Path) -> Path:
        return clip

    def work(self, stem: str, clip: Path) -> tuple[Pixels, float]:
        source = video.read(clip)
        return self.control(source.frames, seed_of(stem)), source.fps

    def write(self, path: Path, work: tuple[Pixels, float]) -> None:
        frames, fps = work
        video.write(path, frames, fps, self.quality or best_quality(frames))


class OfDepthModel:
    """Depth by a Depth-Anything model: relative inverse depth, near is white, one range for the whole clip."""

    type: Type = "depth"

    def __init__(self, address: str, device: str = "cpu", at_once: int = 8, quality: video.Quality | None = None):
        from transformers import AutoModelForDepthEstimation

        from fewstep.networks.encoders.codecs import fingerprint_of
        from fewstep.networks.files.folders import load_transformer

        try:
            self.model: nn.Module = load_transformer(AutoModelForDepthEstimation, address).to(device)
        except UserError as error:
            raise UserError(f"no depth model of transformers: {error}") from error
        self.processor, self.device, self.at_once = _depth_processor(address), device, at_once
        self.quality: video.Quality | None = quality
        print_ = fingerprint_of(self.model, json.loads(self.processor.to_json_string()))
        self.made_from = {"type": "depth", "model": print_, "quality": str(quality or "by size")}

    def source(self, stem: str, clip: Path) -> Path:
        return clip

    def work(self, stem: str, clip: Path) -> video.Frames:
        return video.read(clip)

    def write(self, path: Path, work: video.Frames) -> None:
        frames = grey_of_inverse(self.inverse_depth(work.frames))
        video.write(path, frames, work.fps, self.quality or best_quality(frames))

    def inverse_depth(self, frames: Pixels) -> NDArray[np.float32]:
        """(T, H, W), relative, as the model gives it and enlarged to the size of the frames (bicubic, as upstream does)."""
        size, parts = frames.shape[1:3], list[NDArray[np.float32]]()
        for begin in range(0, len(frames), self.at_once):
            pictures = list(frames[begin : begin + self.at_once])
            pixels = self.processor(images=pictures, return_tensors="pt").pixel_values.to(self.device)
            with torch.inference_mode():
                depth = self.model(pixel_values=pixels).predicted_depth[:, None].float()
                whole = nn.functional.interpolate(depth, size=size, mode="bicubic", align_corners=False)
            parts.append(whole[:, 0].cpu().numpy())
        return np.concatenate(parts)


class OfFiles:
    """Depth, seg and keypoint from a folder with a file of the same stem for each clip.

    depth       .npy, .safetensors (T, H, W): inverse depth of any scale, or metres with `metric`; or an .mp4
    seg         .npy (T, H, W) of integers, 0 is nothing, or a .pickle in the layout of Transfer1
    keypoint    .npy (T, people, 133, 3) of x, y in 0..1 and score, or a .pickle in the layout of Transfer1
    """

    def __init__(self, type: Type, folder: Path, metric: bool = False, quality: video.Quality | None = None):
        if type not in _FROM:
            raise ConfigError(f"--from is for {', '.join(_FROM)}, not {type}: that is made from the frames")
        if not folder.is_dir():
            raise ConfigError(f"--from {folder}: no such folder")
        self.type: Type = type
        self.folder, self.metric = folder, metric
        self.quality: video.Quality | None = quality
        self.made_from = {"type": type, "from": "files", "metric": str(metric), "quality": str(quality or "by size")}

    def source(self, stem: str, clip: Path) -> Path:
        suffixes = _FROM[self.type]
        files = [self.folder / f"{stem}{suffix}" for suffix in suffixes if (self.folder / f"{stem}{suffix}").is_file()]
        if len(files) != 1:
            what = "no file" if not files else "more than one file"
            raise UserError(f"--from {self.folder}: has {what} for {stem}; wanted is one of {', '.join(suffixes)}")
        return files[0]

    def work(self, stem: str, clip: Path) -> Any:
        """The content to write, checked against its clip."""
        path, header = self.source(stem, clip), video.probe(clip)
        if path.suffix == ".mp4":
            own = video.probe(path)
            _refuse_other_length(path, own.num_frames, header)
            if own.size != header.size:
                raise UserError(f"{path}: is {own.height} x {own.width}, its clip {header.height} x {header.width}")
            return video.read(path)
        if path.suffix == ".pickle":
            self._refuse_other_pickle(path, header)
            return read_bytes(path, ANY_SIZE)
        array = arrays.read_one(path, self.type).numpy()
        _refuse_other_length(path, len(array), header)
        if self.type == "keypoint":
            if array.ndim != 4 or array.shape[2:] != (133, 3):
                raise UserError(f"{path}: has shape {array.shape}, where (frames, people, 133, 3) is wanted")
            return {t: [_person(body) for body in people] for t, people in enumerate(array)}
        if array.shape[1:] != header.size:
            raise UserError(f"{path}: has shape {array.shape}, its clip {(header.num_frames, *header.size)}")
        if self.type == "depth":
            return video.Frames(grey_of_inverse(_inverse(path, array, self.metric)), header.fps)
        if array.dtype.kind not in "iub":
            raise UserError(f"{path}: holds {array.dtype}; a label map has a whole number for each pixel, 0 for nothing")
        return [(f"object {label}", array == label) for label in np.unique(array) if label != 0]

    def write(self, path: Path, work: Any) -> None:
        if isinstance(work, video.Frames):
            video.write(path, work.frames, work.fps, self.quality or best_quality(work.frames))
        elif isinstance(work, bytes):
            write_bytes(path, work)
        elif self.type == "seg":
            masks.write(path, work)
        else:
            arrays.write_pickle(path, work)

    def _refuse_other_pickle(self, path: Path, header: video.Header) -> None:
        if self.type == "keypoint":
            keypoints.read(path, range(header.num_frames))
            return
        for mask in masks.read(path)[:1]:  # the others have its shape
            _refuse_other_length(path, mask.shape[0], header)


_FROM: dict[str, tuple[str, ...]] = {
    "depth": (".npy", ".safetensors", ".mp4"),
    "seg": (".npy", ".safetensors", ".pickle"),
    "keypoint": (".npy", ".safetensors", ".pickle"),
}


# ---- parts of the above --------------------------------------------------------------------------------------------


def best_quality(frames: Pixels) -> video.Quality:
    """Lossless for small frames and odd sizes; otherwise the quality that plays everywhere."""
    height, width = frames.shape[1:3]
    return "lossless" if height * width < _SMALL or height % 2 or width % 2 else 18


def grey_of_inverse(inverse: NDArray[np.floating]) -> Pixels:
    """(T, H, W) inverse depth to grey frames: the clip's nearest is 255, its farthest 0."""
    low, high = float(inverse.min()), float(inverse.max())
    grey = (inverse - low) * (255 / (high - low)) if high > low else np.zeros_like(inverse)
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)


def _inverse(path: Path, array: NDArray[Any], metric: bool) -> NDArray[np.float64]:
    values = array.astype(np.float64)
    if not np.isfinite(values).all() or (metric and (values <= 0).any()):
        raise UserError(f"{path}: depth must be finite{' and above 0, in metres' if metric else ''}. Fill its holes first")
    return 1 / values if metric else values


def _person(body: NDArray[Any]) -> dict[str, Any]:
    """A person in the layout of Transfer1, which holds the hands twice."""
    points = body.astype(np.float16)
    return {"body-keypoints": points, "hand-keypoints": points[91:]}


def _refuse_other_length(path: Path, num: int, header: video.Header) -> None:
    if num != header.num_frames:
        raise UserError(f"{path}: has {num} frames, its clip {header.num_frames}. Every frame needs its control")


def _depth_processor(address: str) -> Any:  # an image processor: they have no common type
    """Upstream's own preparation of pictures, in its variant without torchvision."""
    import transformers

    from fewstep.networks.files.folders import load_reader

    processor = getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor
    return load_reader(processor, address)
