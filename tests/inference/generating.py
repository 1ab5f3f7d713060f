"""A small teacher and student of every kind of part, and `fewstep generate` in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.inference.command import read_command
from fewstep.inference.generate import generate
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.words import WordsConfig, WordsEncoder, WordsModel
from fewstep.networks.families.cosmos.network import CosmosSpec

NET = CosmosSpec(
    latent_channels=2, num_heads=2, head_dim=12, num_layers=2, mlp_ratio=2.0, text_dim=8, adaln_lora_dim=4,
    max_size=(4, 8, 8), rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)  # fmt: skip


TIMES = (1.0, 0.75)


SIZE = ["--num-frames", "9", "--height", "16", "--width", "16", "--fps", "8"]


FIRST = {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0, "latent_shape": [2, 3, 4, 4]}


def write_parts(folder: Path) -> None:
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0],
    ).save_pretrained(folder / "vae")  # fmt: skip
    words = WordsConfig(("a", "red", "ball", "rolls"), dim=8, num_layers=1, num_heads=2, max_tokens=6)
    WordsEncoder(WordsModel(words).eval()).save(folder / "text_encoder")


def made(out: Path, *arguments: str, told: list[str] | None = None, rank: int = 0, size: int = 1) -> int:
    asked = read_command([*arguments, "--out", str(out), "--quality", "lossless"], (told or []).append)
    return generate(asked, rank, size, say=(told if told is not None else []).append)


def as_frames(folder: Path, latents: Tensor) -> np.ndarray:
    pixels = open_codec(folder).decode(latents)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]


def write_picture(folder: Path) -> Path:
    import cv2

    frame = np.random.default_rng(1).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    (folder / "in.png").write_bytes(cv2.imencode(".png", frame)[1].tobytes())
    return folder / "in.png"
