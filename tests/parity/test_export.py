"""An exported student through upstream's own pipelines, unchanged and asked for a number of steps only, against our sampler."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import test_cosmos_pipelines as cosmos

from fewstep.batch import Condition
from fewstep.diffusion import VP, RectifiedFlow, Rng, StudentSampler, TeacherSampler, guided, samplers
from fewstep.diffusion.times import shifted
from fewstep.errors import UserError
from fewstep.export.base import Base
from fewstep.export.to_diffusers import write_folder
from fewstep.inference.card import Envelope, StudentCard
from fewstep.inference.model import Model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.flux import FluxSpec
from fewstep.networks.families.unet import UnetSpec
from fewstep.networks.families.wan.network import WanSpec

FLOW = tuple(shifted(4, 5.0).tolist())
VAE = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}

WAN = WanSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16, max_positions=32,
    text_tokens=6,
)  # fmt: skip


def randomised(network: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for weight in network.module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    network.module.eval().requires_grad_(False)
    return network


def folder_of(tmp_path: Path, network: Any, sampler: StudentSampler, pipeline: Any, shape: tuple[int, int, int, int]) -> Path:
    pipeline.save_pretrained(tmp_path / "base")
    envelope = Envelope(latent_shape=shape)
    out = tmp_path / "student"
    out.mkdir()
    card = StudentCard(network={}, sampler=sampler, envelope=envelope)
    write_folder(Model(network, None, sampler, envelope), card, out, Base(tmp_path / "base")).write(out)
    return out


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies a pipeline.py before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Drawn:
    """An Rng that draws what upstream draws after torch.manual_seed."""

    def __init__(self, seed: int, *shape: int):
        torch.manual_seed(seed)
        self.shape = shape

    def normal_like(self, like: Tensor) -> Tensor:
        return torch.randn(self.shape).reshape(like.shape)


def ours(network: Any, sampler: StudentSampler, noise: Tensor, cond: Condition, rng: Any) -> Tensor:
    with torch.no_grad():
        return sampler(network, noise, cond, rng)


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_wan(tmp_path: Path, renoise: Any) -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    network, sampler = randomised(WAN.build()), StudentSampler(FLOW, RectifiedFlow(), renoise)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    base = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=None, scheduler=UniPCMultistepScheduler())  # type: ignore[arg-type]
    folder = folder_of(tmp_path, network, sampler, base, (4, 3, 8, 4))
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), text_encoder=None, tokenizer=None)  # no code of ours is run
    assert type(pipe).__name__ == "WanPipeline"
    pipe.set_progress_bar_config(disable=True)
    noise, text = draw(1, 4, 3, 8, 4), draw(1, 6, 16, seed=2)
    asked = {"prompt_embeds": text, "num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 32, "num_frames": 9}
    torch.manual_seed(7)
    theirs = pipe(**asked, latents=noise, output_type="latent").frames
    mine = ours(network, sampler, noise, Condition(text=text), Drawn(7, 1, 4, 3, 8, 4))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert float(mine.std()) > 0.05
    own: Any = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True, text_encoder=None, tokenizer=None
    )
    redrawn = Drawn(7, 1, 4, 3, 8, 4)
    renoised = [redrawn.normal_like(noise) for _ in range(3)] if renoise == "fresh" else None
    again = own(prompt_embeds=text, latents=noise, renoise=renoised, output_type="latent").frames
    torch.testing.assert_close(again, mine, rtol=0, atol=1e-5)
    assert open_codec(folder).shape(9, 64, 32) == (4, 3, 8, 4)


def teacher_folder(tmp_path: Path, network: Any, pipeline: Any) -> Path:
    """The export of a post-trained teacher whose base is `pipeline`, which has a network of the same class."""
    pipeline.save_pretrained(tmp_path / "base")
    out, sampler = tmp_path / "teacher", TeacherSampler.for_path(network.path)
    out.mkdir()
    card = StudentCard(network={"kind": "wan"}, sampler=sampler)
    write_folder(Model(network, None, sampler), card, out, Base(tmp_path / "base")).write(out)
    return out


def wan_base(network: Any, scheduler: Any) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    none: Any = {"tokenizer": None, "text_encoder": None}
    return WanPipeline(vae=vae, transformer=network.module, scheduler=scheduler, **none)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(WAN, text_dim=24), "the text dim of its transformer is 24, that of the student 16"),
        (
            cosmos.PREDICT1,
            "the class name of its transformer is CosmosTransformer3DModel, that of the student WanTransformer3DM",
        ),
    ],
)
def test_a_base_of_another_network_is_refused(tmp_path: Path, other: Any, says: str) -> None:
    """It has a codec, a text encoder and a loop of its own, and diffusers would take them for the student's."""
    from diffusers import UniPCMultistepScheduler

    other.build().module.save_pretrained(tmp_path / "base" / "transformer")
    wan_base(WAN.build(), UniPCMultistepScheduler()).save_config(tmp_path / "base")
    network, sampler = WAN.build(), StudentSampler(FLOW, RectifiedFlow(), "fresh")
    with pytest.raises(UserError, match=says):
        write_folder(Model(network, None, sampler), StudentCard(network={}, sampler=sampler), tmp_path, Base(tmp_path / "base"))


