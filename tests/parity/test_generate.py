"""`fewstep generate` against upstream's pipelines: the picture a clip begins with, and clips made chunk after chunk.

What is sampled with is replaced by upstream's own schedule and given noise; files, conditions and chunks are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.data.files import arrays, video
from fewstep.diffusion import TeacherSampler, guided, samplers
from fewstep.inference import generate as room
from fewstep.inference.chunks import chunks_of
from fewstep.inference.coming_from_cosmos import Control
from fewstep.inference.command import read_command
from fewstep.inference.conditions import Shot, Text
from fewstep.inference.films import Studio, films
from fewstep.inference.fit import Plan
from fewstep.inference.model import Model
from fewstep.inference.request import ClipRequest
from fewstep.inference.stages import Component
from fewstep.networks.encoders.codecs import codec_of, to_uint8
from fewstep.networks.families.cogvideox import CogVideoXSpec
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import supply_resize
from fewstep.networks.families.wan.network import WanSpec

pytestmark = pytest.mark.filterwarnings(  # upstream's own
    "ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
SIZE = ["--num-frames", "9", "--height", "32", "--width", "48", "--quality", "lossless"]
Solve = Callable[[Any, Tensor, Condition, Condition | None], Tensor]  # (network, noise, cond, negative) -> latents


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_of(monkeypatch: pytest.MonkeyPatch, noise: Tensor, solve: Solve) -> list[Tensor]:
    """What each call of the sampler gives, from now on."""
    made: list[Tensor] = []

    def sample(self: Any, network: Any, drawn: Tensor, cond: Condition, rng: Any, negative: Condition | None) -> Tensor:
        assert drawn.shape == noise.shape
        made.append(solve(network, noise, cond, negative))
        return made[-1]

    monkeypatch.setattr(TeacherSampler, "__call__", sample)
    return made


def asked_for(folder: Path, tmp_path: Path, text: Tensor, negative: Tensor) -> tuple[list[str], Any]:
    """The arguments, and the picture that they begin with."""
    import cv2
    from PIL import Image

    picture = np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    (tmp_path / "in.png").write_bytes(cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes())
    for name, value in (("text", text), ("negative", negative)):
        arrays.write_pickle(tmp_path / f"{name}.pickle", [value[0].numpy()])
    files = ["--embedding", str(tmp_path / "text.pickle"), "--negative-embedding", str(tmp_path / "negative.pickle")]
    more = ["--input", str(tmp_path / "in.png"), "--guidance", "5", "--out", str(tmp_path / "out")]
    return [str(folder), *files, *more, *SIZE], Image.fromarray(picture)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_wan_2_1_begins_with_a_picture_as_upstreams_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    wan = WanSpec(
        num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16, latent_channels=4, max_positions=32,
        beside_channels=8, image_dim=8,
    ).build()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    ).eval()  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=wan.module, scheduler=scheduler,
        image_encoder=CLIPVisionModel(clip).eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(str(tmp_path / "wan"))
    noise, text, negative = draw(1, 4, 3, 4, 6, seed=5), draw(1, 512, 16, seed=2), draw(1, 512, 16, seed=3)
    arguments, picture = asked_for(tmp_path / "wan", tmp_path, text, negative)
    told: dict[str, Any] = {
        "prompt_embeds": text, "negative_prompt_embeds": negative, "height": 32, "width": 48, "num_frames": 9,
        "num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise, "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    theirs = pipe(image=picture, **told)[0]
    grid = scheduler.sigmas[:-1].double()

    def solve(network: Any, noise: Tensor, cond: Condition, other: Condition | None) -> Tensor:
        return samplers.euler(guided(network, other, 5.0), noise, grid, cond)

    made = latents_of(monkeypatch, noise, solve)
    assert room.generate(read_command(arguments)) == 1
    close(made[0], theirs)
    with pytest.raises(ValueError, match="begins with one picture, 1"):
        room.generate(read_command([*arguments, "--num-input-frames", "5", "--name", "b"]))

    # a longer one: the features, too, are those of the frame that the chunk before ended with
    made.clear()
    long = [*arguments, "--num-frames", "17", "--chunk-frames", "9", "--name", "long", "--quality", "18"]
    assert room.generate(read_command(long)) == 1
    with torch.no_grad():
        last = codec_of(vae).decode(made[0])[:, :, -1].clamp(-1, 1)
        seen = pipe.image_processor(images=to_uint8(last[:, :, None], "given")[0, 0], return_tensors="pt")
        features = pipe.image_encoder(**seen, output_hidden_states=True).hidden_states[-2]
    pipe.encode_image = lambda *args: features  # of the frame in whole numbers; it refuses features beside a picture
    theirs = pipe(image=last / 2 + 0.5, **told)[0]
    close(made[1], theirs)
    assert video.probe(tmp_path / "out" / "long.mp4").num_frames == 17


@pytest.mark.parametrize("is_1_5", [False, True], ids=["5b", "1.5"])
def test_cogvideox_begins_with_a_picture_as_upstreams_pipeline(
    is_1_5: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.5 works on pairs of latent frames: upstream makes one more in front, and drops it after decoding; so do we."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline

    torch.manual_seed(0)
    more: dict[str, Any] = {"patch_t": 2, "sample_size": (20, 20), "sample_frames": 13, "motion_dim": 8} if is_1_5 else {}
    cog = CogVideoXSpec(
        **{"sample_size": (4, 6), "sample_frames": 9, "learned_positions": not is_1_5, **more}, latent_channels=4, num_heads=2,
        head_dim=16, num_layers=2, text_dim=12, text_tokens=7, time_dim=8, snr_shift=1.0, rotary=True, has_picture=True,
    ).build()  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, scaling_factor=0.7,
        invert_scale_latents=is_1_5,
    ).eval()  # fmt: skip
    last: Any = vae.encoder.conv_out  # a posterior without spread: the pipeline draws from it, we take its middle
    last.conv.weight.data[4:] = 0
    last.conv.bias.data[4:] = -30
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    pipe = CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=cog.module, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(str(tmp_path / "cog"))
    noise, text, negative = draw(1, 4, 3 + is_1_5, 4, 6, seed=5), draw(1, 7, 12, seed=2), draw(1, 7, 12, seed=3)
    arguments, picture = asked_for(tmp_path / "cog", tmp_path, text, negative)
    theirs = pipe(
        image=picture, prompt_embeds=text, negative_prompt_embeds=negative, height=32, width=48, num_frames=9,
        num_inference_steps=4, guidance_scale=5.0, latents=noise.transpose(1, 2), output_type="latent", return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip
    grid = (scheduler.timesteps.double() + 1) / 1000

    def solve(network: Any, noise: Tensor, cond: Condition, other: Condition | None) -> Tensor:
        return samplers.few_step(guided(network, other, 5.0), noise, grid, cond, renoise="ode")

    made = latents_of(monkeypatch, noise, solve)
    assert room.generate(read_command(arguments)) == 1
    close(made[0], theirs)
    assert video.probe(tmp_path / "out" / "output.mp4").num_frames == 9


@torch.no_grad()
@pytest.mark.parametrize("overlap", [1, 5])
def test_a_long_clip_led_by_edges_is_upstreams_chunk_after_chunk(
    overlap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan, Cosmos2_5_TransferPipeline, FlowMatchEulerDiscreteScheduler
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput

    supply_resize()
    torch.manual_seed(0)
    spec = CosmosControlSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=16, adaln_lora_dim=4,
        max_size=(16, 16, 16), text_projection_from=24, num_control_blocks=2, hint_channels=8,
    )  # fmt: skip
    net = spec.build()
    for weight in net.module.parameters():
        torch.nn.init.normal_(weight, std=0.5 * weight.shape[-1] ** -0.5)
    module: Any = net.module
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    ).eval()  # fmt: skip
    real = vae.encode

    def encode(clip: Tensor) -> Any:  # the pipeline draws from the posterior; ours is its middle
        found = real(clip)
        found.latent_dist.sample = lambda generator=None: found.latent_dist.mean
        return AutoencoderKLOutput(latent_dist=found.latent_dist)

    vae.encode = encode  # type: ignore[method-assign]
    # It begins at pure noise. Their UniPC begins at 0.995, whence a frame that is given ends with half a hundredth of the noise
    # in it, and the next chunk would see that.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)

    class NoGuard:
        def to(self, device: object) -> None: ...

    pipe = Cosmos2_5_TransferPipeline(
        text_encoder=None, tokenizer=None, transformer=net.base, vae=vae, scheduler=scheduler, safety_checker=NoGuard(),  # type: ignore[arg-type]
        controlnet=module.branches["edge"],
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    edges = np.random.default_rng(2).integers(0, 255, (15, 32, 32, 3), dtype=np.uint8)
    video.write(tmp_path / "edges.mp4", edges, 8.0, quality="lossless")
    noise, text, negative = draw(1, 4, 3, 4, 4, seed=5), draw(1, 6, 24, seed=2), draw(1, 6, 24, seed=3)
    theirs = pipe(
        controls=torch.from_numpy(edges).permute(0, 3, 1, 2)[None].float() / 255, prompt_embeds=text,
        negative_prompt_embeds=negative, latents=noise, height=32, width=32, num_frames=15, num_frames_per_chunk=9,
        num_ar_conditional_frames=overlap, conditional_frame_timestep=1e-4, num_inference_steps=4, guidance_scale=2.0,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    grid = scheduler.sigmas[:-1].double()

    def solve(network: Any, noise: Tensor, cond: Condition, other: Condition | None) -> Tensor:
        return samplers.euler(guided(network, other, 3.0), noise, grid, cond)

    made = latents_of(monkeypatch, noise, solve)
    words = {"p": Text(text, None), "n": Text(negative, None)}
    request = ClipRequest("clip", "p", "n", control={"edge": Control(tmp_path / "edges.mp4")})
    codec, device = codec_of(vae), torch.device("cpu")
    chunks = tuple(chunks_of(15, 9, overlap))
    plan = Plan(Model(net, spec, TeacherSampler()), codec, TeacherSampler(), Shot(15, 32, 32, 8.0), chunks)
    network, encoder, pictures = (Component(lambda part=part: part, releases=False) for part in (net, codec, None))
    studio = Studio(plan, "the teacher", network, encoder, pictures, words, device, device)  # type: ignore[arg-type]
    (film,) = films([[request]], studio)
    assert film.frames.shape == (1, 15, 32, 32, 3)
    taken = 1 + (overlap - 1) // 4
    ours = torch.cat([made[0], *(latents[:, :, taken:] for latents in made[1:])], 2)[:, :, : theirs.shape[2]]
    assert len(made) == len(chunks) >= 2 and theirs.shape[2] == 4
    close(ours, theirs)
