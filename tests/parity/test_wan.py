"""The Wan adapter against upstream: the class called by hand as its pipelines call it, and the pipelines themselves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.diffusion import guided, samplers
from fewstep.networks.families.wan.experts import Experts, ExpertsSpec
from fewstep.networks.families.wan.network import Wan, WanSpec, start_from
from fewstep.parallel import World, place

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers 0.42 with numpy 2

SMALL = WanSpec(
    num_heads=2,
    head_dim=12,
    num_layers=3,
    ffn_dim=32,
    text_dim=16,
    text_tokens=7,
    freq_dim=16,
    latent_channels=4,
    max_positions=32,
)
SHAPE = (2, 4, 3, 4, 6)
ALONE = World(0, 1, torch.device("cpu"), None)


def network(seed: int = 0, **changes: Any) -> Wan:
    torch.manual_seed(seed)
    return replace(SMALL, **changes).build()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_gradients(net: Any, ours: Tensor, theirs: Tensor) -> None:
    weights = list(net.module.parameters())
    got = torch.autograd.grad(ours.square().sum(), weights, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(theirs.square().sum(), weights, allow_unused=True, retain_graph=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_text_to_video_is_the_upstream_velocity_at_a_thousand_t() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    t = torch.tensor([0.999, 0.3], dtype=torch.float64)
    answer = net(x, t, Condition(text=text))
    upstream = net.module(x, torch.tensor([999.0, 300.0]), text, return_dict=False)[0]
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    same_gradients(net, answer.velocity, upstream)


def test_the_two_ends_of_the_path_are_read_right() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    answer = net(x, torch.tensor([0.0, 1.0], dtype=torch.float64), Condition(text=text))
    torch.testing.assert_close(answer.x0[0], x[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.eps[1], x[1], rtol=0, atol=1e-6)


def test_every_frame_may_carry_its_own_time_and_one_for_all_is_the_same_as_one_for_each() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    t = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    tokens = (1000 * t).float().repeat_interleave(2 * 3, 1)  # patches of 2 x 2
    upstream = net.module(x, tokens, text, return_dict=False)[0]
    answer = net(x, t, Condition(text=text))
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0, x - t.float()[:, None, :, None, None] * upstream, rtol=0, atol=1e-6)

    one = torch.tensor([0.9, 0.2], dtype=torch.float64)
    each = net(x, one[:, None].expand(-1, 3), Condition(text=text))
    torch.testing.assert_close(net(x, one, Condition(text=text)).velocity, each.velocity, rtol=0, atol=1e-6)


def test_given_frames_enter_clean_at_time_0_and_are_kept() -> None:
    """As Wan 2.2 5B's image-to-video pipeline writes it; row by row, so that rows may differ in what is given."""
    net, x, text, frames = network(), draw(*SHAPE), draw(2, 7, 16, seed=2), draw(*SHAPE, seed=3)
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    answer = net(x, torch.tensor([0.7, 0.3], dtype=torch.float64), Condition(text=text, frames=frames, frame_mask=mask))
    for row, t in enumerate((700.0, 300.0)):
        first_frame_mask = (1 - mask[row])[None, :, None, None].expand(1, 3, 4, 6)
        shown = (1 - first_frame_mask) * frames[row : row + 1] + first_frame_mask * x[row : row + 1]
        temp_ts = (first_frame_mask[0][:, ::2, ::2] * t).flatten()
        upstream = net.module(shown, temp_ts[None], text[row : row + 1], return_dict=False)[0]
        free = slice(int(mask[row].sum()), None)
        torch.testing.assert_close(answer.velocity[row, :, free], upstream[0, :, free], rtol=0, atol=1e-6)
        same_gradients(net, answer.velocity[row, :, free], upstream[0, :, free])
    torch.testing.assert_close(answer.x0[0, :, 0], frames[0, :, 0], rtol=0, atol=1e-6)


