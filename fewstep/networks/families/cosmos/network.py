"""Cosmos-Predict on the real diffusers class, `CosmosTransformer3DModel`.

Two families share it. Predict2 and Predict2.5 are rectified flows: the raw output is the velocity, its time is s in [0, 1]
(Predict2's own code speaks of sigma = s / (1 - s) and divides its state by 1 + sigma: the same network input and output).
Predict1 is EDM (Karras et al. 2022): x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4).

Given frames are marked by the mask channel; the prediction keeps them. They enter clean, or in Predict1 and Transfer1 with a
little noise (`cond.noisy_frames`). In most flow networks they also have a
time of their own next to 0 (`clean_time`); in Predict1 they have the time of the others. Every frame may have its own time.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import EDM, Cache, Path, Prediction, RectifiedFlow, StudentSampler, TrigFlow
from fewstep.diffusion.path import spread, working_dtype
from fewstep.diffusion.precondition import edm_preconditioning, with_noise
from fewstep.diffusion.prediction import with_clean_frames
from fewstep.errors import UserError
from fewstep.networks.causal_attention import Sites, counts_anew
from fewstep.networks.contract import DiffusersSpec, Distillation, Scheduling, Traits, with_copies
from fewstep.networks.families.cosmos.attention import CosmosCrossAttention, CosmosSelfAttention, rotate
from fewstep.networks.families.cosmos.keys import original_names, refuse_apart
from fewstep.networks.families.cosmos.second_time import FIRST, SECOND, TwoTimes, both
from fewstep.networks.families.cosmos.transfer1 import Transfer1Branch
from fewstep.networks.families.upstream import Adapter, enters_in_compute_dtype, refuse_context
from fewstep.networks.files.folders import from_folder
from fewstep.networks.taps import block_outputs
from fewstep.networks.tokens import Sharing, follow_plans, refuse_heads
from fewstep.parallel import Context

SMALLEST_SIGMA = 1e-5  # of an EDM network's input
CLEAN_TIME = 1e-4  # flow time of given frames (Predict2 and 2.5, sigma_conditional)
# g in cond + g (cond - uncond), by family and whether there are controls: the defaults of the inference commands of Predict1,
# Transfer1, Predict2 and 2.5, Transfer2.5.
_GUIDANCE = {("edm", False): 7.0, ("edm", True): 5.0, ("flow", False): 7.0, ("flow", True): 3.0}
# The published students: Transfer1 in one step, Predict2.5 and Transfer2.5 in four.
_FOUR_STEPS = StudentSampler((math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)), TrigFlow(), "same")
_ONE_STEP = StudentSampler((80.0,), EDM(sigma_data=0.5))
_STUDENT = {("edm", False): None, ("edm", True): _ONE_STEP, ("flow", False): _FOUR_STEPS, ("flow", True): _FOUR_STEPS}


@dataclass(frozen=True)
class Cosmos(Adapter):
    module: nn.Module  # CosmosTransformer3DModel, or a Controlled one (control.py)
    family: Literal["flow", "edm"] = "flow"
    sigma_data: float = 1.0  # edm only: Predict1 and Transfer1 0.5
    use_fps: bool = False  # Predict1 and Predict2 turn the rate of frames into positions; Predict2.5 does not
    clean_time: float | None = CLEAN_TIME  # flow only; None: given frames have the time of the others
    controls: tuple[str, ...] = ()  # which of cond.control a Controlled module reads
    control_weights: Mapping[str, float] | None = None  # of the controls; None: those the module was built with
    frame_noise: float = 0.0  # sigma of the noise on given frames when it is sampled
    reads_end: bool = False  # has a second time (second_time.py)

    @property
    def traits(self) -> Traits:
        config = self.base.config
        return Traits(
            lora_targets=(
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ),  # as Predict2.5's LoRA post-training
            first_frames="mask" if config.in_channels > config.out_channels else "none",
            controls=self.controls,
            reads_end=self.reads_end,
            side_multiple=max(config.patch_size[1:]),
            latent_channels=config.out_channels,
            text_channels=config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim,
            guidance=1 + _GUIDANCE[self.family, bool(self.controls)],
            student=_STUDENT[self.family, bool(self.controls)],
            scheduling=Scheduling(needs_own_loop=True),
            pipeline_settings={
                "family": self.family,
                "sigma_data": self.sigma_data,
                "use_fps": self.use_fps,
                "clean_time": self.clean_time,
                "frame_noise": self.frame_noise,
            },
        )

    @property
    def path(self) -> Path:
        return RectifiedFlow() if self.family == "flow" else EDM(sigma_data=self.sigma_data)

    @property
    def base(self) -> Any:  # Any: a diffusers class, whose stubs know nothing of its config and blocks
        """The CosmosTransformer3DModel, without its control branches."""
        return self.module.base if self.controls else self.module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        branches: Any = self.module.branches.values() if self.controls else ()  # pyright: ignore[reportCallIssue]  # an attribute of a module
        return (*self.base.transformer_blocks, *(block for branch in branches for block in branch.control_blocks))

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        refuse_context(cond)
        x = x_t.to(working_dtype(x_t))
        if self.family == "flow":
            raw, features = self._ask(x, x, t, cond, taps)
            answer = Prediction(x, t, self.path, raw, features)
        else:
            c = edm_preconditioning(t.clamp(min=SMALLEST_SIGMA), self.sigma_data)
            c_in, c_skip, c_out = (spread(value, x).to(x.dtype) for value in (c.c_in, c.c_skip, c.c_out))
            raw, features = self._ask(x, c_in * x, t, cond, taps)
            answer = Prediction.of("x0", c_skip * x + c_out * raw, x, t, self.path, features)
        return with_clean_frames(answer, cond.frames, cond.frame_mask)

    def sites(self) -> Sites:
        base, config = self.base, self.base.config
        if self.controls:
            raise UserError("a Cosmos network with control branches cannot be causal yet: its branches see the whole clip")
        if config.extra_pos_embed_type:
            raise UserError(
                "this Cosmos network cannot be causal: it adds learned positions to every block (Predict1), which do not move "
                "with a window of frames. Predict2 and Predict2.5 can be causal"
            )
        if config.patch_size[0] != 1:
            raise UserError("this Cosmos network cannot be causal: one of its tokens covers several latent frames")
        return Sites(
            base.rope,
            [block.attn1 for block in base.transformer_blocks],
            [block.attn2 for block in base.transformer_blocks],
            CosmosSelfAttention,
            None if config.img_context_dim_in else CosmosCrossAttention,
            rotate,
            config.max_size[0],
        )

    def share_tokens(self, context: Context) -> None:
        base, sharing = self.base, Sharing(context, rotate)
        refuse_heads(context, base.config.num_attention_heads)
        branches: Any = list(self.module.branches.values()) if self.controls else []  # pyright: ignore[reportCallIssue]  # an attribute of a module
        for blocks in (base.transformer_blocks, *(branch.control_blocks for branch in branches)):
            follow_plans([block.attn1 for block in blocks], CosmosSelfAttention)
            beside = ("embedded_timestep", "temb", "extra_pos_emb")
            sharing.blocks(blocks, "image_rotary_emb", ("hidden_states", "latents"), beside)
        for branch in branches:
            if isinstance(branch, Transfer1Branch):
                sharing.enters(branch.hint)
        sharing.beside(base.norm_out)
        sharing.leaves(base.proj_out)

    def with_control_weights(self, weights: Mapping[str, float]) -> Cosmos:
        return replace(self, control_weights={name: weights.get(name, 0.0) for name in self.controls})

    def with_frames(self, cond: Condition, frames: Tensor, mask: Tensor) -> Condition:
        cond = super().with_frames(cond, frames, mask)
        if not self.frame_noise:
            return cond
        # One noise for all clips and calls, as the original's fixed seed: it belongs to the model and not to the clip.
        noise = torch.randn((1, *frames.shape[1:]), generator=torch.Generator().manual_seed(1)).to(frames)
        sigma = torch.full((len(frames),), self.frame_noise, dtype=torch.float64, device=frames.device)
        return replace(cond, noisy_frames=with_noise(frames, sigma, noise, self.sigma_data))

    def parts(self) -> dict[str, Any]:
        if not self.controls:
            return super().parts()
        module: Any = self.module
        branches = list(module.branches.values())
        if len(branches) != 1 or isinstance(branches[0], Transfer1Branch):
            raise UserError(
                "--format diffusers: diffusers has control branches of Transfer2.5, one at a time; this network has "
                f"{', '.join(self.controls)}. Take --format safetensors or pt-original"
            )
        return {"transformer": module.base, "controlnet": branches[0]}

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return with_copies(weights, FIRST, SECOND) if self.reads_end else weights

    def in_original_names(self) -> dict[str, Tensor]:
        if self.reads_end:
            raise UserError("--format pt-original: the original Cosmos code has no second time; take --format safetensors")
        state = self.module.state_dict()
        names = original_names(state, "1" if self.family == "edm" else "2")
        refuse_apart({name: (lambda tensor=tensor: tensor) for name, tensor in state.items()})
        return {names[name]: tensor.contiguous().clone() for name, tensor in state.items() if name in names}

    def _ask(
        self, x: Tensor, scaled: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The raw output in x's type, and the tapped blocks' outputs as B C T H W."""
        config = self.base.config
        if cond.text is None:
            raise UserError(
                "Cosmos reads its prompt from cond.text (B, tokens, channels), and the batch has none. Embed captions (fewstep "
                "prepare text; --prompt TEXT gives one to all), and set data.text=t5_xxl"
            )
        num, _, frames, height, width = scaled.shape
        num_frames = 1 if counts_anew(self.base.rope) else frames  # a causal network counts positions from each chunk's first
        _refuse_unfit(config, (scaled.shape[1], num_frames, height, width), cond.text)
        times = [self._time(t), *([self._time(t if cond.end is None else cond.end)] if self.reads_end else [])]
        extra: dict[str, Any] = {}
        if config.in_channels > config.out_channels:
            mask = torch.zeros(num, frames, device=x.device) if cond.frame_mask is None else cond.frame_mask
            is_given = mask.bool()
            beginning = cond.frames if cond.noisy_frames is None else cond.noisy_frames
            if beginning is not None:
                scaled = torch.where(is_given[:, None, :, None, None], self._as_input(beginning.to(x)), scaled)
                if self.clean_time is not None and self.family == "flow":
                    clean = torch.full((), self.clean_time, dtype=t.dtype, device=t.device)
                    times = [torch.where(is_given, clean, time if time.ndim == 2 else time[:, None]) for time in times]
            extra["condition_mask"] = mask[:, None, :, None, None].expand(-1, 1, -1, height, width).to(x.dtype)
        elif cond.frame_mask is not None:
            raise UserError(
                "this Cosmos network has no channel that tells given frames (a text-to-world one), but some are given"
            )
        if config.concat_padding_mask or self.controls:
            supply_resize()
            extra["padding_mask"] = _one_padding(cond.padding, height, width, x)
        if self.use_fps and cond.fps is not None:
            extra["fps"] = _one_rate(cond.fps)
        if self.controls:
            extra["controls"] = self._controls(cond, scaled)
            extra["control_weights"] = self.control_weights
        if any(time.ndim == 2 for time in times):
            times = [(time if time.ndim == 2 else time[:, None]).expand(num, frames)[:, None, :, None, None] for time in times]
        start, *ends = (time.float() for time in times)  # float32: bf16 would round 0.999 to 1
        with block_outputs(self.module, self.base.transformer_blocks, taps) as outputs:
            raw = self.module(
                hidden_states=scaled,
                timestep=both(start, *ends) if ends else start,
                encoder_hidden_states=self._context(cond.text, config),
                attention_mask=self._text_mask(cond.text_mask, config),
                return_dict=False,
                **extra,
            )[0]
        patch_t, patch_h, patch_w = config.patch_size
        grid = (frames // patch_t, height // patch_h, width // patch_w)
        return raw.to(x.dtype), tuple(outputs[i].unflatten(1, grid).permute(0, 4, 1, 2, 3) for i in taps)

    def _time(self, t: Tensor) -> Tensor:
        """t as the network receives it."""
        return t if self.family == "flow" else edm_preconditioning(t.clamp(min=SMALLEST_SIGMA), self.sigma_data).c_noise

    def _as_input(self, frames: Tensor) -> Tensor:
        """Given frames as the network wants to see them: EDM nets see everything at unit spread."""
        return frames if self.family == "flow" else frames / self.sigma_data

    def _controls(self, cond: Condition, like: Tensor) -> dict[str, Tensor]:
        names = [name for name in self.controls if name in cond.control]
        if not names:
            own, have = "' or '".join(self.controls), ", ".join(cond.control) or "none"
            raise UserError(f"this network is led by the control '{own}', but the batch has {have}")
        for name in names:
            if cond.control[name].shape != like.shape:
                raise UserError(
                    f"control '{name}' has shape {tuple(cond.control[name].shape)}, but must have that of the latents, "
                    f"{tuple(like.shape)}: it is the control video, encoded like the video"
                )
        return {name: cond.control[name].to(like) for name in names}

    @staticmethod
    def _context(text: Tensor, config: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The text; beside it, for networks that also attend to a picture, the zeros that stand for no picture."""
        if not config.img_context_dim_in:
            return text
        return text, text.new_zeros(text.shape[0], config.img_context_num_tokens, config.img_context_dim_in)

    @staticmethod
    def _text_mask(mask: Tensor | None, config: Any) -> Tensor | None:
        if mask is None or not config.img_context_dim_in:
            return None if mask is None else mask.bool()
        if not bool(mask.all()):
            raise UserError("diffusers' Cosmos with a picture context takes no text mask: give cond.text without text_mask")
        return None


@kind("cosmos", group="network")
@dataclass(frozen=True)
class CosmosSpec(DiffusersSpec):
    """A CosmosTransformer3DModel: from a diffusers folder or hub id, or random of the size given."""

    has_original_names = True
    in_force = ("family", "sigma_data", "use_fps", "clean_time", "frame_noise", "end_gate")

    family: Literal["flow", "edm"] = "flow"
    sigma_data: float = 1.0
    use_fps: bool = False
    clean_time: float | None = CLEAN_TIME  # Predict2.5 14B None; no meaning for edm
    frame_noise: float = 0.0  # sigma of the noise on given frames when it is sampled; Predict1 and Transfer1 0.001
    latent_channels: int = 16
    num_heads: int = 16
    head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_dim: int = 1024  # of the embeddings inside; with text_projection_from, what they are projected to
    text_projection_from: int | None = None  # Predict2.5: 100352
    adaln_lora_dim: int = 256
    max_size: tuple[int, int, int] = (128, 240, 240)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)  # t, h, w; Predict2.5
    padding_mask: bool = True  # the channel that tells padded pixels
    learnable_positions: bool = False  # Predict1 True
    frame_mask: bool = True  # the channel that tells given frames; text-to-world networks have none
    image_context_dim: int | None = None  # Transfer2.5 1152: a second cross-attention, to the features of a picture
    image_context_tokens: int = 256
    # Weight of a second time, where the jump of a flow map ends, beside the first; AnyFlow .25. None: one time
    end_gate: float | None = None

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.end_gate is not None and not 0 < self.end_gate <= 1:
            yield "end_gate", f"must lie above 0 and be at most 1, not {self.end_gate:g}"

    @property
    def starts_as_teacher(self) -> bool:
        return self.end_gate is not None

    @property
    def path(self) -> Path:
        return RectifiedFlow() if self.family == "flow" else EDM(sigma_data=self.sigma_data)

    @property
    def shares_tokens(self) -> bool:
        return True

    @property
    def distillation(self) -> Distillation:
        if self.family == "edm":  # Transfer1: g 5
            return Distillation(guidance=6.0, clips=(121, 704, 1280), negative="zeros", kd_lr=1e-5, lr=5e-7, critic_lr=5e-7)
        rates = {"kd_lr": 1e-5, "lr": 1e-6, "critic_lr": 2e-7}
        return Distillation(guidance=4.0, clips=(93, 704, 1280), negative="zeros", **rates)  # Predict2.5: g 3

    def build(self) -> Cosmos:
        options: dict[str, Any] = {"frame_noise": self.frame_noise, "reads_end": self.end_gate is not None}
        return Cosmos(self.transformer(), self.family, self.sigma_data, self.use_fps, self.clean_time, **options)

    def export_format(self) -> tuple[str, str]:
        if self.end_gate is not None:
            return "safetensors", "diffusers has no Cosmos network with a second time, and so no pipeline for a flow map of it"
        return super().export_format()

    def transformer(self, **more: Any) -> nn.Module:
        """The CosmosTransformer3DModel; `more` are further words of its configuration."""
        from diffusers import CosmosTransformer3DModel

        if self.pretrained is not None:
            module = from_folder(CosmosTransformer3DModel, self.pretrained, "transformer")
            module.register_to_config(**more)
        else:
            module = CosmosTransformer3DModel(
                in_channels=self.latent_channels + int(self.frame_mask),
                out_channels=self.latent_channels,
                num_attention_heads=self.num_heads,
                attention_head_dim=self.head_dim,
                num_layers=self.num_layers,
                mlp_ratio=self.mlp_ratio,
                text_embed_dim=self.text_dim,
                adaln_lora_dim=self.adaln_lora_dim,
                max_size=self.max_size,
                patch_size=self.patch_size,
                rope_scale=self.rope_scale,
                concat_padding_mask=self.padding_mask,
                extra_pos_embed_type="learnable" if self.learnable_positions else None,
                use_crossattn_projection=self.text_projection_from is not None,
                crossattn_proj_in_channels=self.text_projection_from or 1024,
                encoder_hidden_states_channels=self.text_dim,
                img_context_dim_in=self.image_context_dim,
                img_context_num_tokens=self.image_context_tokens,
                img_context_dim_out=self.num_heads * self.head_dim,
                **more,
            )
        if self.end_gate is not None:
            module.add_module("time_embed", TwoTimes(module.time_embed, self.end_gate))
        return framed(module)


def framed(module: nn.Module) -> nn.Module:
    """The module with what its door needs, where FSDP may stand."""
    module.register_forward_hook(_leave_whole)
    return enters_in_compute_dtype(module, lambda cosmos: cosmos.patch_embed.proj.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]  # an attribute of a module


def _leave_whole(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The answer as a tensor of its own: FSDP warns of one that is a view, which upstream's is."""
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output


def _refuse_unfit(config: Any, shape: tuple[int, ...], text: Tensor) -> None:  # Any: diffusers' FrozenDict
    """Refuses latents (C, T, H, W) and texts that this network was not built for, before diffusers fails on their shapes."""
    channels, *sides = shape
    if channels != config.out_channels:
        raise UserError(f"this Cosmos network works on latents of {config.out_channels} channels, but was given {channels}")
    if any(side % patch for side, patch in zip(sides, config.patch_size, strict=True)):
        raise UserError(
            f"this Cosmos network reads patches of {config.patch_size} latents, which do not divide {tuple(sides)} (T H W). "
            "Prepare the latents at another --height and --width"
        )
    learnt = config.extra_pos_embed_type == "learnable"  # one table for each axis; without, one length for all of them
    longest = max(size // patch for size, patch in zip(config.max_size, config.patch_size, strict=True))
    most = [size if learnt else longest * patch for size, patch in zip(config.max_size, config.patch_size, strict=True)]
    if any(side > limit for side, limit in zip(sides, most, strict=True)):
        raise UserError(
            f"this Cosmos network has positions for latents of {tuple(most)} (frames, height, width) at most, but was given "
            f"{tuple(sides)}. Use shorter or smaller clips"
        )
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    if text.shape[-1] != width:
        raise UserError(
            f"this Cosmos network reads text embeddings of {width} numbers a token, but was given {text.shape[-1]}: embed the "
            "captions with its own text encoder (fewstep prepare text)"
        )


def _one_rate(fps: Tensor) -> float:
    """The one rate of all rows: upstream turns a single number into positions."""
    low, high = fps.min().item(), fps.max().item()
    if low != high:
        raise UserError(f"clips of {low:g} and {high:g} frames per second in one batch: Cosmos takes one rate at a time")
    return float(low)


def _one_padding(padding: Tensor | None, height: int, width: int, like: Tensor) -> Tensor:
    """(1, 1, height, width), 1 where a picture was padded: upstream takes one mask for all rows of a batch."""
    if padding is None:
        return torch.zeros(1, 1, height, width, dtype=like.dtype, device=like.device)
    if bool((padding != padding[:1]).any()):
        raise UserError(
            "pictures padded in different ways in one batch: Cosmos takes one mask at a time. Set trainer.batch_size=1, or "
            "data.resize=crop"
        )
    return functional.interpolate(padding[:1, None].to(like), size=(height, width), mode="nearest")


def supply_resize() -> None:
    """diffusers' Cosmos calls torchvision for one nearest-neighbour resize of the padding mask, and dies with a NameError
    where torchvision is absent. This supplies that one call, there and nowhere else."""
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: Tensor, size: list[int], interpolation: object) -> Tensor:
        return nn.functional.interpolate(mask, size=size, mode="nearest")

    functional = types.SimpleNamespace(resize=resize)
    modes = types.SimpleNamespace(NEAREST="nearest")
    for module in (transformer_cosmos, controlnet_cosmos):
        if not hasattr(module, "transforms"):
            module.__dict__["transforms"] = types.SimpleNamespace(functional=functional, InterpolationMode=modes)
