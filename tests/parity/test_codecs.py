"""Our codecs against the normalisation that upstream's pipelines do: the same tiny random autoencoder, the same clip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.networks.encoders.codecs import Autoencoder, codec_of

ATTENTION = {"attention_resolutions": (8,), "resolution": 64}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decode_block_out_channels": (8, 8, 8, 8),
    "num_layers": 1,
    "patch_size": 4,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 4,
    **ATTENTION,
}
WAN = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
MEAN, STD = [0.3, -0.2, 0.1, 0.4], [1.5, 0.7, 2.0, 0.9]
BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}


def settled(module: nn.Module, seed: int = 0) -> Any:
    """Random weights that do not vanish through the depth, and a posterior without spread: its sample is its mode."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim > 1 else 0.1)
    return module.eval()


def certain(module: Any, channels: int) -> Any:
    """The half of the last layer of the encoder that tells the log variance is put to its floor, exp(-30)."""
    last = module.quant_conv if getattr(module, "quant_conv", None) is not None else module.encoder.conv_out
    last = getattr(last, "conv", last)
    last.weight.data[channels:] = 0
    last.bias.data[channels:] = -30
    return module


def clip(frames: int, side: int, num: int = 2) -> Tensor:
    return torch.rand(num, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeds() -> torch.Generator:
    return torch.Generator().manual_seed(2)


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True, None], ids=["per channel", "per channel and frame", "no statistics"])
def test_cosmos_1_conditions_and_decodes_as_its_pipeline(per_frame: bool | None) -> None:
    from diffusers import AutoencoderKLCosmos, CosmosVideoToWorldPipeline

    generator = torch.Generator().manual_seed(4)
    num = 4 * (5 if per_frame else 1)  # 5 frames known, 3 used: upstream takes the first
    told = {"latents_mean": torch.randn(num, generator=generator).tolist(), "latents_std": (torch.rand(num) + 0.5).tolist()}
    told = {"latents_mean": None, "latents_std": None} if per_frame is None else told
    vae = settled(AutoencoderKLCosmos(**COSMOS, **told))
    codec, pixels = codec_of(vae, scale=0.5), clip(9, 32, 1)
    scheduler = SimpleNamespace(config=SimpleNamespace(sigma_data=0.5, sigma_max=80.0))
    pipeline = SimpleNamespace(vae=vae, scheduler=scheduler, vae_scale_factor_temporal=4, vae_scale_factor_spatial=4)
    wanted = CosmosVideoToWorldPipeline.prepare_latents(
        pipeline, pixels, 1, 4, 32, 32, 9, True, dtype=torch.float32, device=torch.device("cpu"), generator=seeds()
    )[1]
    found = codec.encode(pixels)
    assert found.shape[1:] == codec.shape(9, 32, 32)
    torch.testing.assert_close(found, wanted[:, :, : found.shape[2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        codec.decode(wanted), vae.decode(vae.encode(pixels).latent_dist.mode()).sample, rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_cosmos_2_conditions_as_its_pipeline() -> None:
    from diffusers import AutoencoderKLWan, Cosmos2VideoToWorldPipeline

    vae = certain(settled(AutoencoderKLWan(**WAN, latents_mean=MEAN, latents_std=STD)), 4)
    pixels = clip(9, 32, 1)
    scheduler = SimpleNamespace(config=SimpleNamespace(sigma_data=1.0, sigma_max=80.0))
    pipeline = SimpleNamespace(vae=vae, scheduler=scheduler, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    wanted = Cosmos2VideoToWorldPipeline.prepare_latents(
        pipeline, pixels, 1, 4, 32, 32, 9, True, dtype=torch.float32, device=torch.device("cpu"), generator=seeds()
    )[1]
    found = codec_of(vae).encode(pixels)
    torch.testing.assert_close(found, wanted[:, :, : found.shape[2]], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("patch", [None, 2], ids=["2.1", "2.2 with patches"])
def test_wan_decodes_as_its_pipeline(patch: int | None) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    more: dict[str, Any] = (
        {} if patch is None else {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True}
    )
    if patch is not None:
        more |= {"scale_factor_spatial": 16}
    vae = settled(AutoencoderKLWan(**WAN, latents_mean=MEAN, latents_std=STD, **more))
    codec = codec_of(vae)
    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=settled(net))  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    asked = {"prompt_embeds": torch.randn(1, 6, 16), "guidance_scale": 1.0, "height": 64, "width": 32, "num_frames": 9}
    latents, video = (
        pipeline(**asked, num_inference_steps=2, generator=seeds(), output_type=kind).frames for kind in ("latent", "pt")
    )
    assert latents.shape[1:] == codec.shape(9, 64, 32)
    found = (codec.decode(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(found, video, rtol=0, atol=1e-5)
    assert float(found.std()) > 0.01


@torch.no_grad()
def test_wan_conditions_as_its_image_pipeline() -> None:
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

    vae = settled(AutoencoderKLWan(**WAN, latents_mean=MEAN, latents_std=STD))
    first = clip(1, 32, 1)[:, :, 0]
    pipeline = SimpleNamespace(
        vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, config=SimpleNamespace(expand_timesteps=False)
    )
    _, condition = WanImageToVideoPipeline.prepare_latents(
        pipeline, first, 1, 4, 32, 32, 9, torch.float32, torch.device("cpu"), seeds()
    )
    shown = torch.cat([first[:, :, None], torch.zeros(1, 3, 8, 32, 32)], 2)  # upstream fills with grey, then encodes all
    torch.testing.assert_close(codec_of(vae).encode(shown), condition[:, 4:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_cogvideox_encodes_and_decodes_as_its_pipelines() -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXVideoToVideoPipeline

    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    vae = certain(settled(AutoencoderKLCogVideoX(**blocks, **sizes, scaling_factor=0.7)), 4)
    codec, pixels = codec_of(vae), clip(9, 16, 1)
    pipeline = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        vae_scaling_factor_image=0.7,
        scheduler=SimpleNamespace(init_noise_sigma=1.0, add_noise=lambda latents, noise, t: latents),
    )
    wanted = CogVideoXVideoToVideoPipeline.prepare_latents(
        pipeline, pixels, 1, 4, 16, 16, torch.float32, torch.device("cpu"), seeds(), None, torch.tensor([0])
    )
    found = codec.encode(pixels)
    assert found.shape[1:] == codec.shape(9, 16, 16)
    torch.testing.assert_close(found.transpose(1, 2), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(found), CogVideoXPipeline.decode_latents(pipeline, wanted), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("listed", [False, True], ids=["scaling factor", "and statistics"])
def test_sdxl_encodes_as_its_pipeline(listed: bool) -> None:
    from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    told = {"latents_mean": MEAN, "latents_std": STD} if listed else {}
    vae = certain(settled(AutoencoderKL(**blocks, **BLOCKS, scaling_factor=0.13025, force_upcast=False, **told)), 4)
    codec, pixels = codec_of(vae), clip(1, 16)
    pipeline = SimpleNamespace(vae=vae, text_encoder_2=None)
    wanted = StableDiffusionXLImg2ImgPipeline.prepare_latents(
        pipeline, pixels[:, :, 0], None, 2, 1, torch.float32, torch.device("cpu"), [seeds(), seeds()], add_noise=False
    )
    found = codec.encode(pixels)
    assert found.shape[1:] == codec.shape(1, 16, 16)
    torch.testing.assert_close(found[:, :, 0], wanted, rtol=0, atol=1e-5)
    raw = vae.encode(pixels[:, :, 0]).latent_dist.mode()
    torch.testing.assert_close(codec.decode(found)[:, :, 0], vae.decode(raw).sample, rtol=0, atol=1e-4)


@torch.no_grad()
def test_flux_encodes_as_its_pipeline() -> None:
    from diffusers import AutoencoderKL, FluxImg2ImgPipeline

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, **BLOCKS, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False)
    vae = certain(settled(vae), 4)
    pixels = clip(1, 16)
    wanted = FluxImg2ImgPipeline._encode_vae_image(SimpleNamespace(vae=vae), pixels[:, :, 0], seeds())  # type: ignore[arg-type]
    torch.testing.assert_close(codec_of(vae).encode(pixels)[:, :, 0], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_qwen_image_encodes_as_its_pipeline() -> None:
    from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline

    vae = certain(settled(AutoencoderKLQwenImage(**WAN, latents_mean=MEAN, latents_std=STD)), 4)
    codec, pixels = codec_of(vae), clip(1, 32, 1)
    pipeline = SimpleNamespace(vae=vae, latent_channels=4)
    wanted = QwenImageImg2ImgPipeline._encode_vae_image(pipeline, pixels, seeds())  # type: ignore[arg-type]
    found = codec.encode(pixels)
    assert found.shape[1:] == codec.shape(1, 32, 32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(found), vae.decode(vae.encode(pixels).latent_dist.mode()).sample, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cls", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_the_pieces_in_time_that_upstream_works_in_are_exact(cls: str) -> None:
    """A prefix of the clip has the latents of the whole clip's prefix, and the other way round: nothing is cut at a seam."""
    import diffusers

    vae = settled(getattr(diffusers, cls)(**WAN, latents_mean=MEAN, latents_std=STD))
    codec, pixels = codec_of(vae), clip(13, 16, 1)
    latents = codec.encode(pixels)
    torch.testing.assert_close(codec.encode(pixels[:, :, :5]), latents[:, :, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents)[:, :, :5], codec.decode(latents[:, :, :2]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiles_across_are_blended_as_upstream_blends_them() -> None:
    """Along one axis: where four tiles meet upstream blends blended tiles again, so that its order of rows matters."""
    from diffusers import AutoencoderKLWan

    vae = settled(AutoencoderKLWan(**WAN, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    vae.decoder.conv_out.weight.data *= 0.05  # far from -1 and 1: upstream clamps after blending, not before
    pixels = clip(5, 88, 1)[..., :24, :]  # upstream starts tiles even where the one before has reached the end
    whole = codec_of(vae)
    tiled = Autoencoder(vae, whole.form, whole.mean, whole.std, tile=32)
    found = tiled.encode(pixels)
    decoded = tiled.decode(found)
    vae.enable_tiling(32, 32, 24, 24)
    torch.testing.assert_close(found, vae.encode(pixels).latent_dist.mode(), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, vae.decode(found).sample, rtol=0, atol=1e-5)
