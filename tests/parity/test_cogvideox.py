"""The CogVideoX adapter against upstream: the class called by hand as its pipelines call it, and the pipeline itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import guided, samplers
from fewstep.networks.families.cogvideox import CogVideoX, CogVideoXSpec, from_picture
from fewstep.parallel import World, place

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers 0.42 with numpy 2

B2 = CogVideoXSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=3, text_dim=12, text_tokens=7, time_dim=8, sample_size=(4, 6),
    sample_frames=9,
)  # fmt: skip
B5 = replace(B2, snr_shift=1.0, rotary=True)
B15 = replace(B5, patch_t=2, sample_size=(20, 20), sample_frames=13)
SHAPE = (2, 4, 3, 4, 6)
ALONE = World(0, 1, torch.device("cpu"), None)


def network(spec: CogVideoXSpec = B2, **changes: Any) -> CogVideoX:
    torch.manual_seed(0)
    return replace(spec, **changes).build()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheduler_of(spec: CogVideoXSpec) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=spec.snr_shift, timestep_spacing="trailing",
    )  # fmt: skip


@pytest.mark.parametrize("spec", [B2, B5])
def test_the_path_is_the_shifted_table_that_ends_in_pure_noise(spec: CogVideoXSpec) -> None:
    levels = scheduler_of(spec).alphas_cumprod.double()
    a, s, _, _ = spec.path.coefficients(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(a**2, levels, rtol=0, atol=1e-9)
    torch.testing.assert_close(a**2 + s**2, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(a[-1]) == 0.0


def same_gradients(net: CogVideoX, ours: Tensor, theirs: Tensor) -> None:
    weights = list(net.module.parameters())
    got, wanted = (torch.autograd.grad(x0.square().sum(), weights) for x0 in (ours, theirs))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def rotary(net: CogVideoX, frames: int) -> Any:
    """As the pipeline computes it, asked for pixels."""
    made = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=net.module, scheduler=scheduler_of(B5))
    return made._prepare_rotary_positional_embeddings(32, 48, frames, torch.device("cpu"))


@pytest.mark.parametrize("spec", [B2, B5, B15], ids=["2b", "5b", "1.5"])
def test_the_answer_is_the_upstream_v_at_the_entry_of_its_table(spec: CogVideoXSpec) -> None:
    net, text = network(spec), draw(2, 7, 12, seed=2)
    x = draw(2, 4, 4, 4, 6) if spec.patch_t else draw(*SHAPE)
    answer = net(x, torch.tensor([1.0, 0.4], dtype=torch.float64), Condition(text=text))
    v = net.module(
        x.transpose(1, 2), text, torch.tensor([999, 399]),
        image_rotary_emb=rotary(net, x.shape[2]) if spec.rotary else None, return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip
    level = scheduler_of(spec).alphas_cumprod[[999, 399]].float()[:, None, None, None, None]
    x0 = level.sqrt() * x - (1 - level).sqrt() * v
    torch.testing.assert_close(answer.x0, x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.eps, (1 - level).sqrt() * x + level.sqrt() * v, rtol=0, atol=1e-5)

    same_gradients(net, answer.x0, x0)


def test_pure_noise_and_clean_data_are_read_right() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 12, seed=2)
    answer = net(x, torch.tensor([1.0, 0.0], dtype=torch.float64), Condition(text=text))
    torch.testing.assert_close(answer.eps[0], x[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.x0[1], x[1], rtol=0, atol=1e-6)


def test_image_to_video_reads_its_picture_beside_the_latents() -> None:
    net = network(B5, has_picture=True, learned_positions=True, motion_dim=8)
    x, text, beside = draw(*SHAPE), draw(2, 7, 12, seed=2), draw(*SHAPE, seed=3)
    beside[:, :, 1:] = 0
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    answer = net(x, t, Condition(text=text, beside=beside))
    v = net.module(
        torch.cat([x.transpose(1, 2), beside.transpose(1, 2)], 2), text, torch.tensor([899, 399]),
        ofs=torch.full((1,), 2.0), image_rotary_emb=rotary(net, 3), return_dict=False,
    )[0].transpose(1, 2)  # fmt: skip
    level = scheduler_of(B5).alphas_cumprod[[899, 399]].float()[:, None, None, None, None]
    x0 = level.sqrt() * x - (1 - level).sqrt() * v
    torch.testing.assert_close(answer.x0, x0, rtol=0, atol=1e-5)
    same_gradients(net, answer.x0, x0)


def test_taps_are_the_blocks_own_outputs_of_the_clip() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 12, seed=2)
    kept: list[Tensor] = []
    handle = net.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output[0]))
    answer = net(x, torch.tensor([0.5, 0.5], dtype=torch.float64), Condition(text=text), taps=(1,))
    handle.remove()
    assert answer.features[0].shape == (2, 32, 3, 2, 3)
    torch.testing.assert_close(answer.features[0].permute(0, 2, 3, 4, 1).flatten(1, 3), kept[0], rtol=0, atol=0)


def test_recomputed_blocks_give_the_same_answer_and_gradients() -> None:
    plain, recomputed = network(B5), network(B5)
    place(recomputed.module, recomputed.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    x, text, t, grads = draw(*SHAPE), draw(2, 7, 12, seed=2), torch.tensor([0.9, 0.4], dtype=torch.float64), []
    for net in (plain, recomputed):
        answer = net(x, t, Condition(text=text), taps=(1,))
        (answer.x0.square().sum() + answer.features[0].sum()).backward()
        grads.append({name: parameter.grad for name, parameter in net.module.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)


ASKED: dict[str, Any] = {
    "height": 32, "width": 48, "num_inference_steps": 5, "guidance_scale": 6.0, "output_type": "latent", "return_dict": False,
}  # fmt: skip


@pytest.mark.parametrize("spec", [B2, B5, B15], ids=["2b", "5b", "1.5"])
def test_ode_sampling_is_the_upstream_pipeline_with_its_own_ddim(spec: CogVideoXSpec) -> None:
    net, text, negative = network(spec), draw(2, 7, 12, seed=2), draw(2, 7, 12, seed=3)
    noise = draw(2, 4, 4 if spec.patch_t else 3, 4, 6, seed=5)
    scheduler = scheduler_of(spec)
    made = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=net.module, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    theirs = made(
        prompt_embeds=text, negative_prompt_embeds=negative, num_frames=4 * noise.shape[2] - 3,
        latents=noise.transpose(1, 2), **ASKED,
    )[0].transpose(1, 2)  # fmt: skip
    torch.testing.assert_close(sampled(net, noise, scheduler, Condition(text=text), Condition(text=negative)), theirs, **CLOSE)


CLOSE = {"rtol": 0, "atol": 1e-4}


@torch.no_grad()
def sampled(net: CogVideoX, noise: Tensor, scheduler: Any, cond: Condition, negative: Condition) -> Tensor:
    times = (scheduler.timesteps.double() + 1) / 1000
    assert float(times[0]) == 1.0
    return samplers.few_step(guided(net, negative, 6.0), noise, times, cond, renoise="ode")


@pytest.mark.parametrize("spec", [replace(B5, learned_positions=True), replace(B15, motion_dim=8)], ids=["5b", "1.5"])
def test_image_to_video_is_the_upstream_pipeline(spec: CogVideoXSpec) -> None:
    net, text, negative = network(spec, has_picture=True), draw(1, 7, 12, seed=2), draw(1, 7, 12, seed=3)
    torch.manual_seed(1)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, scaling_factor=0.7,
    ).eval()  # fmt: skip
    noise, picture = draw(1, 4, 4 if spec.patch_t else 3, 4, 6, seed=5), draw(1, 3, 32, 48, seed=7).clamp(-1, 1)
    scheduler = scheduler_of(spec)
    made = CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=net.module, scheduler=scheduler
    )
    made.set_progress_bar_config(disable=True)
    with torch.no_grad():
        posterior = vae.encode(picture[:, :, None]).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(8))  # the pipeline draws; our codec takes the middle
    theirs = made(
        image=picture / 2 + 0.5, prompt_embeds=text, negative_prompt_embeds=negative, num_frames=4 * noise.shape[2] - 3,
        latents=noise.transpose(1, 2), generator=torch.Generator().manual_seed(8), **ASKED,
    )[0].transpose(1, 2)  # fmt: skip
    beside = from_picture(0.7 * drawn, noise.shape[2])
    cond, other = (Condition(text=words, beside=beside) for words in (text, negative))
    torch.testing.assert_close(sampled(net, noise, scheduler, cond, other), theirs, **CLOSE)


def test_what_does_not_fit_is_said() -> None:
    x, text = draw(*SHAPE), draw(2, 7, 12, seed=2)
    t = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]], dtype=torch.float64)
    one = network()(x, t[:, 0], Condition(text=text))
    torch.testing.assert_close(network()(x, t, Condition(text=text)).x0, one.x0, rtol=0, atol=1e-6)
    t[0, 0] = 0.1
    with pytest.raises(ValueError, match="one time for the whole clip"):
        network()(x, t, Condition(text=text))
    with pytest.raises(ValueError, match="2 latent frames at a time, and 3 do not divide"):
        network(B15)(x, t[:, 1], Condition(text=text))
    with pytest.raises(ValueError, match=r"latents of its picture from cond\.beside"):
        network(has_picture=True)(x, t[:, 1], Condition(text=text))
