"""What training, inference and export need of a network besides being a Denoiser, and of its configuration.

A network family is two classes, each of which inherits its defaults from here:

    class MyNetwork(NetworkDefaults): path, module, blocks, __call__     and what differs from the defaults
    class MySpec(NetworkSpec): build()                                   a frozen dataclass, registered with @kind

Wrappers (adapters over a shared backbone, weights kept on the CPU) inherit from Wrapper, which asks the inner network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import OneOf
from fewstep.diffusion import Cache, Denoiser, Path, StudentSampler
from fewstep.errors import UserError
from fewstep.networks.causal_attention import Sites
from fewstep.networks.encoders.codecs import Autoencoder
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.parallel import Context

# How a clip can begin with frames that are given.
#   none     not at all                          time   their time 0 alone distinguishes them from noisy frames
#   mask     an input channel marks them         picture   it always begins with one picture, read on channels of its own
FirstFrames = Literal["none", "time", "mask", "picture"]


NOT_SHARED = "has no plan for sharing the tokens of a clip over processes; cosmos, cosmos_control, wan and experts have"


@dataclass(frozen=True)
class Scheduling:
    """What decides which scheduler of diffusers can sample a student of this network."""

    predicts: Literal["eps", "v"] = "eps"  # the raw output of a VP network
    sends_sigmas: bool = False  # its pipelines call set_timesteps(sigmas=(1, .. 1/n))
    shifts_table: bool = False  # its pipelines use CogVideoXDDIMScheduler, which shifts the signal-to-noise ratio of the table
    needs_own_loop: bool = False  # diffusers' pipelines of it do more than their scheduler says, so a student needs pipeline.py


@dataclass(frozen=True)
class Distillation:
    """How students of a family are published: the defaults of the general recipes. The learning rates are those of billions."""

    guidance: float = 5.0  # w of the teacher, which the student learns
    shift: float = 5.0  # of the student's times, in flow time
    clips: tuple[int, int, int] | None = None  # frames, height, width: the largest its teachers are published for
    negative: Literal["zeros", "empty"] = "empty"  # the unconditional prompt: zeros, or the embedding of an empty text
    kd_lr: float = 1e-5
    lr: float = 1e-5  # of the student in DMD2
    critic_lr: float = 1e-5


@dataclass(frozen=True)
class Traits:
    """The facts about a network that others need to know."""

    lora_targets: tuple[str, ...] | None = None  # endings of the names of Linear layers; None: all Linear layers in blocks
    first_frames: FirstFrames = "none"
    reads_image: bool = False  # reads image features of its first picture from cond.image
    controls: tuple[str, ...] = ()  # names in cond.control, all of which it reads
    guidance: float | None = None  # w that the original tools sample with where none is given; None: not known
    student: StudentSampler | None = None  # how the published students of this network are sampled, whose files do not say it
    boundary: float | None = None  # time below which a second expert is called; None: one network for all noise levels
    is_causal: bool = False  # a chunk of frames attends to no later one: it can be generated with a cache
    reads_end: bool = False  # reads cond.end, the time where a jump ends: a flow map
    frame_multiple: int = 1  # number of latent frames must be a multiple of it
    side_multiple: int = 1  # height and width of latents must be multiples of it
    latent_channels: int | None = None  # of x_t; None: not declared
    text_channels: int | None = None  # of cond.text; None: not declared
    scheduling: Scheduling = Scheduling()
    pipeline_class: str | None = None  # diffusers' pipeline of this network's students; None: that of the base
    pipeline_settings: Mapping[str, Any] | None = None  # for the exported pipeline.py; None: it cannot run this network


@dataclass(frozen=True)
class Beginning:
    """The frames that a clip begins with, and what turns them into a condition."""

    pixels: Tensor  # 1 3 T H W in -1..1
    num_frames: int  # of the whole clip
    num_latents: int  # latent frames of the whole clip
    codec: Autoencoder
    image_features: Callable[[Tensor], Tensor] | None = None  # of one picture, 1 3 H W in -1..1 -> 1 N D


class NetworkDefaults(Protocol):
    """Members that a network may leave as they are."""

    @property
    def traits(self) -> Traits:
        return Traits()

    def new_cache(self, like: Tensor) -> Cache:
        """An empty cache for a causal roll-out of latents like `like`."""
        raise UserError("this network is not causal: every frame sees every other, so finished frames cannot be cached")

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        """The chunks of latent frames in which a causal network generates a clip."""
        raise UserError("this network is not causal: it generates all frames at once (networks.student.causal makes it so)")

    def before(self, start: int) -> Sequence[int]:
        """The finished frames that a causal network attends to from the chunk which begins at frame `start`."""
        raise UserError("this network is not causal: every frame sees every other")

    def sites(self) -> Sites:
        """Where its attention takes place, for networks that can be causal."""
        raise UserError("this network cannot be causal: wan and cosmos can (networks without control branches)")

    def share_tokens(self, context: Context) -> None:
        """Changes its module, placed already, so that every process of `context` computes a share of a clip's tokens.

        What the network receives and returns stays whole, features included: see networks/tokens.py.
        """
        raise UserError(f"parallel.context: this network {NOT_SHARED}")

    def begin(self, cond: Condition, beginning: Beginning) -> Condition:
        """`cond` for a clip that begins with given frames.

        By default they are passed as clean latents and a mask (cond.frames, cond.frame_mask). Networks whose
        `traits.first_frames` is "none" refuse.
        """
        if self.traits.first_frames == "none":
            raise UserError("this network cannot be given first frames")
        pixels, form = beginning.pixels, beginning.codec.form
        num = pixels.shape[2]
        rest = pixels[:, :, -1:].expand(-1, -1, beginning.num_frames - num, -1, -1)  # not seen: the codec is causal
        mask = torch.zeros(1, beginning.num_latents, device=pixels.device)
        mask[:, : 1 + (num - 1) // (form.time if form.sees_time else 1)] = 1
        return self.with_frames(cond, beginning.codec.encode(torch.cat([pixels, rest], 2)), mask)

    def with_frames(self, cond: Condition, frames: Tensor, mask: Tensor) -> Condition:
        """`cond` for clips whose latent frames under `mask` (B T) are those of `frames` (B C T H W), when they are sampled."""
        return replace(cond, frames=frames, frame_mask=mask)

    def with_control_weights(self, weights: Mapping[str, float]) -> Network:
        """The same network, whose controls count `weights`; scaled down to a sum of 1 where they sum to more."""
        raise UserError("this network has no controls")

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is loaded where `weights` (by name) are named as the source of this network's weights."""
        return weights

    def parts(self) -> dict[str, Any]:
        """Modules of diffusers, by the names that a pipeline gives them."""
        raise UserError("--format diffusers: this network is no class of diffusers; take --format safetensors")

    def in_original_names(self) -> dict[str, Tensor]:
        """Its weights, named as in the files that were published with it."""
        raise UserError("--format pt-original: this network is no Cosmos network, and has no such names")