def test_image_to_video_reads_its_picture_beside_the_latents_and_as_features() -> None:
    net = network(beside_channels=8, image_dim=10)
    x, text, image, latents = draw(*SHAPE), draw(2, 512, 16, seed=2), draw(2, 5, 10, seed=3), draw(*SHAPE, seed=4)
    cond = Condition(text=text, image=image, beside=start_from(latents))
    answer = net(x, torch.tensor([0.9, 0.4], dtype=torch.float64), cond)
    mask = torch.zeros(2, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    upstream = net.module(
        torch.cat([x, mask, latents], 1),
        torch.tensor([900.0, 400.0]),
        text,
        encoder_hidden_states_image=image,
        return_dict=False,
    )[0]
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    same_gradients(net, answer.velocity, upstream)
    other = net(x, torch.tensor([0.9, 0.4], dtype=torch.float64), replace(cond, image=-image))
    assert (answer.velocity - other.velocity).abs().max() > 1e-5

    ends = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)  # a time for each frame
    answer = net(x, ends, cond)
    upstream = net.module(
        torch.cat([x, mask, latents], 1), (1000 * ends).float().repeat_interleave(2 * 3, 1), text,
        encoder_hidden_states_image=image, return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0[0, :, 0], x[0, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.eps[0, :, 2], x[0, :, 2], rtol=0, atol=1e-6)


def test_padding_is_shown_as_zeros() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    t, mask = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    zeroed = text.clone()
    zeroed[0, 3:] = 0
    answer = net(x, t, Condition(text=text, text_mask=mask))
    torch.testing.assert_close(answer.velocity, net(x, t, Condition(text=zeroed)).velocity, rtol=0, atol=0)
    longer = nn.functional.pad(zeroed, (0, 0, 0, 505))
    upstream = net.module(x, torch.tensor([900.0, 400.0]), longer, return_dict=False)[0]
    full = Wan(net.module)  # 512 tokens
    torch.testing.assert_close(full(x, t, Condition(text=text, text_mask=mask)).velocity, upstream, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"prompts of 7 tokens at the most, and cond\.text has 8"):
        net(x, t, Condition(text=draw(2, 8, 16)))


def test_taps_are_the_blocks_own_outputs() -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    kept: list[Tensor] = []
    handle = net.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output))
    answer = net(x, torch.tensor([0.5, 0.5], dtype=torch.float64), Condition(text=text), taps=(1, 2))
    handle.remove()
    assert [tuple(f.shape) for f in answer.features] == [(2, 24, 3, 2, 3)] * 2
    torch.testing.assert_close(answer.features[0].permute(0, 2, 3, 4, 1).flatten(1, 3), kept[0], rtol=0, atol=0)


def test_recomputed_blocks_give_the_same_answer_and_gradients() -> None:
    plain, recomputed = network(), network()
    place(recomputed.module, recomputed.blocks, ALONE, mode="ddp", compute=torch.float32, trained=True, checkpointing=True)
    x, text, t = draw(*SHAPE), draw(2, 7, 16, seed=2), torch.tensor([0.9, 0.4], dtype=torch.float64)
    grads = []
    for net in (plain, recomputed):
        answer = net(x, t, Condition(text=text), taps=(1,))
        (answer.x0.square().sum() + answer.features[0].sum()).backward()
        grads.append({name: parameter.grad for name, parameter in net.module.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)


def test_time_stays_exact_in_bf16() -> None:
    """bf16 would round 999 to 1000: the answers at 0.999 and 1 must differ, and inputs may come in float32."""
    net = network()
    net.module.to(torch.bfloat16)
    seen: list[Tensor] = []
    net.module.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    answer = net(draw(*SHAPE), torch.tensor([0.999, 0.5], dtype=torch.float64), Condition(text=draw(2, 7, 16, seed=2)))
    torch.testing.assert_close(seen[0], torch.tensor([999.0, 500.0]), rtol=0, atol=0)
    assert answer.velocity.dtype == torch.float32


# --- whole pipelines --------------------------------------------------------------------------------------------------


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2)


def text_pair(tokens: int = 7) -> tuple[Tensor, Tensor]:
    return draw(2, tokens, 16, seed=2), draw(2, tokens, 16, seed=3)


def pipeline(net: Wan, scheduler: Any, **more: Any) -> WanPipeline:
    made = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=net.module, **more)
    made.set_progress_bar_config(disable=True)
    return made


def run(made: Any, noise: Tensor, steps: int = 5, **more: Any) -> Tensor:
    text, negative = text_pair()
    return made(
        prompt_embeds=text, negative_prompt_embeds=negative, height=32, width=48, num_frames=9, num_inference_steps=steps,
        guidance_scale=5.0, latents=noise, output_type="latent", return_dict=False, **more,
    )[0]  # fmt: skip


