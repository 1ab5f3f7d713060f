"""Encodes clips and controls while training reads them: data.x0=encode data.codec=FOLDER.

A tensor has the bits of the row that `fewstep prepare latents` writes for the same windows: the pixels of a sample are encoded
by themselves and kept in 16 bits. The codec comes from the registry, because the data import no networks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fewstep import registry
from fewstep.config import dump
from fewstep.data.controls import Control
from fewstep.data.files import cache
from fewstep.data.folder.samples import Sample
from fewstep.data.folder.settings import FolderSettings
from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.untrusted.text import digest_of


class Encoder:
    """The codec of a data set's settings, on this process's device, and its cache on disk if there is one."""

    def __init__(self, spec: FolderSettings):
        assert spec.codec is not None
        open_codec = registry.find("codec", "diffusers")
        assert open_codec is not None
        self.spec = spec
        self.device = spec.codec_device or (f"cuda:{ranks().local}" if torch.cuda.is_available() else "cpu")
        self._codec = open_codec(spec.codec, scale=spec.codec_scale, tile=spec.codec_tile, device=self.device)
        self._one_at_a_time = threading.Lock()  # some codecs keep state while they encode, and readers are threads
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def latents(
        self, sample: Sample, part: str, source: Path, pixels: Callable[[], Tensor], made_by: Control | None = None
    ) -> Tensor:
        """C t h w in 16 bits. pixels: reads 1 3 T H W in -1..1, and is called only if the latents are not cached.

        source: the file that the pixels come from; made_by: the control that was computed from it.
        """
        if self.spec.codec_cache is None:
            return self._encode(pixels())
        origin = origin_of(self.spec, part, self._codec.fingerprint, self.spec.latent_dtype)
        origin |= {"buckets": str(self.spec.buckets)}
        origin |= {} if made_by is None else {"made_by": json.dumps(dump(made_by), sort_keys=True)}
        folder = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{sample.stem}@{sample.span.start}-{self._content(source)[:16]}.safetensors"
        path = Path(self.spec.codec_cache) / f"{part}-{folder}" / name
        if path.is_file():
            with suppress(UserError, KeyError):  # damaged: it is made again
                return cache.read(path, made_from=origin).tensors["latents"]
        latents = self._encode(pixels())
        cache.write(path, {"latents": latents}, made_from=origin)
        return latents

    def _encode(self, pixels: Tensor) -> Tensor:
        with self._one_at_a_time, torch.inference_mode():
            latents = self._codec.encode(pixels.to(self.device))[0].to("cpu", getattr(torch, self.spec.latent_dtype))
        return latents.clone()  # a tensor that gradients may be computed with

    def _content(self, path: Path) -> str:
        status = path.stat()
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = hash_of(path)
        return self._hashes[key]


def origin_of(spec: FolderSettings, part: str, codec: str, dtype: str) -> dict[str, str]:
    """The settings and weights that decide latents, besides the bytes of the clips. codec: its fingerprint."""
    whole = spec.num_frames is None
    return {
        "codec": codec,
        "dtype": dtype,
        "part": part,
        "num_frames": "whole" if whole else str(spec.num_frames),
        "sequence_interval": str(spec.sequence_interval),
        "start_frame_interval": "whole" if whole else str(spec.start_frame_interval),
        "video_size": "own" if spec.video_size is None else "x".join(map(str, spec.video_size)),
        "resize": "own" if spec.video_size is None else spec.resize,
    }


def hash_of(path: Path) -> str:
    """32 hex digits over the bytes of a file."""
    return digest_of(path)[:32]
