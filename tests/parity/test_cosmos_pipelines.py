"""Sampling a teacher against upstream's whole pipelines: tiny random networks, the same noise, schedule and guidance.

Given frames: the pipelines carry them along at the speed with which they began, we at that which leads to the frame itself. No
network sees either of them, so that the other frames agree; and ours end on the frame.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.diffusion import EDM, Denoiser, guided, on_path, samplers
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import Cosmos, CosmosSpec, supply_resize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # upstream's own

SIZES: dict[str, Any] = {
    "latent_channels": 16, "num_heads": 2, "head_dim": 16, "num_layers": 2, "mlp_ratio": 2, "text_dim": 16, "adaln_lora_dim": 4,
    "max_size": (16, 16, 16),
}  # fmt: skip
FRAMES, SIDE = 9, 32  # of pixels; the latents are 3 x 4 x 4
PREDICT2_5 = CosmosSpec(**SIZES, text_projection_from=24)
PREDICT2 = CosmosSpec(**SIZES, use_fps=True)
PREDICT1 = CosmosSpec(
    **{**SIZES, "latent_channels": 4}, family="edm", sigma_data=0.5, use_fps=True, clean_time=None, learnable_positions=True
)
TRANSFER2_5 = CosmosControlSpec(**SIZES, text_projection_from=24, num_control_blocks=2, hint_channels=32, image_context_dim=12)


class NoGuard:
    """The guardrails are no part of what is compared."""

    def to(self, device: object) -> None: ...


def network(spec: CosmosSpec, gain: float = 1.0) -> Cosmos:
    torch.manual_seed(0)
    made = spec.build()
    for name, parameter in made.module.named_parameters():
        if parameter.ndim > 1:  # as built, a video DiT changes its input by little: differences must show
            torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
        elif "after_proj" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    downs = [False, True, True]
    return AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=downs).eval()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pipeline(cls: str, net: Cosmos, vae: Any, scheduler: Any, **more: Any) -> Any:
    import diffusers

    supply_resize()
    made = getattr(diffusers, cls)(
        text_encoder=None, tokenizer=None, transformer=net.base, vae=vae, scheduler=scheduler, safety_checker=NoGuard(), **more
    )
    made.set_progress_bar_config(disable=True)
    return made


def flow_unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01
    )


def conditions(latents: Tensor, num_given: int, **more: Any) -> tuple[Condition, Condition]:
    mask = torch.zeros(1, latents.shape[2])
    mask[:, :num_given] = 1
    given = {"frames": latents, "frame_mask": mask} if num_given else {}
    text, empty = (draw(1, 6, 24 if "wide" in more else 16, seed=seed) for seed in (2, 3))
    more.pop("wide", None)
    return Condition(text=text, **given, **more), Condition(text=empty, **given, **more)


@pytest.mark.parametrize("num_given", [0, 1, 2])
def test_predict2_5_from_text_an_image_or_a_video(num_given: int) -> None:
    net, vae, scheduler = network(PREDICT2_5), wan_vae(), flow_unipc()
    pipe = pipeline("Cosmos2_5_PredictBasePipeline", net, vae, scheduler)
    noise, video = draw(1, 16, 3, 4, 4, seed=4), draw(1, 3, FRAMES, SIDE, SIDE, seed=5).clamp(-1, 1)
    seen = 4 * (num_given - 1) + 1
    padded = torch.cat([video[:, :, -seen:], video[:, :, -1:].expand(-1, -1, FRAMES - seen, -1, -1)], 2)
    with torch.no_grad():
        mean, spread = (torch.tensor(vae.config[name]).reshape(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        frames = (vae.encode(padded).latent_dist.mode() - mean) / spread if num_given else noise
        cond, negative = conditions(frames, num_given, wide=True)
        theirs = pipe(
            video=video if num_given else None,
            num_latent_conditional_frames=num_given or 2,
            prompt_embeds=cond.text,
            negative_prompt_embeds=negative.text,
            latents=noise,
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=5,
            guidance_scale=3.0,
            output_type="latent",
        ).frames
        grid = scheduler.sigmas[:-1].double()
        ours = samplers.unipc(guided(net, negative, 4.0), noise, grid, cond)
    assert (theirs - noise).abs().max() > 1  # something was done
    torch.testing.assert_close(ours[:, :, num_given:], theirs[:, :, num_given:], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[:, :, :num_given], frames[:, :, :num_given], rtol=0, atol=1e-5)


def test_transfer2_5_led_by_edges() -> None:
    net, vae, scheduler = network(TRANSFER2_5), wan_vae(), flow_unipc()
    module: Any = net.module
    pipe = pipeline("Cosmos2_5_TransferPipeline", net, vae, scheduler, controlnet=module.branches["edge"])
    noise, edges = draw(1, 16, 3, 4, 4, seed=4), draw(1, 3, FRAMES, SIDE, SIDE, seed=5).sigmoid()
    with torch.no_grad():
        mean, spread = (torch.tensor(vae.config[name]).reshape(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        hint = (vae.encode(2 * edges - 1).latent_dist.mean - mean) / spread
        cond, negative = conditions(noise, 0, wide=True, control={"edge": hint})

        def encode(
            video: Tensor,
        ) -> Any:  # the pipeline draws from the posterior, with a generator of its own; ours is its mean
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput

            found = real(video)
            found.latent_dist.sample = lambda generator=None: found.latent_dist.mean
            return AutoencoderKLOutput(latent_dist=found.latent_dist)

        real, vae.encode = vae.encode, encode
        theirs = pipe(
            controls=edges.transpose(1, 2),
            controls_conditioning_scale=1.0,
            prompt_embeds=cond.text,
            negative_prompt_embeds=negative.text,
            latents=noise,
            height=SIDE,
            width=SIDE,
            num_frames_per_chunk=FRAMES,
            num_inference_steps=5,
            guidance_scale=3.0,
            output_type="latent",
        ).frames
        ours = samplers.unipc(guided(net, negative, 4.0), noise, scheduler.sigmas[:-1].double(), cond)
        unled = samplers.unipc(
            guided(net, replace(negative, control={"edge": -hint}), 4.0), noise, scheduler.sigmas[:-1].double(),
            replace(cond, control={"edge": -hint}),
        )  # fmt: skip
    shown = theirs if theirs.shape == ours.shape else theirs.reshape(ours.shape)
    torch.testing.assert_close(ours, shown, rtol=0, atol=1e-4)
    assert (ours - unled).abs().max() > 0.01  # the edges matter


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_karras(
    pipe: Any, denoiser: Denoiser, noise: Tensor, *, video: Tensor | None = None, num_frames: int | None = None, **more: Any
) -> tuple[Tensor, Tensor]:
    """(ours, theirs) at the last sigma, which these pipelines hand out, of the frames that are free; from sigma 80."""
    start, given, num_given = 80 * noise, noise, 0  # the pipelines multiply what they are given by sigma
    more |= {} if num_frames is None else {"num_frames": num_frames}
    told = {"fps": torch.tensor([float(more["fps"])])} if "fps" in more else {}
    with torch.no_grad():
        if video is not None:
            start, given, indicator, *_ = pipe.prepare_latents(
                2 * video - 1, 1, noise.shape[1], SIDE, SIDE, num_frames, do_classifier_free_guidance=True, dtype=torch.float32,
                device=torch.device("cpu"), generator=seeded(), latents=noise,
            )  # fmt: skip
            num_given = int(indicator.sum())
            more |= {"video": video.transpose(1, 2), "generator": seeded()}
        cond, negative = conditions(given, num_given, **told)
        theirs = pipe(
            prompt_embeds=cond.text, negative_prompt_embeds=negative.text, latents=noise,
            height=SIDE, width=SIDE, num_inference_steps=5, guidance_scale=3.0, output_type="latent", return_dict=False, **more,
        )[0]  # fmt: skip
        states: list[Tensor] = []
        grid = pipe.scheduler.sigmas[:-1].double()
        samplers.euler(guided(denoiser, negative, 4.0), start, grid, cond, on_state=lambda t, x: states.append(x))
    theirs = theirs[:, :, None] if theirs.ndim == 4 else theirs
    assert start.abs().max() > 100 > 4 * theirs[:, :, num_given:].abs().max()  # the noise is gone
    return states[-1][:, :, num_given:], theirs[:, :, num_given:]


def karras_of_2(net: Cosmos) -> Denoiser:
    return on_path(net, EDM(sigma_data=1.0))


@pytest.mark.parametrize("num_given", [1, 2])
def test_predict2_is_the_flow_network_on_karras_path(num_given: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    net = network(PREDICT2)
    pipe = pipeline("Cosmos2VideoToWorldPipeline", net, wan_vae(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    noise, video = draw(1, 16, 3, 4, 4, seed=4), draw(1, 3, 4 * (num_given - 1) + 1, SIDE, SIDE, seed=5).sigmoid()
    ours, theirs = of_karras(pipe, karras_of_2(net), noise, video=video, num_frames=FRAMES, fps=16)
    assert ours.shape[2] == 3 - num_given
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_predict2_from_text_to_an_image() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    net = network(replace(PREDICT2, frame_mask=False, rope_scale=(1.0, 4.0, 4.0)))
    pipe = pipeline("Cosmos2TextToImagePipeline", net, wan_vae(), FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    ours, theirs = of_karras(pipe, karras_of_2(net), draw(1, 16, 1, 4, 4, seed=4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def cosmos_vae() -> Any:
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(1)
    return AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, patch_type="haar",
    ).eval()  # fmt: skip


def edm_euler() -> Any:
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip


@pytest.mark.parametrize("num_given", [1, 2])
def test_predict1_is_the_karras_network_that_tells_given_frames_by_their_channel_only(num_given: int) -> None:
    net = network(PREDICT1)
    pipe = pipeline("CosmosVideoToWorldPipeline", net, cosmos_vae(), edm_euler())
    noise, video = draw(1, 4, 3, 4, 4, seed=4), draw(1, 3, 8 * (num_given - 1) + 1, SIDE, SIDE, seed=5).sigmoid()
    # augment_sigma is noise of 0.001 on the given frames, new at every step: not what is compared
    ours, theirs = of_karras(pipe, net, noise, video=video, num_frames=17, fps=30, augment_sigma=0.0)
    assert ours.shape[2] == 3 - num_given
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_noise_on_given_frames_is_that_of_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's loop with an augment_sigma of 0.3, which shows, and with our noise for its own."""
    level, shape = 0.3, (1, 4, 3, 4, 4)
    net = network(replace(PREDICT1, frame_noise=level))
    noise, latents, mask = draw(*shape, seed=4), draw(*shape, seed=6), torch.tensor([[1.0, 1.0, 0.0]])
    cond = net.with_frames(Condition(text=draw(1, 6, 16, seed=2), fps=torch.tensor([24.0])), latents, mask)
    assert cond.noisy_frames is not None and torch.equal(cond.frames, latents)  # pyright: ignore[reportArgumentType]
    scheduler, sigma, fixed = edm_euler(), 2.0, torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # CosmosVideoToWorldPipeline.__call__, the lines that compose the input of the network
    theirs = (latents + fixed * level) * scheduler._get_conditioning_c_in(torch.tensor(level))
    theirs = theirs / scheduler._get_conditioning_c_in(torch.tensor(sigma))
    seen: list[Tensor] = []
    net.module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        answer = net(sigma * noise, torch.tensor([sigma], dtype=torch.float64), cond)
    wanted = theirs * scheduler._get_conditioning_c_in(torch.tensor(sigma))
    torch.testing.assert_close(seen[0][:, :, :2], wanted[:, :, :2], rtol=0, atol=1e-6)
    torch.testing.assert_close(answer.x0[:, :, :2], latents[:, :, :2], rtol=0, atol=1e-6)  # and what is kept is clean


def test_predict1_from_text() -> None:
    net = network(replace(PREDICT1, frame_mask=False))
    pipe = pipeline("CosmosTextToWorldPipeline", net, cosmos_vae(), edm_euler())
    ours, theirs = of_karras(pipe, net, draw(1, 4, 3, 4, 4, seed=4), num_frames=17, fps=24)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
