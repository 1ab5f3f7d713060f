"""Codecs: opening, refusals, fingerprints, tiles. Equality with upstream's pipelines stands in tests/parity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.networks.encoders.codecs import codec_beside, codec_of, open_codec

TINY = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def image_vae(seed: int = 0, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**BLOCKS, **TINY, **more)


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def cosmos_vae(**statistics: Any) -> Any:
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(0)
    return AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
        temporal_compression_ratio=4, **{"latents_mean": None, "latents_std": None, **statistics},
    )  # fmt: skip


def clip(frames: int, height: int, width: int, num: int = 1) -> Tensor:
    return torch.rand(num, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_codec_opens_from_its_folder_and_from_a_pipelines(tmp_path: Path) -> None:
    vae = image_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    pixels = clip(2, 8, 8)
    wanted = codec_of(vae).encode(pixels)
    for address in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        codec = open_codec(address)
        torch.testing.assert_close(codec.encode(pixels), wanted, rtol=0, atol=0)
        assert not codec.module.training
        assert not any(p.requires_grad for p in codec.module.parameters())


def test_beside_a_network_alone_there_is_no_codec(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CosmosTransformer3DModel"}))
    assert codec_beside(str(tmp_path), 1.0) is None and codec_beside(None, 1.0) is None
    image_vae().save_pretrained(tmp_path / "codec")
    assert codec_beside(str(tmp_path / "codec"), 1.0) is not None


def test_latents_do_not_depend_on_the_batch_or_on_how_many_frames_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, pixels = codec_of(image_vae()), clip(5, 8, 8, num=3)
    whole = codec.encode(pixels)
    monkeypatch.setattr("fewstep.networks.encoders.codecs.FRAMES_AT_ONCE", 2)
    torch.testing.assert_close(codec.encode(pixels), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.encode(pixels[1:2]), whole[1:2], rtol=0, atol=1e-6)
    assert codec.shape(5, 8, 8) == whole.shape[1:]


def test_a_clip_that_does_not_fit_is_refused_with_what_would() -> None:
    codec = codec_of(wan_vae())
    with pytest.raises(ValueError, match=r"10 frames do not fit; it takes 1 \+ k \* 4: 9 or 13"):
        codec.encode(clip(10, 16, 16))
    with pytest.raises(
        ValueError, match=r"16 x 20 pixels do not fit; both sides must be multiples of 8, --height 16 --width 16"
    ):
        codec.shape(9, 16, 20)


def test_statistics_by_frame_bound_the_clip() -> None:
    mean = [float(i) for i in range(6)]  # 2 channels, 3 latent frames: 9 frames
    codec = codec_of(cosmos_vae(latents_mean=mean, latents_std=[2.0] * 6))
    raw = codec_of(cosmos_vae()).encode(clip(9, 16, 16))
    wanted = (raw - torch.tensor(mean).reshape(1, 2, 3, 1, 1)) / 2
    torch.testing.assert_close(codec.encode(clip(9, 16, 16)), wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="3 latent frames, which are 9 frames"):
        codec.encode(clip(13, 16, 16))


def test_statistics_of_the_original_tokenizer_are_read_from_beside_its_weights(tmp_path: Path) -> None:
    cosmos_vae().save_pretrained(tmp_path)
    plain = open_codec(tmp_path)
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    torch.save((mean.bfloat16(), std.bfloat16()), tmp_path / "mean_std.pt")
    codec = open_codec(tmp_path, scale=0.5)
    mean, std = (v.bfloat16().float().reshape(1, 2, 3, 1, 1) for v in (mean, std))
    raw = plain.encode(clip(9, 16, 16))
    torch.testing.assert_close(codec.encode(clip(9, 16, 16)), (raw - mean) / std * 0.5, rtol=0, atol=1e-6)
    assert codec.fingerprint != plain.fingerprint
    torch.save((torch.zeros(3), {"a": print}), tmp_path / "mean_std.pt")
    with pytest.raises(Exception, match=r"asks for '__builtin__.print'"):
        open_codec(tmp_path)


def test_the_fingerprint_knows_weights_and_settings_and_nothing_else(tmp_path: Path) -> None:
    vae = image_vae()
    vae.save_pretrained(tmp_path / "a")
    vae.save_pretrained(tmp_path / "b")
    ours = open_codec(tmp_path / "a").fingerprint
    assert ours == open_codec(tmp_path / "b").fingerprint == codec_of(image_vae()).fingerprint
    one_bit = image_vae()
    weight = next(iter(one_bit.parameters())).data
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    others = [one_bit, image_vae(scaling_factor=0.5)]
    assert len({ours, *(codec_of(vae).fingerprint for vae in others), open_codec(tmp_path / "a", scale=0.5).fingerprint}) == 4


def test_weights_that_do_not_fit_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    image_vae().save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["another"] = tensors.pop("encoder.conv_in.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: encoder\.conv_in\.weight.*unexpected keys: another"):
        open_codec(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(ValueError, match="_class_name is AutoencoderDC; known are AutoencoderKL, "):
        open_codec(tmp_path)
    with pytest.raises(ValueError, match="no codec at"):
        open_codec(tmp_path / "nothing")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither config\.json nor vae/config.json"):
        open_codec(tmp_path)


def test_the_blend_of_tiles_weighs_every_place_with_1() -> None:
    """On functions of single pixels tiles are exact, corners included."""
    tiled, x = replace(codec_of(image_vae()), tile=16), clip(1, 48, 40)  # two pixels along a latent

    def down(x: Tensor) -> Tensor:
        return (x**3 + x)[..., ::2, ::2]

    def up(x: Tensor) -> Tensor:
        return (x**3 + x).repeat_interleave(2, -1).repeat_interleave(2, -2)

    torch.testing.assert_close(tiled._tiled(down, x, enters_latents=True), down(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(tiled._tiled(up, x, enters_latents=False), up(x), rtol=0, atol=1e-6)


@torch.no_grad()
def test_tiles_bound_memory_and_stay_near_the_exact_answer() -> None:
    """The largest tensor any layer makes is that of one tile. Attention and norms see one tile only, hence not exact."""
    vae = wan_vae()
    whole, pixels = codec_of(vae), clip(5, 64, 96)
    tiled = replace(whole, tile=32)
    largest = 0

    def watch(module: Any, inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.shape[-1] * output.shape[-2])

    handles = [module.register_forward_hook(watch) for module in vae.modules() if not list(module.children())]
    exact = whole.encode(pixels)
    assert largest >= 64 * 96
    largest = 0
    near = tiled.encode(pixels)
    assert largest <= 33 * 33  # one more than the tile on each side: upstream pads before it strides
    made = tiled.decode(exact)
    assert largest <= 33 * 33
    for handle in handles:
        handle.remove()
    assert float((near - exact).abs().mean()) < 0.4 * float(exact.std())  # 0.25 on noise, random weights and tiles of 4 latents
    assert float((made - whole.decode(exact)).abs().mean()) < 0.1
    small = clip(5, 32, 32)
    torch.testing.assert_close(tiled.encode(small), whole.encode(small), rtol=0, atol=0)  # fits into one tile


def test_in_bf16_the_normalisation_stays_fp32() -> None:
    vae = image_vae().to(torch.bfloat16)
    codec = codec_of(vae, scale=2.0)
    latents = codec.encode(clip(1, 8, 8))
    assert latents.dtype == torch.float32
    raw = vae.encode(clip(1, 8, 8)[:, :, 0].bfloat16()).latent_dist.mode().float()
    torch.testing.assert_close(latents[:, :, 0], raw * vae.config.scaling_factor * 2, rtol=1e-6, atol=0)


def test_gradients_reach_the_latents_through_the_frozen_decoder() -> None:
    codec = codec_of(image_vae())
    latents = torch.randn(1, 4, 1, 4, 4, requires_grad=True)
    codec.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