def test_a_post_trained_teacher_is_a_pipeline_of_its_base(tmp_path: Path) -> None:
    """Its base's class, scheduler and guidance, with its own weights; and generate walks the base's shift and solver."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    before, network = WAN.build(), randomised(WAN.build())
    folder = teacher_folder(tmp_path, network, wan_base(before, FlowMatchEulerDiscreteScheduler(shift=3.0)))
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), text_encoder=None, tokenizer=None)
    assert type(pipe).__name__ == "WanPipeline" and not (folder / "pipeline.py").exists()
    wanted = wan_base(network, FlowMatchEulerDiscreteScheduler(shift=3.0))
    asked = {
        "prompt_embeds": draw(1, 6, 16, seed=2), "negative_prompt_embeds": draw(1, 6, 16, seed=3), "guidance_scale": 4.0,
        "latents": draw(1, 4, 3, 8, 4), "num_inference_steps": 3, "height": 64, "width": 32, "num_frames": 9,
        "output_type": "latent",
    }  # fmt: skip
    for one in (pipe, wanted):
        one.set_progress_bar_config(disable=True)
    made = pipe(**asked).frames
    torch.testing.assert_close(made, wanted(**asked).frames, rtol=0, atol=1e-6)
    assert (made - pipe(**(asked | {"guidance_scale": 1.0})).frames).abs().max() > 0.1
    sampler = StudentCard.read(folder, "").sampler
    assert isinstance(sampler, TeacherSampler)
    assert (sampler.solver, sampler.shift, sampler.num_steps) == ("euler", 3.0, 35)


def test_a_post_trained_cosmos_is_a_pipeline_of_cosmos(tmp_path: Path) -> None:
    """diffusers' own loop, which a student of Cosmos does not have: guidance, and a scheduler of Karras et al."""
    network = randomised(cosmos.PREDICT1.build())
    base = cosmos.pipeline(
        "CosmosVideoToWorldPipeline", cosmos.network(cosmos.PREDICT1), cosmos.cosmos_vae(), cosmos.edm_euler()
    )
    base.register_to_config(safety_checker=(None, None))
    folder = teacher_folder(tmp_path, network, base)
    none: Any = {"text_encoder": None, "tokenizer": None, "safety_checker": cosmos.NoGuard()}
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), **none)
    assert type(pipe).__name__ == "CosmosVideoToWorldPipeline"
    assert "cosmos_guardrail" in StudentCard.read(folder, "").notes[0]
    asked = {
        "prompt_embeds": draw(1, 6, 16, seed=2), "negative_prompt_embeds": draw(1, 6, 16, seed=3), "guidance_scale": 3.0,
        "latents": draw(1, 4, 3, 4, 4), "num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 17,
        "output_type": "latent", "return_dict": False, "video": draw(1, 1, 3, 32, 32, seed=5).sigmoid(),
    }  # fmt: skip
    frames = [one(**asked, generator=cosmos.seeded())[0] for one in (pipe, cosmos.pipeline(
        "CosmosVideoToWorldPipeline", network, cosmos.cosmos_vae(), cosmos.edm_euler()
    ))]  # fmt: skip
    torch.testing.assert_close(frames[0], frames[1], rtol=0, atol=1e-5)


def test_a_post_trained_teacher_without_a_base_takes_guidance(tmp_path: Path) -> None:
    """pipeline.py: Euler's steps of the guided network, w as everywhere here."""
    network = randomised(WAN.build())
    out, sampler = tmp_path / "teacher", replace(TeacherSampler.for_path(network.path), num_steps=3)
    out.mkdir()
    write_folder(Model(network, None, sampler), StudentCard(network={}, sampler=sampler), out, Base()).write(out)
    pipe: Any = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    noise, text, negative = draw(1, 4, 3, 8, 4), draw(1, 6, 16, seed=2), draw(1, 6, 16, seed=3)
    given = {"prompt_embeds": text, "latents": noise, "output_type": "latent", "guidance_scale": 4.0}
    for empty, embeds in ((negative, negative), (torch.zeros_like(text), None)):
        made = pipe(**given, negative_prompt_embeds=embeds).frames
        with torch.no_grad():
            denoiser = guided(network, Condition(text=empty), 4.0)
            wanted = samplers.euler(denoiser, noise, sampler.times(network.path), Condition(text=text))
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-4)
    assert (pipe(**(given | {"guidance_scale": 1.0})).frames - made).abs().max() > 0.1


UNET = UnetSpec(
    widths=(8, 16), with_attention=(False, True), layers_per_block=1, transformer_layers=(1, 1), num_heads=(2, 2),
    norm_groups=4, text_dim=12, pooled_dim=10, size_dim=8, sample_size=8,
)  # fmt: skip


