"""How well a codec reconstructs the clips of a data set: a model on its latents can show no more than that.

DIR/latents/reconstruction.json     {"codec": "9f2c...", "psnr_db": 31.2, "clips": {"clip_0": 30.9, ...}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.data.folder.dataset import FolderData
from fewstep.files import write_json
from fewstep.networks.encoders.codecs import Codec
from fewstep.untrusted.text import read_json

FILE = "reconstruction.json"
POOR_DB = 15.0  # colours and shapes are wrong


@dataclass(frozen=True)
class Reconstruction:
    """Peak signal to noise of clips after encoding and decoding, in dB."""

    codec: str  # fingerprint
    clips: Mapping[str, float]

    @property
    def psnr_db(self) -> float:
        return sum(self.clips.values()) / max(len(self.clips), 1)

    def text(self) -> str:
        """One line for the user, and a warning below 15 dB."""
        worst = min(self.clips, key=lambda stem: self.clips[stem])
        line = f"reconstruction: {self.psnr_db:.1f} dB PSNR, mean of {len(self.clips)} clips"
        line += f"; worst {worst}, {self.clips[worst]:.1f}"
        if self.psnr_db >= POOR_DB:
            return line
        return (
            f"{line}\nwarning: below {POOR_DB:g} dB a codec loses shapes and colours, and models on its latents cannot show "
            "them. Use a codec that was trained on clips like these, or train one: fewstep prepare codec DIR --out FOLDER"
        )


def reconstruction_of(
    data: FolderData, codec: Codec, num: int, folder: Path, device: torch.device | str = "cpu"
) -> Reconstruction | None:
    """The reconstruction of `num` clips spread over the data set; kept in `folder`, where a later command finds it."""
    if num < 1:
        return None
    path = folder / FILE
    if path.is_file():
        before = read_json(path, "Remove it", Reconstruction)
        if before.codec == codec.fingerprint and len(before.clips) >= min(num, len(set(data.stems))):
            return before
    stems = list(dict.fromkeys(data.stems))
    picks = stems if num >= len(stems) else [stems[i * len(stems) // num] for i in range(num)]
    result = Reconstruction(codec.fingerprint, {stem: _psnr_db(data, codec, data.stems.index(stem), device) for stem in picks})
    write_json(path, {"codec": result.codec, "psnr_db": round(result.psnr_db, 3), "clips": dict(result.clips)})
    return result


@torch.inference_mode()
def _psnr_db(data: FolderData, codec: Codec, row: int, device: torch.device | str) -> float:
    pixels = data.batch(torch.tensor([row])).x0
    assert pixels is not None
    output = codec.decode(codec.encode(pixels.to(device))).clamp(-1, 1).to("cpu", torch.float32)
    error = float((output - pixels).square().mean())
    return round(10 * math.log10(4 / max(error, 1e-12)), 2)
