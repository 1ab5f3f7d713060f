"""Wan 2.1 and 2.2 on the real diffusers class, `WanTransformer3DModel`: rectified flows asked at 1000 t.

    T2V            text only
    I2V (14B)      the picture comes on 20 more channels (cond.beside: 4 of mask, 16 of latents), and in 2.1 also as features
                   (cond.image); every frame is generated, the first too
    TI2V (2.2 5B)  given frames (cond.frames, cond.frame_mask) enter clean, at a time of their own, 0; the answer keeps them

Every frame may carry its own noise level: the class takes a time per token. That costs a modulation of 6 x width numbers for
each token instead of one for each clip, so one time per clip is passed as one.

The two experts of 2.2 A14B are two of these networks (experts.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow
from fewstep.diffusion.path import working_dtype
from fewstep.diffusion.prediction import with_clean_frames
from fewstep.errors import UserError
from fewstep.networks.causal_attention import Sites
from fewstep.networks.contract import Beginning, DiffusersSpec, Distillation, Traits
from fewstep.networks.families.upstream import FlowAdapter, enters_in_compute_dtype, needed, refuse_context, zero_padded
from fewstep.networks.families.wan.attention import WanCrossAttention, WanSelfAttention, rotate
from fewstep.networks.taps import block_outputs
from fewstep.networks.tokens import Sharing, follow_plans, refuse_heads
from fewstep.parallel import Context

TEXT_TOKENS = 512  # what all were trained with; beside a picture's features diffusers counts the last 512 as text, always
FRAMES_PER_LATENT = 4  # of the Wan VAEs; the first latent holds one frame


@dataclass(frozen=True)
class Wan(FlowAdapter):
    module: nn.Module  # WanTransformer3DModel
    whole_times: bool = False  # ask at floor(1000 t), as upstream's UniPC sampler does
    text_tokens: int = TEXT_TOKENS  # shorter texts are padded with zeros, which it attends to

    blocks_part = "blocks"

    @property
    def traits(self) -> Traits:
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
        reads_image, has_picture = config.image_dim is not None, config.in_channels > config.out_channels
        own_pipeline = {"family": "wan", "whole_times": self.whole_times, "text_tokens": self.text_tokens}
        return Traits(
            lora_targets=(*targets, "add_k_proj", "add_v_proj") if reads_image else targets,
            first_frames="picture" if has_picture else "time",  # the latter is what 2.2 5B was trained for
            reads_image=reads_image,
            side_multiple=max(config.patch_size[1:]),
            latent_channels=config.out_channels,
            text_channels=config.text_dim,
            pipeline_settings=None if has_picture else own_pipeline,
        )

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        refuse_context(cond)
        x = x_t.to(working_dtype(x_t))
        config: Any = self.module.config  # Any: diffusers' FrozenDict
        num, channels, frames, height, width = x.shape
        if channels != config.out_channels:
            raise UserError(f"this Wan network works on latents of {config.out_channels} channels, but was given {channels}")
        text = text_of(cond, TEXT_TOKENS if config.image_dim is not None else self.text_tokens)
        if text.shape[-1] != config.text_dim:
            raise UserError(
                f"this Wan network reads text embeddings of {config.text_dim} numbers a token, but was given {text.shape[-1]}: "
                "embed the captions with its own text encoder (fewstep prepare text)"
            )
        if any(side % patch for side, patch in zip((frames, height, width), config.patch_size, strict=True)):
            raise UserError(
                f"this Wan network reads patches of {tuple(config.patch_size)} latents, which do not divide "
                f"{(frames, height, width)} (T H W). Prepare the latents at another --height and --width"
            )
        inputs, time = x, 1000 * t.double()
        if self.whole_times:
            time = (time + 1e-4).floor()  # their sigmas are float32: 937 may read 936.99995
        if cond.frames is not None and cond.frame_mask is not None:
            is_given = cond.frame_mask.bool()
            inputs = torch.where(is_given[:, None, :, None, None], cond.frames.to(x), x)
            time = torch.where(is_given, 0.0, time if time.ndim == 2 else time[:, None])
        extra: dict[str, Any] = {}
        if config.in_channels > config.out_channels:
            inputs = torch.cat([inputs, self._beside(cond, x, config.in_channels - config.out_channels)], 1)
        elif cond.beside is not None:
            raise UserError("this Wan network has no channels for a picture (cond.beside); those made for I2V have")
        if config.image_dim is not None:
            extra["encoder_hidden_states_image"] = needed(cond, "image", "Wan 2.1 I2V", "the features of its picture")
        patch_t, patch_h, patch_w = config.patch_size
        grid = (frames // patch_t, height // patch_h, width // patch_w)
        if time.ndim == 2:  # one for every token
            time = time.expand(num, frames)[:, ::patch_t].repeat_interleave(grid[1] * grid[2], 1)
        with block_outputs(self.module, self.blocks, taps) as outputs:
            raw = self.module(
                hidden_states=inputs, timestep=time.float(), encoder_hidden_states=text, return_dict=False, **extra
            )[0]
        features = tuple(outputs[i].unflatten(1, grid).permute(0, 4, 1, 2, 3) for i in taps)
        answer = Prediction(x, t, self.path, raw.to(x.dtype), features)
        return with_clean_frames(answer, cond.frames, cond.frame_mask)

    def begin(self, cond: Condition, beginning: Beginning) -> Condition:
        traits, pixels = self.traits, beginning.pixels
        if traits.first_frames != "picture":
            return super().begin(cond, beginning)
        grey = pixels.new_zeros(1, 3, beginning.num_frames - pixels.shape[2], *pixels.shape[3:])
        cond = replace(cond, beside=start_from(beginning.codec.encode(torch.cat([pixels, grey], 2))))
        if not traits.reads_image:
            return cond
        if beginning.image_features is None:
            raise UserError("Wan 2.1 I2V also reads its picture's CLIP features: give --image-encoder, a pipeline's folder")
        return replace(cond, image=beginning.image_features(pixels[:, :, 0]))

    def sites(self) -> Sites:
        module: Any = self.module
        if module.config.patch_size[0] != 1:
            raise UserError("this Wan network cannot be causal: one of its tokens covers several latent frames")
        return Sites(
            module.rope,
            [block.attn1 for block in module.blocks],
            [block.attn2 for block in module.blocks],
            WanSelfAttention,
            WanCrossAttention,
            rotate,
            module.config.rope_max_seq_len,
        )

    def share_tokens(self, context: Context) -> None:
        module: Any = self.module
        refuse_heads(context, module.config.num_attention_heads)
        follow_plans([block.attn1 for block in module.blocks], WanSelfAttention)
        sharing = Sharing(context, rotate)
        sharing.blocks(module.blocks, "rotary_emb", ("hidden_states",))
        sharing.leaves(module.proj_out)
        module.condition_embedder.register_forward_pre_hook(partial(_own_times, context), prepend=True, with_kwargs=True)

    @staticmethod
    def _beside(cond: Condition, x: Tensor, channels: int) -> Tensor:
        beside = needed(cond, "beside", "Wan I2V", f"its picture ({channels} channels, see wan.start_from)")
        shape = (x.shape[0], channels, *x.shape[2:])
        if beside.shape != shape:
            raise UserError(f"cond.beside has shape {tuple(beside.shape)}, but this network reads {shape} beside its latents")
        return beside.to(x)


def text_of(cond: Condition, tokens: int) -> Tensor:
    """The prompt, B N D, filled up with zeros to this number of tokens."""
    text = zero_padded(needed(cond, "text", "Wan", "its prompt (B, tokens, channels)"), cond.text_mask)
    if text.shape[1] > tokens:
        raise UserError(f"Wan reads prompts of {tokens} tokens at the most, and cond.text has {text.shape[1]}")
    return nn.functional.pad(text, (0, 0, 0, tokens - text.shape[1]))


def _own_times(context: Context, embedder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where every token has a time, the embedder receives those of this process's tokens."""
    total = kwargs.get("timestep_seq_len")
    if total is None:
        return None
    times = context.own(args[0].unflatten(0, (-1, total)))
    return (times.flatten(), *args[1:]), {**kwargs, "timestep_seq_len": times.shape[1]}


