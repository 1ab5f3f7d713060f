"""Flux, Qwen-Image and DiT against upstream: the classes called by hand, and the pipelines of the first two."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, QwenImagePipeline
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import guided, samplers
from fewstep.networks.families.dit import Dit, DitSpec
from fewstep.networks.families.flux import Flux, FluxSpec, packed, unpacked
from fewstep.networks.families.qwen_image import QwenImage, QwenImageSpec, guided_at_length
from fewstep.parallel import World, place

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers 0.42 with numpy 2

FLUX = FluxSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, num_single_layers=2, text_dim=12, pooled_dim=10,
    rotary_dims=(4, 6, 6),
)  # fmt: skip
QWEN = QwenImageSpec(latent_channels=4, num_heads=2, head_dim=16, num_layers=3, text_dim=12, rotary_dims=(4, 6, 6))
DIT = DitSpec(num_labels=5, num_heads=2, head_dim=8, num_layers=3, sample_size=8)
SHAPE = (2, 4, 8, 6)
SQUARE = (2, 4, 8, 8)
T = torch.tensor([0.9, 0.25], dtype=torch.float64)
ALONE = World(0, 1, torch.device("cpu"), None)


def built(spec: Any) -> Any:
    """Zero-initialised parts are woken: they would hide what goes through them."""
    torch.manual_seed(0)
    net = spec.build()
    with torch.no_grad():
        for parameter in net.module.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.2)
    return net


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(seed: int = 2) -> Condition:
    return Condition(text=draw(2, 7, 12, seed=seed), pooled=draw(2, 10, seed=seed + 10))


def same_gradients(net: Any, ours: Tensor, theirs: Tensor) -> None:
    weights = list(net.module.parameters())
    got = torch.autograd.grad(ours.square().sum(), weights, allow_unused=True)
    wanted = torch.autograd.grad(theirs.square().sum(), weights, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packing_is_upstreams() -> None:
    x = draw(*SHAPE)
    theirs = FluxPipeline._pack_latents(x, 2, 4, 8, 6)
    torch.testing.assert_close(packed(x), theirs, rtol=0, atol=0)
    torch.testing.assert_close(unpacked(theirs, x), x, rtol=0, atol=0)


@pytest.mark.parametrize("has_guidance", [True, False])
def test_flux_is_the_upstream_velocity(has_guidance: bool) -> None:
    net: Flux = built(replace(FLUX, guidance=2.5, guidance_input=has_guidance))
    x, cond = draw(*SHAPE), told()
    answer = net(x, T, cond)
    upstream = net.module(
        packed(x), encoder_hidden_states=cond.text, pooled_projections=cond.pooled, timestep=T.float(),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 3, x.device, x.dtype), txt_ids=torch.zeros(7, 3),
        guidance=torch.tensor([2.5, 2.5]) if has_guidance else None, return_dict=False,
    )[0]  # fmt: skip
    wanted = unpacked(upstream, x)
    torch.testing.assert_close(answer.velocity, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0, x - T.float()[:, None, None, None] * wanted, rtol=0, atol=1e-6)
    same_gradients(net, answer.velocity, wanted)


def test_the_guidance_that_flux_is_told_changes_its_answer() -> None:
    net: Flux = built(FLUX)
    x, cond = draw(*SHAPE), told()
    assert (net(x, T, cond).velocity - Flux(net.module, 1.0)(x, T, cond).velocity).abs().max() > 1e-5


@pytest.mark.parametrize("masked", [True, False])
def test_qwen_image_is_the_upstream_velocity(masked: bool) -> None:
    net: QwenImage = built(QWEN)
    x, text = draw(*SHAPE), draw(2, 7, 12, seed=2)
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7]) if masked else None
    answer = net(x, T, Condition(text=text, text_mask=mask))
    upstream = net.module(
        packed(x), encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=T.float(),
        img_shapes=[[(1, 4, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(answer.velocity, unpacked(upstream, x), rtol=0, atol=1e-6)
    same_gradients(net, answer.velocity, unpacked(upstream, x))


def test_dit_is_the_upstream_eps_and_minus_one_is_its_class_of_none() -> None:
    net: Dit = built(DIT)
    x, t = draw(*SQUARE), torch.tensor([1.0, 0.25], dtype=torch.float64)
    answer = net(x, t, Condition(label=torch.tensor([3, -1])))
    upstream = net.module(x, torch.tensor([999, 249]), torch.tensor([3, 5]), return_dict=False)[0]
    torch.testing.assert_close(answer.eps, upstream[:, :4], rtol=0, atol=1e-4)  # a is 0.006 at t = 1
    same_gradients(net, answer.eps, upstream[:, :4])
    level = DDIMScheduler().alphas_cumprod[[249]].float()
    torch.testing.assert_close(answer.x0[1], (x[1] - (1 - level).sqrt() * upstream[1, :4]) / level.sqrt(), rtol=1e-4, atol=1e-4)
    again = [net(x, t, Condition(label=torch.tensor([3, 2]))).eps for _ in range(2)]  # training: no class is dropped
    torch.testing.assert_close(again[0], again[1], rtol=0, atol=0)


def test_sit_is_asked_from_noise_to_data() -> None:
    """At SiT's time s its state is s x + (1 - s) eps and its answer x - eps: with the exact answer ours are x and eps."""
    net: Dit = built(replace(DIT, family="flow"))
    x = draw(*SQUARE)
    answer = net(x, T, Condition(label=torch.tensor([3, -1])))
    upstream = net.module(x, 1 - T.float(), torch.tensor([3, 5]), return_dict=False)[0][:, :4]
    s = 1 - T.float()[:, None, None, None]
    torch.testing.assert_close(answer.x0, x + (1 - s) * upstream, rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.eps, x - s * upstream, rtol=0, atol=1e-5)
    same_gradients(net, answer.x0, x + (1 - s) * upstream)


