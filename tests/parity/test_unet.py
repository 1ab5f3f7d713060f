"""SDXL and Stable Diffusion against upstream: the class called by hand as its pipelines call it, and the pipelines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import VP, guided, samplers
from fewstep.networks.families.unet import Unet, UnetSpec
from fewstep.parallel import World, place

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers 0.42 with numpy 2
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

XL = UnetSpec(
    widths=(8, 16, 16), num_heads=(1, 2, 2), transformer_layers=(1, 1, 2), layers_per_block=1, norm_groups=4, text_dim=12,
    pooled_dim=10, size_dim=8, sample_size=8,
)  # fmt: skip
SD = replace(XL, widths=(8, 16), num_heads=(2, 2), transformer_layers=(1, 1), with_attention=(True, False),
             linear_projection=False, pooled_dim=None)  # fmt: skip
SHAPE = (2, 4, 8, 8)
ALONE = World(0, 1, torch.device("cpu"), None)


def network(spec: UnetSpec = XL, **changes: Any) -> Unet:
    torch.manual_seed(0)
    net = replace(spec, **changes).build()
    net.module.eval()
    return net


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(seed: int = 2) -> Condition:
    size = torch.tensor([[96.0, 80.0, 4.0, 6.0, 64.0, 64.0], [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return Condition(text=draw(2, 7, 12, seed=seed), pooled=draw(2, 10, seed=seed + 10), size=size)


def table() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def test_sdxl_is_the_upstream_eps_at_the_entry_of_its_table() -> None:
    net, x, cond = network(), draw(*SHAPE), told()
    answer = net(x, torch.tensor([1.0, 0.4], dtype=torch.float64), cond)
    added = {"text_embeds": cond.pooled, "time_ids": cond.size}
    upstream = net.module(x, torch.tensor([999, 399]), cond.text, added_cond_kwargs=added, return_dict=False)[0]
    torch.testing.assert_close(answer.eps, upstream, rtol=0, atol=2e-5)  # at t = 1 the state is 15 times the data's share
    level = table()[[999, 399]].float()[:, None, None, None]
    torch.testing.assert_close(answer.x0, (x - (1 - level).sqrt() * upstream) / level.sqrt(), rtol=1e-4, atol=1e-4)
    same_gradients(net, answer.eps, upstream)


def test_at_time_0_the_state_is_the_picture() -> None:
    net, x = network(), draw(*SHAPE)
    torch.testing.assert_close(net(x, torch.zeros(2, dtype=torch.float64), told()).x0, x, rtol=0, atol=1e-6)


def test_a_clip_of_one_frame_is_the_picture_and_taps_are_what_each_block_hands_on() -> None:
    net, x, cond = network(), draw(*SHAPE), told()
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    picture = net(x, t, cond, taps=(0, 3, 4))
    clip = net(x[:, :, None], t[:, None], cond, taps=(0, 3, 4))
    torch.testing.assert_close(clip.velocity[:, :, 0], picture.velocity, rtol=0, atol=0)
    assert [tuple(f.shape) for f in picture.features] == [(2, 8, 4, 4), (2, 16, 2, 2), (2, 16, 4, 4)]
    for a, b in zip(clip.features, picture.features, strict=True):
        torch.testing.assert_close(a[:, :, 0], b, rtol=0, atol=0)


def test_sizes_not_given_are_those_of_the_picture_uncropped() -> None:
    net, x, cond = network(), draw(*SHAPE), told()
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    whole = replace(cond, size=torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2))
    torch.testing.assert_close(net(x, t, replace(cond, size=None)).eps, net(x, t, whole).eps, rtol=0, atol=0)


def same_gradients(net: Unet, ours: Tensor, theirs: Tensor) -> None:
    weights = list(net.module.parameters())
    got, wanted = (torch.autograd.grad(value.square().sum(), weights) for value in (ours, theirs))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_stable_diffusion_is_the_upstream_eps_at_the_entry_of_its_table() -> None:
    net, x, text = network(SD), draw(*SHAPE), draw(2, 7, 12, seed=2)
    answer = net(x, torch.tensor([1.0, 0.4], dtype=torch.float64), Condition(text=text))
    upstream = net.module(x, torch.tensor([999, 399]), text, return_dict=False)[0]
    torch.testing.assert_close(answer.eps, upstream, rtol=0, atol=2e-5)
    same_gradients(net, answer.eps, upstream)
    ends = net(x, torch.zeros(2, dtype=torch.float64), Condition(text=text))
    torch.testing.assert_close(ends.x0, x, rtol=0, atol=1e-6)


def test_v_prediction_is_read_as_lin_et_al_write_it() -> None:
    net, x, text = network(SD, predicts="v"), draw(*SHAPE), draw(2, 7, 12, seed=2)
    answer = net(x, torch.tensor([1.0, 0.4], dtype=torch.float64), Condition(text=text))
    v = net.module(x, torch.tensor([999, 399]), text, return_dict=False)[0]
    level = table()[[999, 399]].float()[:, None, None, None]
    torch.testing.assert_close(answer.x0, level.sqrt() * x - (1 - level).sqrt() * v, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.eps, (1 - level).sqrt() * x + level.sqrt() * v, rtol=0, atol=1e-5)
    same_gradients(net, answer.x0, level.sqrt() * x - (1 - level).sqrt() * v)


def test_recomputed_blocks_give_the_same_answer_and_gradients() -> None:
    plain, recomputed = network(), network()
    place(plain.module, plain.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True)
    place(recomputed.module, recomputed.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    x, t, grads = draw(*SHAPE), torch.tensor([0.9, 0.4], dtype=torch.float64), []
    for net in (plain, recomputed):
        answer = net(x, t, told(), taps=(3,))
        (answer.x0.square().sum() + answer.features[0].sum()).backward()
        grads.append({name: parameter.grad for name, parameter in net.module.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)


# --- whole pipelines --------------------------------------------------------------------------------------------------


class Size:
    """What the pipeline asks of a text encoder whose embeddings it is given."""

    dtype = torch.float32
    config = type("Config", (), {"projection_dim": 10})()


def times_of(scheduler: Any) -> Tensor:
    return (scheduler.timesteps.double() + 1) / 1000


def test_ode_sampling_is_the_upstream_sdxl_pipeline_with_its_own_euler() -> None:
    """Euler in the noise-to-signal ratio is DDIM, and DDIM is the roll-out with renoise=ode."""
    net, noise, cond, negative = network(), draw(*SHAPE, seed=5), replace(told(), size=None), replace(told(3), size=None)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    made = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=net.module,
        scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    made.text_encoder_2 = Size()
    made.set_progress_bar_config(disable=True)
    theirs = made(
        prompt_embeds=cond.text, negative_prompt_embeds=negative.text, pooled_prompt_embeds=cond.pooled,
        negative_pooled_prompt_embeds=negative.pooled, height=64, width=64, num_inference_steps=6, guidance_scale=5.0,
        latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    with torch.no_grad():
        ours = samplers.few_step(guided(net, negative, 5.0), noise, times_of(scheduler), cond, renoise="ode")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("predicts", ["eps", "v"], ids=["1.5", "2.1"])
def test_ode_sampling_is_the_upstream_sd_pipeline_with_ddim(predicts: Any) -> None:
    net, noise = network(SD, predicts=predicts), draw(*SHAPE, seed=5)
    text, negative = draw(2, 7, 12, seed=2), draw(2, 7, 12, seed=3)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="trailing", prediction_type={"eps": "epsilon", "v": "v_prediction"}[predicts],
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=net.module, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    theirs = made(
        prompt_embeds=text, negative_prompt_embeds=negative, height=64, width=64, num_inference_steps=5, guidance_scale=7.5,
        latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    with torch.no_grad():
        teacher = guided(net, Condition(text=negative), 7.5)
        ours = samplers.few_step(teacher, noise, times_of(scheduler), Condition(text=text), renoise="ode")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"pooled vector of its prompt from cond\.pooled"):
        network()(draw(*SHAPE), t, Condition(text=draw(2, 7, 12)))
    with pytest.raises(ValueError, match="makes pictures"):
        network()(draw(2, 4, 3, 8, 8), t, told())
    with pytest.raises(ValueError, match="cannot be conditioned on given frames"):
        network()(draw(*SHAPE), t, replace(told(), frame_mask=torch.ones(2, 1)))


def test_a_folder_written_by_diffusers_is_read_back(tmp_path: Any) -> None:
    net, x, t = network(), draw(*SHAPE), torch.tensor([0.4, 0.6], dtype=torch.float64)
    net.module.save_pretrained(str(tmp_path / "unet"))  # type: ignore[operator]
    again = UnetSpec(pretrained=str(tmp_path)).build()
    assert again.path == VP("scaled_linear")
    again.module.eval()
    torch.testing.assert_close(again(x, t, told()).eps, net(x, t, told()).eps, rtol=0, atol=0)