def start_from(latents: Tensor, *, last: bool = False) -> Tensor:
    """cond.beside of Wan I2V, B 20 T H W: 4 channels of mask, then `latents`, the codec's of a clip that is mid-grey (0) but
    for its first frame, and its last one if `last`.

    Four mask channels, because a latent frame holds four frames of pixels; the first latent repeats its only one.
    """
    num, _, frames, height, width = latents.shape
    mask = latents.new_zeros(num, FRAMES_PER_LATENT, frames, height, width)
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return torch.cat([mask, latents], 1)


@kind("wan", group="network")
@dataclass(frozen=True)
class WanSpec(DiffusersSpec):
    """A WanTransformer3DModel: from a diffusers folder or hub id, or random of the size given; that of 2.1 T2V 1.3B."""

    in_force: ClassVar[tuple[str, ...]] = ("subfolder", "whole_times", "text_tokens")
    path: ClassVar[Path] = RectifiedFlow()

    subfolder: str = "transformer"  # of a pipeline's folder; the low-noise expert of A14B lies in transformer_2
    whole_times: bool = False
    latent_channels: int = 16  # 2.2 5B 48
    beside_channels: int = 0  # I2V 14B and A14B: 20
    num_heads: int = 12  # 14B 40, 5B 24
    head_dim: int = 128
    num_layers: int = 30  # 14B 40
    ffn_dim: int = 8960  # 14B 13824, 5B 14336
    text_dim: int = 4096  # UMT5-XXL
    text_tokens: int = TEXT_TOKENS
    freq_dim: int = 256
    image_dim: int | None = None  # 2.1 I2V 1280, CLIP ViT-H
    image_tokens: int | None = None  # of both pictures together, where first and last frame are given: 514; else None
    max_positions: int = 1024

    @property
    def shares_tokens(self) -> bool:
        return True

    @property
    def distillation(self) -> Distillation:
        return Distillation(guidance=5.0, clips=(81, 720, 1280), kd_lr=7e-5, lr=1e-5, critic_lr=1e-5)  # FastGen, 1.3B

    def build(self) -> Wan:
        module = self.in_diffusers(
            "WanTransformer3DModel",
            self.subfolder,
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            in_channels=self.latent_channels + self.beside_channels,
            out_channels=self.latent_channels,
            text_dim=self.text_dim,
            freq_dim=self.freq_dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.num_layers,
            image_dim=self.image_dim,
            added_kv_proj_dim=None if self.image_dim is None else self.num_heads * self.head_dim,
            rope_max_seq_len=self.max_positions,
            pos_embed_seq_len=self.image_tokens,
        )
        return Wan(enters_in_compute_dtype(module, lambda wan: wan.patch_embedding.weight), self.whole_times, self.text_tokens)


# The published networks.
T2V_1_3B = WanSpec()  # Wan 2.1
T2V_14B = WanSpec(num_heads=40, num_layers=40, ffn_dim=13824)  # Wan 2.1, and each expert of 2.2 T2V A14B
I2V_14B = replace(T2V_14B, beside_channels=20, image_dim=1280)  # Wan 2.1
FLF2V_14B = replace(I2V_14B, image_tokens=514)  # Wan 2.1, from first and last frame: 257 features of each
TI2V_5B = WanSpec(latent_channels=48, num_heads=24, ffn_dim=14336)  # Wan 2.2
A14B_I2V = replace(T2V_14B, beside_channels=20)  # each expert of Wan 2.2 I2V A14B
