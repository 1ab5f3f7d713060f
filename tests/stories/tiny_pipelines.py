"""Tiny random pipelines of diffusers' own classes, each with its tokenizer, text encoder, autoencoder and scheduler, and clips.

wan(folder)  cogvideox(folder)  predict1(folder)  predict2(folder)  predict25(folder)  sdxl(folder)
python tests/stories/tiny_pipelines.py wan FOLDER
clips(folder, num)        moving squares with captions, no file of which this package writes
pictures(folder, num)     their first frames
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "square",
    "dot",
    "moves",
    "slowly",
    "quickly",
    "to",
    "the",
    "left",
    "right",
    "up",
    "down",
    "over",
    "dark",
    "bright",
    "ground",
    ".",
]
SPECIAL = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for part in m['content'] %}{{ part['text'] }}{% endfor %} "
    "<|im_end|> {% endfor %}"
)
TEXT = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
WAN_VAE = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def wan(folder: Path) -> Path:
    """Wan 2.1: UMT5, a flow with shift 3."""
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _saved(folder, "WanPipeline", network, _wan_vae(), scheduler, _t5("UMT5EncoderModel"), _tokenizer())


def predict1(folder: Path) -> Path:
    """Cosmos-Predict1 Text2World: T5, EDM."""
    from diffusers import AutoencoderKLCosmos, EDMEulerScheduler

    torch.manual_seed(1)
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, patch_type="haar",
    )  # fmt: skip
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    network = _cosmos(positions="learnable")
    return _saved(folder, "CosmosTextToWorldPipeline", network, vae, scheduler, _t5("T5EncoderModel"), _tokenizer())


def predict2(folder: Path) -> Path:
    """Cosmos-Predict2 Video2World: T5, a flow on the grid of Karras et al."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    network = _cosmos(in_channels=5)
    return _saved(folder, "Cosmos2VideoToWorldPipeline", network, _wan_vae(), scheduler, _t5("T5EncoderModel"), _tokenizer())


def predict25(folder: Path) -> Path:
    """Cosmos-Predict2.5: the layers of a Qwen2.5-VL, a flow."""
    from diffusers import UniPCMultistepScheduler
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(3)
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(WORDS) + len(SPECIAL),
        "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01
    )
    network = _cosmos(in_channels=5, use_crossattn_projection=True, crossattn_proj_in_channels=48)
    tokens = _tokenizer(ends=False)
    return _saved(folder, "Cosmos2_5_PredictBasePipeline", network, _wan_vae(), scheduler, encoder, tokens)


def cogvideox(folder: Path) -> Path:
    """CogVideoX 2B: T5 of 226 tokens, v-prediction on a shifted table."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    torch.manual_seed(6)
    network = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=226,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, scaling_factor=0.7,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    return _saved(folder, "CogVideoXPipeline", network, vae, scheduler, _t5("T5EncoderModel"), _tokenizer())


def sdxl(folder: Path) -> Path:
    """Stable Diffusion XL: two CLIPs, eps on a scaled linear table; 32 x 32 pixels to latents of 4 x 4 x 4."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(7)
    network = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, cross_attention_dim=36,
        attention_head_dim=(2, 2), transformer_layers_per_block=(1, 1), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    _saved(folder, "StableDiffusionXLPipeline", network, vae, scheduler, _clip("CLIPTextModel", 16), _tokenizer(most=77))
    second = {"text_encoder_2": _clip("CLIPTextModelWithProjection", 20), "tokenizer_2": _tokenizer(most=77)}
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": True}
    for name, part in second.items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers", type(part).__name__]
    (folder / "transformer").rename(folder / "unet")
    index["unet"] = index.pop("transformer")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


PIPELINES = {
    "wan": wan,
    "cogvideox": cogvideox,
    "predict1": predict1,
    "predict2": predict2,
    "predict25": predict25,
    "sdxl": sdxl,
}


def clips(folder: Path, num: int = 8, frames: int = 9, side: int = 32, fps: int = 16) -> Path:
    """videos/*.mp4 and metas/*.txt: squares of one colour that move over a ground, each with its caption."""
    rng = np.random.default_rng(0)
    for part in ("videos", "metas"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
    ways = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    for number in range(num):
        colour, way = list(colours)[number % 3], list(ways)[number % 4]
        ground, speed = ("dark", "bright")[number % 2], 1 + number % 2
        y, x = rng.integers(side // 4, side // 2, 2)
        with av.open(str(folder / "videos" / f"clip_{number:03d}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            for t in range(frames):
                picture = np.full((side, side, 3), 40 if ground == "dark" else 190, np.uint8)
                top, left = (int(at + step * speed * t) % side for at, step in zip((y, x), ways[way], strict=True))
                picture[top : top + side // 4, left : left + side // 4] = colours[colour]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        pace = "quickly" if speed == 2 else "slowly"
        text = f"a {colour} square moves {pace} to the {way} over a {ground} ground"
        (folder / "metas" / f"clip_{number:03d}.txt").write_text(text + "\n")
    return folder


def pictures(folder: Path, num: int = 4, side: int = 32) -> Path:
    """images/*.png and metas/*.txt: the first frames of `clips`."""
    clips(folder, num, 1, side)
    (folder / "images").mkdir()
    for file in sorted((folder / "videos").iterdir()):
        with av.open(str(file)) as container:
            next(container.decode(video=0)).to_image().save(folder / "images" / f"{file.stem}.png")
        file.unlink()
    (folder / "videos").rmdir()
    return folder


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _cosmos(in_channels: int = 4, positions: str | None = None, **more: Any) -> Any:
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(2)
    return CosmosTransformer3DModel(
        in_channels=in_channels, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2.0,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 16, 16), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True,
        encoder_hidden_states_channels=16, extra_pos_embed_type=positions, **more,
    )  # fmt: skip


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(4)
    return AutoencoderKLWan(**WAN_VAE, **STATISTICS)  # pyright: ignore[reportArgumentType]


def _t5(cls: str) -> Any:
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, "UMT5Config" if cls.startswith("UMT5") else "T5Config")
    return getattr(transformers, cls)(config(**TEXT, vocab_size=len(WORDS) + len(SPECIAL)))


def _clip(cls: str, width: int) -> Any:
    import transformers

    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=12,
        vocab_size=len(WORDS) + len(SPECIAL), max_position_embeddings=77, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return getattr(transformers, cls)(config)


def _tokenizer(ends: bool = True, most: int = 512) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace() if ends else pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if ends:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=most, chat_template=TEMPLATE, **names)


def _saved(folder: Path, pipeline: str, network: Any, vae: Any, scheduler: Any, encoder: Any, tokens: Any) -> Path:
    """As the pipeline saves itself; a part of it alone needs no safety checker to be opened."""
    parts = {"transformer": network, "vae": vae, "scheduler": scheduler, "text_encoder": encoder, "tokenizer": tokens}
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers" if name in ("text_encoder", "tokenizer") else "diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


if __name__ == "__main__":
    PIPELINES[sys.argv[1]](Path(sys.argv[2]))