class Network(Denoiser, NetworkDefaults, Protocol):
    @property
    def module(self) -> nn.Module:
        """What is sharded, optimised and saved. The Denoiser around it is none of these: times and x_t stay exact there.

        A class within that wants some weights in fp32 whatever the rest computes in lists parts of their names in
        `_keep_in_fp32_modules`, as diffusers' classes do; parallel/shard.py keeps them.
        """
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated unit: checkpointed, compiled, wrapped."""
        ...


class Wrapper(NetworkDefaults):
    """A network around another one, `inner`, which decides everything but the call."""

    inner: Network

    @property
    def module(self) -> nn.Module:
        return self.inner.module

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.inner.blocks

    @property
    def traits(self) -> Traits:
        return self.inner.traits

    def new_cache(self, like: Tensor) -> Cache:
        return self.inner.new_cache(like)

    def chunks(self, num_frames: int) -> tuple[range, ...]:
        return self.inner.chunks(num_frames)

    def before(self, start: int) -> Sequence[int]:
        return self.inner.before(start)

    def begin(self, cond: Condition, beginning: Beginning) -> Condition:
        return self.inner.begin(cond, beginning)

    def with_frames(self, cond: Condition, frames: Tensor, mask: Tensor) -> Condition:
        return self.inner.with_frames(cond, frames, mask)

    def share_tokens(self, context: Context) -> None:
        self.inner.share_tokens(context)


def with_copies(weights: Mapping[str, Tensor], first: str, second: str) -> Mapping[str, Tensor]:
    """`weights`, and those below `first` once more below `second`, a part that begins as its copy; where there are none yet."""
    if any(name.startswith(second) for name in weights):
        return weights
    copies = {second + name.removeprefix(first): value.clone() for name, value in weights.items() if name.startswith(first)}
    return {**weights, **copies}


class NetworkSpec:
    """The configuration of a network: inherit it in a frozen dataclass registered with @kind(NAME, group="network")."""

    diffusers_class: ClassVar[str] = ""  # the class of denoiser whose folders `of` opens; "": none
    pipeline_part: ClassVar[str] = "transformer"  # what a pipeline calls the network
    # A field or property `path` says the path of the network before it is built; without one only the network knows it.
    has_original_names: ClassVar[bool] = False  # its weights can be named as in the files that were published with it
    is_causal: ClassVar[bool] = False  # what it builds generates chunk after chunk
    in_force: ClassVar[tuple[str, ...]] = ()  # settings that count beside `pretrained`; the sizes are those of its files

    @property
    def starts_as_teacher(self) -> bool:
        """Whether it is another network than the teacher, but one that can begin with the teacher's weights."""
        return False

    @property
    def expert_boundary(self) -> float | None:
        """The time below which a second expert is called; None: one network for all noise levels."""
        return None

    @property
    def control_branches(self) -> tuple[str, ...]:
        """The names of its controls."""
        return ()

    @property
    def shares_tokens(self) -> bool:
        """Whether several processes can share the tokens of a clip in what it builds (parallel.context)."""
        return False

    @property
    def distillation(self) -> Distillation:
        """How students of this family are published."""
        return Distillation()

    @property
    def source(self) -> str | None:
        """The diffusers folder or hub id that the weights come from; None: another one."""
        return None

    def build(self) -> Network:
        """The network with the weights this configuration names, or random ones; the same for the same global seed."""
        raise NotImplementedError

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> NetworkSpec:
        """The configuration of the network in a diffusers folder or hub id whose denoiser is a `diffusers_class`.

        controls: names of the controls that the user wants to use.
        """
        raise NotImplementedError

    @classmethod
    def facts(cls, folder: PipelineFolder) -> Mapping[str, Any]:
        """Settings of how the network is called that the files of the folder decide; another configuration contradicts them."""
        return {}

    def in_folder(self, folder: str) -> NetworkSpec:
        """This configuration, with the weights that export wrote into `folder` in the diffusers format."""
        raise UserError(f"{folder}: its student.safetensors is missing. Export the student again")

    def export_format(self) -> tuple[str, str]:
        """What --format auto stands for; and why that is no folder of diffusers, or ""."""
        return "safetensors", ""

    def by_part(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Weights or adapters by the part of a pipeline that they belong to, and named as in it."""
        return {self.pipeline_part: dict(tensors)}


AnyNetwork = Annotated[NetworkSpec, OneOf("network")]  # a field that holds the configuration of one network


@dataclass(frozen=True)
class DiffusersSpec(NetworkSpec):
    """The configuration of a network whose module is one of diffusers' own classes."""

    pretrained: str | None = None  # folder with config.json and weights, or of a whole pipeline; or a hub id. None: random

    @property
    def idle(self) -> frozenset[str]:
        """Settings without effect, which are not written where they have their defaults."""
        names = frozenset(f.name for f in fields(self)) - {"pretrained", *self.in_force}
        return frozenset() if self.pretrained is None else names

    @property
    def source(self) -> str | None:
        return self.pretrained

    def in_diffusers(self, name: str, part: str = "transformer", **sizes: Any) -> Any:  # Any: a module of whatever class
        """A module of diffusers' class `name`: from `pretrained`, where pipelines call it `part`; else a random one."""
        import diffusers

        from fewstep.networks.files.folders import from_folder

        cls = getattr(diffusers, name)
        return cls(**sizes) if self.pretrained is None else from_folder(cls, self.pretrained, part)

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> NetworkSpec:
        return cls(pretrained=folder.address)

    def in_folder(self, folder: str) -> NetworkSpec:
        return replace(self, pretrained=folder)

    def export_format(self) -> tuple[str, str]:
        return "diffusers", ""