@pytest.mark.parametrize("per_token", [False, True])
def test_euler_is_the_upstream_pipeline_with_flow_match_euler(per_token: bool) -> None:
    """per_token: 2.2 5B, whose pipeline gives every token its time even where all are the same."""
    net, noise = network(), draw(*SHAPE, seed=5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs = run(pipeline(net, scheduler, expand_timesteps=per_token), noise)
    text, negative = text_pair()
    with torch.no_grad():
        teacher = guided(net, Condition(text=negative), 5.0)
        ours = samplers.euler(teacher, noise, scheduler.sigmas[:-1].double(), Condition(text=text))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_unipc_is_the_upstream_pipeline_with_its_own_sampler() -> None:
    """Its UniPC asks the network at whole timesteps, which `whole_times` repeats; without it the answers differ."""
    net, noise = network(whole_times=True), draw(*SHAPE, seed=5)
    scheduler = unipc()
    theirs = run(pipeline(net, scheduler), noise, steps=6)
    text, negative = text_pair()
    grid = scheduler.sigmas[:-1].double()
    assert (scheduler.timesteps - 1000 * grid).abs().max() > 0.1
    with torch.no_grad():
        ours = samplers.unipc(guided(net, Condition(text=negative), 5.0), noise, grid, Condition(text=text))
        exact = replace(net, whole_times=False)
        other = samplers.unipc(guided(exact, Condition(text=negative), 5.0), noise, grid, Condition(text=text))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (other - theirs).abs().max() > 1e-4


def tiny_vae(channels: int) -> AutoencoderKLWan:
    torch.manual_seed(1)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels, latents_std=[2.0] * channels,
    )  # fmt: skip
    return vae.eval()


def encoded(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.encode(clip).latent_dist.mode() - 0.1) / 2.0