@pytest.mark.parametrize("spec", [FLUX, QWEN, DIT, replace(DIT, family="flow")], ids=["flux", "qwen", "dit", "sit"])
def test_at_time_0_the_state_is_the_picture_and_at_the_end_it_is_noise(spec: Any) -> None:
    net, x = built(spec), draw(*SQUARE)
    answer = net(x, torch.tensor([0.0, 1.0], dtype=torch.float64), replace(told(), label=torch.tensor([1, 2])))
    torch.testing.assert_close(answer.x0[0], x[0], rtol=0, atol=1e-6)
    if spec is not DIT:  # its table keeps 0.006 of the picture; test_dit_.. has its eps there
        torch.testing.assert_close(answer.eps[1], x[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [FLUX, QWEN, DIT], ids=["flux", "qwen", "dit"])
def test_a_clip_of_one_frame_is_the_picture_and_recomputed_blocks_learn_the_same(spec: Any) -> None:
    plain, recomputed = built(spec), built(spec)
    place(recomputed.module, recomputed.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    x, cond = draw(*SQUARE), replace(told(), label=torch.tensor([1, 2]))
    tap = len(plain.blocks) - 1
    first, second = plain(x, T, cond, taps=(0, tap)), recomputed(x[:, :, None], T[:, None], cond, taps=(0, tap))
    torch.testing.assert_close(second.velocity[:, :, 0], first.velocity, rtol=0, atol=0)
    for a, b in zip(first.features, second.features, strict=True):
        assert a.shape[0] == 2 and a.shape[2:] == (4, 4)
        torch.testing.assert_close(b[:, :, 0], a, rtol=0, atol=0)
    for answer in (first, second):
        (answer.velocity.square().sum() + answer.features[0].sum()).backward()
    for (name, a), (_, b) in zip(plain.module.named_parameters(), recomputed.module.named_parameters(), strict=True):
        if a.grad is None:  # the text stream of Qwen-Image's last block ends there
            assert b.grad is None, name
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)


# --- whole pipelines --------------------------------------------------------------------------------------------------


def flow_schedule() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def test_euler_is_the_upstream_flux_pipeline() -> None:
    net: Flux = built(FLUX)
    noise, cond, negative, scheduler = draw(*SHAPE, seed=5), told(), told(4), flow_schedule()
    made = FluxPipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=net.module,
    )  # fmt: skip
    made.text_encoder = type("Encoder", (), {"dtype": torch.float32})()  # asked for its type, though embeddings are given
    made.set_progress_bar_config(disable=True)
    theirs = made(
        prompt_embeds=cond.text, pooled_prompt_embeds=cond.pooled, negative_prompt_embeds=negative.text,
        negative_pooled_prompt_embeds=negative.pooled, true_cfg_scale=3.0, guidance_scale=3.5, height=64, width=48,
        num_inference_steps=4, latents=packed(noise), output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    with torch.no_grad():
        ours = samplers.euler(guided(net, negative, 3.0), noise, scheduler.sigmas[:-1].double(), cond)
    torch.testing.assert_close(ours, unpacked(theirs, noise), rtol=0, atol=1e-4)


def test_euler_guided_at_length_is_the_upstream_qwen_image_pipeline() -> None:
    net: QwenImage = built(QWEN)
    noise, text, other, scheduler = draw(*SHAPE, seed=5), draw(2, 7, 12, seed=2), draw(2, 7, 12, seed=3), flow_schedule()
    made = QwenImagePipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=net.module)
    made.set_progress_bar_config(disable=True)
    mask = torch.ones(2, 7, dtype=torch.long)
    theirs = made(
        prompt_embeds=text, prompt_embeds_mask=mask, negative_prompt_embeds=other, negative_prompt_embeds_mask=mask,
        true_cfg_scale=4.0, height=64, width=48, num_inference_steps=4, latents=packed(noise), output_type="latent",
        return_dict=False,
    )[0]  # fmt: skip
    with torch.no_grad():
        teacher = guided_at_length(net, Condition(text=other), 4.0)
        ours = samplers.euler(teacher, noise, scheduler.sigmas[:-1].double(), Condition(text=text))
        clip = teacher(noise[:, :, None], T, Condition(text=text), taps=(1,))
        torch.testing.assert_close(clip.velocity[:, :, 0], teacher(noise, T, Condition(text=text)).velocity, rtol=0, atol=1e-6)
        assert len(clip.features[0]) == 2
    torch.testing.assert_close(ours, unpacked(theirs, noise), rtol=0, atol=1e-4)