@pytest.mark.parametrize(("renoise", "times"), [("fresh", (1.0, 0.75, 0.5, 0.25)), ("ode", (1.0, 0.5)), ("ode", (1.0,))])
def test_sdxl(tmp_path: Path, renoise: Any, times: tuple[float, ...]) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    network = randomised(UNET.build())
    sampler = StudentSampler(times, VP("scaled_linear"), renoise)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    none: Any = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    scheduler = EulerDiscreteScheduler()
    base = StableDiffusionXLPipeline(vae=vae, unet=None, scheduler=scheduler, add_watermarker=False, **none)  # type: ignore[arg-type]
    folder = folder_of(tmp_path, network, sampler, base, (4, 1, 8, 8))
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), add_watermarker=False, **none)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    pipe.text_encoder_2 = type("Size", (), {"config": type("Config", (), {"projection_dim": 10})(), "dtype": torch.float32})()
    pipe.set_progress_bar_config(disable=True)
    noise, text, pooled = draw(1, 4, 8, 8), draw(1, 7, 12, seed=2), draw(1, 10, seed=3)
    # Upstream starts from the noise as it is, we from s(1) times it: a table ends at 0.9977, not at 1.
    begin = float(VP("scaled_linear").coefficients(torch.tensor(1.0))[1])
    asked = {"num_inference_steps": len(times), "guidance_scale": 1.0, "height": 64, "width": 64, "latents": begin * noise}
    torch.manual_seed(7)
    theirs = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, **asked, output_type="latent").images
    mine = ours(network, sampler, noise, Condition(text=text, pooled=pooled), Drawn(7, 1, 4, 8, 8))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_flux(tmp_path: Path, renoise: Any) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    spec = FluxSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=1, num_single_layers=1, text_dim=12, pooled_dim=10,
        rotary_dims=(4, 6, 6), guidance_input=False,
    )  # fmt: skip
    network, sampler = randomised(spec.build()), StudentSampler(tuple(shifted(4, 3.0).tolist()), RectifiedFlow(), renoise)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    none: Any = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    base = FluxPipeline(vae=vae, transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), **none)  # type: ignore[arg-type]
    folder = folder_of(tmp_path, network, sampler, base, (4, 1, 8, 8))
    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), **none)
    pipe.set_progress_bar_config(disable=True)
    noise, text, pooled = draw(1, 4, 8, 8), draw(1, 7, 12, seed=2), draw(1, 10, seed=3)
    packed = pipe._pack_latents(noise, 1, 4, 8, 8)
    asked = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "latents": packed}
    torch.manual_seed(7)
    theirs = pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, **asked, output_type="latent").images
    torch.manual_seed(7)
    drawn = [pipe._unpack_latents(torch.randn_like(packed), 64, 64, pipe.vae_scale_factor) for _ in range(4)]
    rng: Any = type("Drawn", (), {"normal_like": lambda self, like: drawn.pop(0)})()
    mine = ours(network, sampler, noise, Condition(text=text, pooled=pooled), rng)
    unpacked = pipe._unpack_latents(theirs, 64, 64, pipe.vae_scale_factor)
    torch.testing.assert_close(mine, unpacked, rtol=0, atol=1e-4)


def test_transfer_2_5_goes_out_as_a_transformer_and_its_controlnet(tmp_path: Path) -> None:
    spec = CosmosControlSpec(
        latent_channels=2, num_heads=2, head_dim=12, num_layers=2, mlp_ratio=2.0, text_dim=8, adaln_lora_dim=4, hint_channels=4,
        max_size=(4, 8, 8), rope_scale=(1.0, 1.0, 1.0), controls=("edge",), num_control_blocks=2,
    )  # fmt: skip
    network, sampler = randomised(spec.build()), StudentSampler(FLOW, RectifiedFlow(), "same")
    out = tmp_path / "student"
    out.mkdir()
    card = StudentCard(network={}, sampler=sampler, envelope=Envelope(latent_shape=(2, 3, 4, 4)))
    write_folder(Model(network, None, sampler, card.envelope), card, out, Base()).write(out)
    pipe: Any = DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    noise, text, control = Rng.of_samples([3]).normal((2, 3, 4, 4)), draw(1, 5, 8), draw(1, 2, 3, 4, 4, seed=5)
    theirs = pipe(prompt_embeds=text, latents=noise, control_latents=control, output_type="latent").frames
    mine = ours(network, sampler, noise, Condition(text=text, control={"edge": control}), None)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="led by a control video"):
        pipe(prompt_embeds=text, latents=noise)


def test_what_diffusers_cannot_sample_is_refused(tmp_path: Path) -> None:
    network, sampler = randomised(UNET.build()), StudentSampler((1.0, 0.5), VP("scaled_linear"), "same")
    with pytest.raises(
        ValueError, match=r"no scheduler of diffusers takes the steps of this student, renoise=same.*--format safetensors"
    ):
        write_folder(Model(network, None, sampler), StudentCard(network={}, sampler=sampler), tmp_path, Base())