def image_pipeline(net: Any, vae: AutoencoderKLWan, scheduler: Any, **more: Any) -> WanImageToVideoPipeline:
    made = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=net.module, **more
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("last", [False, True])
def test_image_to_video_is_the_upstream_pipeline(last: bool) -> None:
    net, vae = network(beside_channels=8, image_dim=10), tiny_vae(4)
    noise, image, pictures = draw(*SHAPE, seed=5)[:1], draw(1, 5, 10, seed=6), draw(2, 3, 32, 48, seed=7).clamp(-1, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = image_pipeline(net, vae, scheduler)
    made.encode_image = lambda *args: image  # type: ignore[method-assign]  # it refuses features beside a picture
    text, negative = text_pair(512)
    theirs = made(
        image=pictures[:1] / 2 + 0.5, last_image=pictures[1:] / 2 + 0.5 if last else None, prompt_embeds=text[:1],
        negative_prompt_embeds=negative[:1], height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=5.0,
        latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    clip = torch.zeros(1, 3, 9, 32, 48)
    clip[:, :, 0] = pictures[:1]
    if last:
        clip[:, :, -1] = pictures[1:]
    beside = start_from(encoded(vae, clip), last=last)
    cond, other = (Condition(text=words[:1], image=image, beside=beside) for words in (text, negative))
    with torch.no_grad():
        ours = samplers.euler(guided(net, other, 5.0), noise, scheduler.sigmas[:-1].double(), cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_5b_image_to_video_is_the_upstream_pipeline() -> None:
    net, vae = network(), tiny_vae(4)
    noise, picture = draw(*SHAPE, seed=5)[:1], draw(1, 3, 32, 48, seed=7).clamp(-1, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = image_pipeline(net, vae, scheduler, expand_timesteps=True)
    text, negative = text_pair()
    theirs = made(
        image=picture / 2 + 0.5, prompt_embeds=text[:1], negative_prompt_embeds=negative[:1], height=32, width=48, num_frames=9,
        num_inference_steps=4, guidance_scale=5.0, latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    frames = torch.zeros_like(noise)
    frames[:, :, :1] = encoded(vae, picture[:, :, None])
    given = {"frames": frames, "frame_mask": torch.tensor([[1.0, 0.0, 0.0]])}
    with torch.no_grad():
        teacher = guided(net, Condition(text=negative[:1], **given), 5.0)
        ours = samplers.euler(teacher, noise, scheduler.sigmas[:-1].double(), Condition(text=text[:1], **given))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def experts(boundary: float = 0.875, **changes: Any) -> Experts:
    torch.manual_seed(0)
    spec = replace(SMALL, **changes)
    return ExpertsSpec(spec, spec, boundary).build()


@pytest.mark.parametrize("each", [False, True], ids=["one time", "a time for each frame"])
def test_two_experts_answer_and_learn_as_the_two_classes_called_by_hand(each: bool) -> None:
    net, x, text = experts(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    t = torch.tensor([[0.1, 0.5, 1.0], [0.3, 0.0, 0.8]] if each else [1.0, 0.0], dtype=torch.float64)
    answer = net(x, t, Condition(text=text))
    told = (1000 * t).float()
    told = told.repeat_interleave(2 * 3, 1) if each else told
    rows = [
        module(x[i : i + 1], told[i : i + 1], text[i : i + 1], return_dict=False)[0]
        for i, module in enumerate((net.high.module, net.low.module))  # the noisiest frame decides
    ]
    upstream = torch.cat(rows)
    torch.testing.assert_close(answer.velocity, upstream, rtol=0, atol=1e-6)
    level = (t if each else t[:, None]).float()[:, None, :, None, None]
    torch.testing.assert_close(answer.x0, x - level * upstream, rtol=0, atol=1e-6)
    same_gradients(net, answer.velocity, upstream)


def test_two_experts_from_an_image_are_the_upstream_pipeline() -> None:
    """Wan 2.2 I2V A14B: no features of the picture, its latents beside the state of either expert."""
    net, vae = experts(0.9, beside_channels=8), tiny_vae(4)
    noise, picture = draw(*SHAPE, seed=5)[:1], draw(1, 3, 32, 48, seed=7).clamp(-1, 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = image_pipeline(net.high, vae, scheduler, transformer_2=net.low.module, boundary_ratio=0.9)
    text, negative = text_pair()
    theirs = made(
        image=picture / 2 + 0.5, prompt_embeds=text[:1], negative_prompt_embeds=negative[:1], height=32, width=48, num_frames=9,
        num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=3.0, latents=noise, output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    grid = scheduler.sigmas[:-1].double()
    assert bool((grid >= 0.9).any()) and bool((grid < 0.9).any())
    beside = start_from(encoded(vae, torch.cat([picture[:, :, None], torch.zeros(1, 3, 8, 32, 48)], 2)))
    cond, other = (Condition(text=words[:1], beside=beside) for words in (text, negative))
    with torch.no_grad():
        ours = samplers.euler(guided(net, other, 4.0, below=(net.boundary, 3.0)), noise, grid, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("low", [5.0, 3.0])
def test_two_experts_are_the_upstream_pipeline_with_two_transformers(low: float) -> None:
    """low: the guidance of the low-noise expert, the other's being 5."""
    net, noise = experts(), draw(*SHAPE, seed=5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = pipeline(net.high, scheduler, transformer_2=net.low.module, boundary_ratio=0.875)  # type: ignore[arg-type]
    theirs = run(made, noise, steps=6, guidance_scale_2=low)
    grid = scheduler.sigmas[:-1].double()
    assert bool((grid >= 0.875).any()) and bool((grid < 0.875).any())
    text, negative = (Condition(text=words) for words in text_pair())
    teacher = guided(net, negative, 5.0) if low == 5.0 else guided(net, negative, 5.0, below=(net.boundary, low))
    with torch.no_grad():
        ours = samplers.euler(teacher, noise, grid, text)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    x, t, text = draw(*SHAPE), torch.tensor([0.5, 0.5], dtype=torch.float64), draw(2, 7, 16, seed=2)
    with pytest.raises(ValueError, match=r"reads its prompt .* from cond\.text"):
        network()(x, t, Condition())
    with pytest.raises(ValueError, match=r"has no channels for a picture"):
        network()(x, t, Condition(text=text, beside=draw(*SHAPE)))
    with pytest.raises(ValueError, match=r"reads its picture .* from cond\.beside"):
        network(beside_channels=8)(x, t, Condition(text=text))
    with pytest.raises(ValueError, match=r"reads \(2, 8, 3, 4, 6\) beside its latents"):
        network(beside_channels=8)(x, t, Condition(text=text, beside=draw(*SHAPE)))
    with pytest.raises(ValueError, match=r"features of its picture from cond\.image"):
        network(image_dim=10)(x, t, Condition(text=text))
    with pytest.raises(ValueError, match="latents of 4 channels, but was given 5"):
        network()(draw(2, 5, 3, 4, 6), t, Condition(text=text))
    with pytest.raises(ValueError, match="tap 3 is no block"):
        network()(x, t, Condition(text=text), taps=(3,))
    with pytest.raises(ValueError, match="not causal"):
        network().new_cache(x)


def test_a_folder_written_by_diffusers_is_read_back(tmp_path: Any) -> None:
    net, x, text = network(), draw(*SHAPE), draw(2, 7, 16, seed=2)
    net.module.save_pretrained(str(tmp_path / "transformer_2"))  # type: ignore[operator]
    again = WanSpec(pretrained=str(tmp_path), subfolder="transformer_2", text_tokens=7).build()
    t = torch.tensor([0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(
        again(x, t, Condition(text=text)).velocity, net(x, t, Condition(text=text)).velocity, rtol=0, atol=0
    )