def test_ode_sampling_is_the_upstream_dit_pipeline_with_ddim() -> None:
    net: Dit = built(replace(DIT, num_labels=1000))  # its pipeline knows 1000 as the class of none, and no other

    class Seen:
        """A decoder that hands over what it is given: the pipeline has no `latent` output."""

        config = type("Config", (), {"scaling_factor": 1.0})()
        latents: Tensor

        def decode(self, latents: Tensor) -> Any:
            self.latents = latents
            return type("Out", (), {"sample": latents})()

    scheduler, vae, labels = DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), Seen(), [3, 7]
    made = DiTPipeline(transformer=net.module, vae=None, scheduler=scheduler)  # type: ignore[arg-type]
    made.vae = vae
    made.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(5)
    made(class_labels=labels, guidance_scale=4.0, generator=seed, num_inference_steps=5, output_type="pt")
    noise = torch.randn(SQUARE, generator=torch.Generator().manual_seed(5))
    cond, none = Condition(label=torch.tensor(labels)), Condition(label=torch.tensor([-1, -1]))
    times = (scheduler.timesteps.double() + 1) / 1000
    with torch.no_grad():
        ours = samplers.few_step(guided(net, none, 4.0), noise, times, cond, renoise="ode")
    assert vae.latents.abs().max() > 100  # an untrained network from a = 0.006: beyond unit size, float32 counts by value
    torch.testing.assert_close(ours, vae.latents, rtol=1e-5, atol=1e-4)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"pooled vector of its prompt from cond\.pooled"):
        built(FLUX)(draw(*SHAPE), T, Condition(text=draw(2, 7, 12)))
    with pytest.raises(ValueError, match="cannot be cut into patches of 2 x 2"):
        built(QWEN)(draw(2, 4, 7, 6), T, Condition(text=draw(2, 7, 12)))
    with pytest.raises(ValueError, match=r"its class .* from cond\.label"):
        built(DIT)(draw(*SQUARE), T, Condition())
    with pytest.raises(ValueError, match="square pictures only"):
        built(DIT)(draw(*SHAPE), T, Condition(label=torch.tensor([0, 0])))


@pytest.mark.parametrize("spec", [FLUX, QWEN, DIT], ids=["flux", "qwen", "dit"])
def test_a_folder_written_by_diffusers_is_read_back(spec: Any, tmp_path: Any) -> None:
    net, x, cond = built(spec), draw(*SQUARE), replace(told(), label=torch.tensor([1, 2]))
    net.module.save_pretrained(str(tmp_path / "transformer"))
    again = replace(spec, pretrained=str(tmp_path)).build()
    torch.testing.assert_close(again(x, T, cond).velocity, net(x, T, cond).velocity, rtol=0, atol=0)
