"""What a story begins with: clips, and tiny random models of the real classes in the real file formats and places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fewstep.data.files import arrays, masks, video
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.keys import SHARED, Generation, original_names
from fewstep.networks.families.cosmos.network import CosmosSpec

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "ball", "blue", "box", "rolls", "right", "left", "clip", "0", "1", "2", "3")


def clips(folder: Path, num: int = 2, frames: int = 9, size: tuple[int, int] = (16, 16)) -> None:
    """videos/*.mp4 and metas/*.txt: blocks of colour that move."""
    rng = np.random.default_rng(0)
    (folder / "metas").mkdir(parents=True, exist_ok=True)
    for n in range(num):
        picture = rng.integers(0, 255, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        moving = np.stack([np.roll(picture, frame, 1) for frame in range(frames)])
        video.write(folder / "videos" / f"{n}.mp4", moving, 24.0, quality="lossless")
        (folder / "metas" / f"{n}.txt").write_text(f"a red ball rolls clip {n}\n")


def results_of_other_models(
    folder: Path, control: str, num: int = 2, frames: int = 9, size: tuple[int, int] = (16, 16)
) -> None:
    """What `prepare controls --type depth|seg|keypoint --from FOLDER` reads, for each clip."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for n in range(num):
        if control == "depth":
            np.save(folder / f"{n}.npy", rng.random((frames, *size), dtype=np.float32))
        elif control == "seg":
            mask = np.zeros((frames, *size), bool)
            mask[:, 4:12, 4 : 8 + n] = True
            masks.write(folder / f"{n}.pickle", [("ball", mask)])
        else:
            body = np.concatenate([rng.random((133, 2)), np.ones((133, 1))], 1).astype(np.float16)
            people = {frame: [{"body-keypoints": body, "hand-keypoints": body[91:]}] for frame in range(frames)}
            arrays.write_pickle(folder / f"{n}.pickle", people)


def tokenizer(**more: Any) -> Any:
    """A tokenizer of transformers that knows `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **names, **more)


def t5(folder: Path, dim: int = 8) -> None:
    """A T5 encoder and its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": dim, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    T5EncoderModel(T5Config(**sizes, pad_token_id=0)).save_pretrained(folder)


def cosmos_codec(folder: Path, ratio: int = 4) -> None:
    """The tokenizer of Cosmos 1 as diffusers has it: 9 x 16 x 16 pixels (ratio 8: 17 x 32 x 32) to latents of 2 x 3 x 4 x 4."""
    from diffusers import AutoencoderKLCosmos

    torch.manual_seed(0)
    AutoencoderKLCosmos(
        latent_channels=2, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=ratio,
        temporal_compression_ratio=ratio, latents_mean=[0.1, -0.1], latents_std=[0.7, 1.3],
    ).save_pretrained(folder / "vae")  # fmt: skip


def original_weights(spec: CosmosSpec, generation: Generation, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a network under the names of the original Cosmos code."""
    torch.manual_seed(seed)
    module: Any = spec.build().module
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5 * weight.shape[-1] ** -0.5)
    if isinstance(spec, CosmosControlSpec) and spec.style == "transfer2_5":  # what a branch repeats is equal to its base's
        for branch in module.branches.values():
            for own, again in SHARED.items():
                if getattr(module.base, own, None) is not None:
                    getattr(branch, again).load_state_dict(getattr(module.base, own).state_dict())
    state = module.state_dict()
    return {theirs: state[ours].clone() for ours, theirs in original_names(state, generation).items()}


def settings(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values)))


def qwen(folder: Path) -> None:
    """A Qwen2.5-VL and its tokenizer, which Predict2.5 reads its prompts with: 3 layers of 16 channels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(WORDS), "rope_scaling": {"mrope_section": [1, 1, 2], "type": "mrope"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder / "text_encoder")
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}{{ part['text'] }}{% endfor %} {% endfor %}"
    )
    tokenizer(chat_template=template).save_pretrained(folder / "tokenizer")


def wan_codec(folder: Path, channels: int = 4) -> None:
    """Wan's autoencoder: 9 x 32 x 32 pixels to latents of 4 x 3 x 4 x 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    AutoencoderKLWan(
        base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels, latents_std=[1.5] * channels,
    ).save_pretrained(folder / "vae")  # fmt: skip


def pipeline(folder: Path, cls: str, **parts: str) -> None:
    """model_index.json of a pipeline with these parts, each a class of diffusers or transformers."""
    import diffusers

    index = {name: ["diffusers" if hasattr(diffusers, part) else "transformers", part] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": cls, **index}))
