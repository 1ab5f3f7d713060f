"""The settings of a folder of clips: which samples there are, what each of them must have, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.data.controls import AnyControl
from fewstep.data.files.sizes import Resize


@dataclass(frozen=True)
class FolderSettings:
    """The fields of `Folder`, and the rules between them."""

    dataset_dir: str  # holds videos/ (or latents/), or a folder for each sample
    # pixels: B 3 T H W in -1..1; latents: what `fewstep prepare latents` made; encode: pixels, encoded by `codec` when read
    x0: Literal["pixels", "latents", "encode"] = "pixels"
    latents: str = "latents"  # of x0=latents: their folder; control latents are in CONTROL_FOLDER, edge_latents for instance
    codec: str | None = None  # of x0=encode: folder or hub id of an autoencoder, or of a pipeline that has one
    codec_scale: float = 1.0  # factor of the latents besides their normalisation; 0.5 for Cosmos 1
    codec_tile: int | None = None  # pixels along a tile, to save memory; not exact
    codec_cache: str | None = None  # folder that keeps what was encoded; none: memory alone (ram_gib)
    codec_device: str | None = None  # none: this process's GPU, or the CPU where there is none
    latent_dtype: Literal["float16", "bfloat16"] = "float16"  # in which encoded clips are kept
    num_frames: int | None = None  # of a window; none: whole clips, which must then be equally long
    sequence_interval: int = 1  # every k-th frame of the file
    start_frame_interval: int = 1  # frames between the starts of two windows
    video_size: tuple[int, int] | None = None  # height, width to resize to; none: as the files are
    resize: Resize = "stretch"  # Predict1 stretches; crop keeps the aspect and cuts the margins; pad keeps it and mirrors them
    buckets: tuple[tuple[int, int], ...] = ()  # sizes; a clip goes to the one nearest in shape. 720 of Transfer1: docs/data.md
    bucket_block: int = 8  # samples in a row of one bucket: trainer.batch_size or a multiple of it
    skip_short: bool = False  # leave out clips shorter than a window instead of refusing them
    control: AnyControl | None = None  # edge, vis, depth, seg or keypoint
    control_from: Literal["files", "video"] = "files"  # video: made from the frames when they are read (edge and vis)
    text: str | None = "t5_xxl"  # folder of text embeddings; none: no text
    mask_text: bool = (
        False  # mark padding tokens for the network. Cosmos, Wan and CogVideoX attend to padding; Qwen-Image does not
    )
    max_tokens: int = 512  # longer embeddings are cut, shorter ones padded with zeros (T5 of Cosmos 1)
    negative: str | None = None  # zeros (how Cosmos 1 drops text), or a file with an embedding, relative to dataset_dir
    pairs: tuple[Literal["noise", "path"], ...] = ()  # what of its teacher's work each sample must have
    path_times: tuple[float, ...] = ()  # times of the states, for files that do not say; FastGen: 0.999, 0.937, 0.833, 0.624
    max_bad: int = 0  # samples that cannot be read are left out, named and counted, up to this many; 0: the first ends the run
    ram_gib: float = 4.0  # samples stay in memory after their first read if all of them fit in this much
    num_threads: int = 1  # samples read at once

    @property
    def fields(self) -> frozenset[str]:
        pairs = {"path", "path_times"} if "path" in self.pairs else set[str]()
        return frozenset({"x0"} | pairs | ({"noise"} & set(self.pairs)) | ({"negative"} if self.negative else set[str]()))

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("sequence_interval", "start_frame_interval", "max_tokens", "num_threads"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, not {getattr(self, name)}"
        if self.num_frames is not None and self.num_frames < 1:
            yield "num_frames", f"must be at least 1, or none for whole clips, not {self.num_frames}"
        if self.video_size is not None and min(self.video_size) < 1:
            yield "video_size", f"must be (height, width) in pixels, not {self.video_size}"
        if self.max_bad < 0:
            yield "max_bad", f"must be at least 0, not {self.max_bad}"
        if self.buckets and self.video_size is not None:
            yield "buckets", "and video_size are two ways to say one thing: leave one out"
        if any(min(size) < 1 for size in self.buckets):
            yield "buckets", f"must be (height, width) in pixels each, not {self.buckets}"
        if self.bucket_block < 1:
            yield "bucket_block", f"must be at least 1, not {self.bucket_block}"
        elif not self.buckets and self.bucket_block != type(self).bucket_block:
            yield "warn:bucket_block", "has no effect without buckets"
        for name in ("text", "negative", "latents"):
            value = getattr(self, name)
            if value is not None and (".." in Path(value).parts or Path(value).is_absolute() or not value):
                yield name, f"must lie within dataset_dir, but is {value!r}"
        if self.negative and self.text is None:
            yield "negative", "needs the embeddings it is the negative of: set text, t5_xxl for instance"
        windows = ("sequence_interval", "start_frame_interval", "video_size", "skip_short", "buckets")
        changed = [name for name in windows if getattr(self, name) != getattr(type(self), name)]
        if self.x0 == "latents":
            yield from ((f"warn:{name}", "has no effect: latents are of whole clips, at their own size") for name in changed)
        elif self.x0 == "encode" and self.pairs:
            yield "x0", "is encode, but pairs have the latents that their noise became: set x0=latents"
        elif self.pairs:
            yield from (
                (name, "must be left alone with pairs: the noise belongs to the whole clip as it is") for name in changed
            )
        if self.x0 == "encode" and self.codec is None:
            yield "codec", "is none, but x0=encode needs one: the folder of an autoencoder, or of a pipeline that has one"
        for name in ("codec", "codec_scale", "codec_tile", "codec_cache", "codec_device", "latent_dtype"):
            if self.x0 != "encode" and getattr(self, name) != getattr(FolderSettings, name):
                yield f"warn:{name}", "has no effect: it is of x0=encode"
        if self.x0 != "latents" and self.latents != FolderSettings.latents:
            yield "warn:latents", "has no effect: it is of x0=latents"
        if self.path_times and "path" not in self.pairs:
            yield "warn:path_times", "has no effect: set pairs=[path] to read states"
        if list(self.path_times) != sorted(set(self.path_times), reverse=True):
            yield (
                "path_times",
                f"must descend, as the states lie on the way from noise to the clip, but is {list(self.path_times)}",
            )
        if self.control_from == "video":
            if self.control is None:
                yield "warn:control_from", "has no effect: set control, edge for instance"
            elif not callable(self.control):
                yield "control_from", f"is video, but {self.control.folder} cannot be made from frames: prepare its files"
            if self.x0 == "latents":
                yield (
                    "control_from",
                    "is video, but prepared latents have no frames to make a control from: encode the control's files, or set "
                    "x0=encode and codec",
                )
            if self.pairs:
                yield "control_from", "is video, but the control of a pair is the file its teacher was given: set files"
