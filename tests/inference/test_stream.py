"""Streaming: frames of a chunk equal those of the whole clip, bit for bit, in a video that plays while it grows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.config import ConfigError
from fewstep.data.files import video
from fewstep.diffusion import RectifiedFlow, Rng, StudentSampler
from fewstep.diffusion.by_chunk import ByChunk
from fewstep.errors import UserError
from fewstep.inference.command import read_command
from fewstep.inference.stream import Clock, frames_of
from fewstep.networks.causal import CausalSpec
from fewstep.networks.encoders.codecs import Autoencoder, codec_of, to_uint8
from fewstep.networks.encoders.streaming import StreamingDecoder
from fewstep.networks.families.wan.network import WanSpec

SMALL = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
NET = CausalSpec(
    WanSpec(num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8, text_tokens=4, freq_dim=8, latent_channels=4),
    chunk=2,
    span=4,
)


def codec(**more: Any) -> Autoencoder:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return codec_of(AutoencoderKLWan(**{**SMALL, "latents_mean": [0.1] * 4, "latents_std": [1.3] * 4, **more}))  # pyright: ignore[reportArgumentType]


def test_decoded_chunks_are_the_decoded_clip() -> None:
    whole, latents = codec(), torch.randn(2, 4, 6, 4, 4)
    decode = StreamingDecoder(whole)
    parts = [decode(part) for part in latents.split([1, 3, 2], 2)]
    assert [part.shape[2] for part in parts] == [1, 12, 8]
    for row in range(2):  # the offline codec decodes row by row, too
        one = StreamingDecoder(whole)
        streamed = torch.cat([one(part) for part in latents[row : row + 1].split([1, 3, 2], 2)], 2)
        assert torch.equal(streamed, whole.decode(latents[row : row + 1]))


def test_frames_of_a_stream_are_those_of_the_clip_and_the_video_plays_while_it_grows(tmp_path: Path) -> None:
    network, vae = NET.build(), codec()
    sampler = StudentSampler((1.0, 0.6), RectifiedFlow(), by_chunk=ByChunk())
    noise, cond, clock = torch.randn(1, 4, 8, 4, 4), Condition(text=torch.randn(1, 4, 8)), Clock()
    path, seen, parts = tmp_path / "clip.mp4", [], []
    with video.growing(path, 8, "lossless") as append:
        for frames in frames_of(network, sampler, vae, cond, noise, Rng(3, rows=[1]), clock=clock):
            append(frames)
            parts.append(frames)
            (partial,) = tmp_path.iterdir()
            copy = tmp_path.parent / f"{tmp_path.name}_{len(parts)}.mp4"
            copy.write_bytes(partial.read_bytes())
            seen.append(len(list(video.stream(copy))))
    whole = to_uint8(vae.decode(sampler(network, noise, cond, Rng(3, rows=[1]))), "this student")[0]
    assert np.array_equal(np.concatenate(parts), whole) and np.array_equal(video.read(path).frames, whole)
    assert [len(part) for part in parts] == clock.frames == [5, 8, 8, 8]
    assert seen == [4, 12, 20, 28]  # the muxer holds the last frame back
    figures = clock.figures(2)
    assert figures["chunks_in_rates"] == 2 and figures["denoise_fps"] == round(16 / sum(clock.denoising[2:]), 3)


def test_a_switch_is_read_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    rows = tmp_path / "clips.jsonl"
    rows.write_text('{"prompt": "a", "switch_at": {"9": "b: c", "17": "d"}}\n')
    (clip,) = read_command(["S", "--prompts", str(rows), "--stream"]).clips
    assert clip.switches == ((9, "b: c"), (17, "d"))
    (clip,) = read_command(["S", "--prompt", "a", "--stream", "--switch-at", "9:b: c"]).clips
    assert clip.switches == ((9, "b: c"),)
    for words, text in (
        (["--switch-at", "9:b"], "add --stream"),
        (["--stream", "--switch-at", "b"], "is written FRAME:PROMPT"),
        (["--stream", "--switch-at", "0:b"], "at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_command(["S", "--prompt", "a", *words])


def test_what_cannot_stream_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import AutoencoderKLCosmos

    small = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"AutoencoderKLCosmos decodes whole clips.*cannot stream"):
        StreamingDecoder(codec_of(small))
    plain = StudentSampler((1.0,), RectifiedFlow())
    with pytest.raises(UserError, match="all frames of a clip at once"):
        next(frames_of(NET.build(), plain, codec(), Condition(), torch.zeros(1, 4, 2, 4, 4), Rng(0)))
    sys.path.insert(0, str(Path(__file__).parents[1] / "stories"))
    import tiny_pipelines  # pyright: ignore[reportMissingImports]

    teacher = tiny_pipelines.wan(tmp_path / "wan")
    size = ["--num-frames", "9", "--height", "32", "--width", "32", "--out", str(tmp_path / "out")]
    assert main(["generate", str(teacher), "--prompt", "a dot", "--stream", *size]) != 0
    assert "generates all frames of a clip at once" in capsys.readouterr().err
