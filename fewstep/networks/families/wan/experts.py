"""Two networks that share the noise levels between them, as one: Wan 2.2 A14B.

Above the boundary the expert for high noise is called, below it the one for low noise, row by row. They are one module with
the parts `transformer` (high) and `transformer_2` (low), as diffusers names them, so that a role is saved and trained whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction
from fewstep.errors import UserError
from fewstep.networks.causal_attention import Sites
from fewstep.networks.contract import AnyNetwork, Beginning, Distillation, Network, NetworkDefaults, NetworkSpec, Traits
from fewstep.networks.families.wan.network import A14B_I2V, T2V_14B, WanSpec
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.parallel import Context, is_sharded

PARTS = ("transformer", "transformer_2")  # of the pair, as diffusers names them: for high noise, for low noise


class _Raw(NamedTuple):
    """What an expert says, as tensors only: FSDP looks for them in what its root returns."""

    velocity: Tensor
    features: tuple[Tensor, ...]


class Pair(nn.Module):
    """The common root. Calls go through its forward, because that is where FSDP gathers the weights outside the blocks."""

    def __init__(self, high: nn.Module, low: nn.Module):
        super().__init__()
        self.transformer, self.transformer_2 = high, low

    def forward(self, ask: Callable[[], _Raw]) -> _Raw:
        return ask()


@dataclass(frozen=True)
class Experts(NetworkDefaults):
    module: nn.Module  # Pair
    high: Network
    low: Network
    boundary: float  # in the path's own time; the high-noise expert answers from there upwards

    @property
    def path(self) -> Path:
        return self.high.path

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those of the high-noise expert, then those of the low-noise one. A tap i is block i of whichever is called."""
        return (*self.high.blocks, *self.low.blocks)

    @property
    def traits(self) -> Traits:
        return replace(self.high.traits, pipeline_settings=None, boundary=self.boundary)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        if isinstance(t, FakeTensor):  # memory is planned on tensors that hold no numbers: one expert is at work at a time
            return self._ask(self.high, x_t, t, cond, taps)
        is_high = self.is_high(t, cond)
        calls = [(self.high, is_high), (self.low, ~is_high)]
        if any(is_sharded(parameter) for parameter in self.module.parameters()):
            # Every rank must enter the same blocks, or the gathering of their weights waits for ever. A rank with no row for an
            # expert that another rank asks shows it one of its own rows, and the answer counts nothing.
            needs = torch.stack([rows.any() for _, rows in calls]).to(device=x_t.device, dtype=torch.int32)
            dist.all_reduce(needs, dist.ReduceOp.MAX)
            calls = [pair for pair, is_called in zip(calls, needs.tolist()) if is_called]
        else:
            calls = [(expert, rows) for expert, rows in calls if bool(rows.any())]
        if len(calls) == 1 and bool(calls[0][1].all()):
            return self._ask(calls[0][0], x_t, t, cond, taps)
        answers = [(rows, self._part(expert, rows, x_t, t, cond, taps)) for expert, rows in calls]
        first = answers[0][1]
        velocity = first.velocity.new_zeros(x_t.shape)
        features = [feature.new_zeros(x_t.shape[0], *feature.shape[1:]) for feature in first.features]
        for rows, answer in answers:
            place = rows.nonzero()[:, 0]
            count = len(place)  # 0 where the row shown counts nothing
            nothing = 0.0 if count else 0 * sum(part.sum() for part in (answer.velocity, *answer.features))
            velocity = velocity.index_copy(0, place, answer.velocity[:count]) + nothing
            features = [all_.index_copy(0, place, part[:count]) for all_, part in zip(features, answer.features, strict=True)]
        return Prediction(x_t.to(velocity.dtype), t, self.path, velocity, tuple(features))

    def is_high(self, t: Tensor, cond: Condition) -> Tensor:
        """(B,), true where the high-noise expert is called: the noisiest frame decides, given frames have no say."""
        if t.ndim == 2:
            t = t if cond.frame_mask is None else torch.where(cond.frame_mask.bool(), 0.0, t.double())
            t = t.amax(1)
        return t >= self.boundary

    def sites(self) -> Sites:
        raise UserError("two experts (Wan 2.2 A14B) cannot be causal yet: a cache would need the keys of both")

    def share_tokens(self, context: Context) -> None:
        self.high.share_tokens(context)
        self.low.share_tokens(context)

    def begin(self, cond: Condition, beginning: Beginning) -> Condition:
        return self.high.begin(cond, beginning)

    def own_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of one network count for either expert."""
        if any(name.split(".")[0] in PARTS for name in weights):
            return weights
        return {f"{part}.{name}": tensor for part in PARTS for name, tensor in weights.items()}

    def parts(self) -> dict[str, Any]:
        return {part: own for part, expert in zip(PARTS, (self.high, self.low)) for own in expert.parts().values()}

    def _part(self, expert: Network, rows: Tensor, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> Prediction:
        place = rows.nonzero()[:, 0] if bool(rows.any()) else torch.zeros(1, dtype=torch.long, device=x_t.device)
        return self._ask(expert, x_t[place], t[place], cond.rows(place), taps)

    def _ask(self, expert: Network, x_t: Tensor, t: Tensor, cond: Condition, taps: Sequence[int]) -> Prediction:
        answers: list[Prediction] = []

        def ask() -> _Raw:
            answer = expert(x_t, t, cond, taps=taps)
            answers.append(answer)
            return _Raw(answer.velocity, answer.features)

        raw = self.module(ask)
        return Prediction(answers[0].x_t, t, self.path, raw.velocity, tuple(raw.features))


@kind("experts", group="network")
@dataclass(frozen=True)
class ExpertsSpec(NetworkSpec):
    """Two networks on one path, by noise level."""

    diffusers_class: ClassVar[str] = "WanTransformer3DModel"  # a pipeline of Wan has two networks, or the one

    high: AnyNetwork = T2V_14B  # Wan 2.2 T2V A14B
    low: AnyNetwork = replace(T2V_14B, subfolder="transformer_2")
    boundary: float = 0.875  # Wan 2.2 T2V A14B; I2V 0.9

    @classmethod
    def of(cls, folder: PipelineFolder, controls: Sequence[str] = ()) -> WanSpec | ExpertsSpec:
        """Two experts where the pipeline says at which noise level they meet, else the one network."""
        boundary = folder.index.get("boundary_ratio")
        high = WanSpec(pretrained=folder.address)
        return high if boundary is None else cls(high, replace(high, subfolder="transformer_2"), boundary)

    @property
    def starts_as_teacher(self) -> bool:
        return True

    @property
    def path(self) -> Path:
        high: Any = self.high  # Any: `path` is a field of some configurations, and a property of others
        return high.path

    @property
    def expert_boundary(self) -> float:
        return self.boundary

    @property
    def distillation(self) -> Distillation:
        return self.high.distillation

    @property
    def source(self) -> str | None:
        return self.high.source

    @property
    def shares_tokens(self) -> bool:
        return self.high.shares_tokens and self.low.shares_tokens

    def in_folder(self, folder: str) -> ExpertsSpec:
        high, low = self.high.in_folder(folder), self.low.in_folder(folder)
        assert isinstance(low, WanSpec)  # only networks of diffusers are exported so, and Wan's alone come in pairs
        return replace(self, high=high, low=replace(low, subfolder=PARTS[1]))

    def by_part(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        parts = {part: _inside(tensors, part) for part in PARTS}
        return {part: inside for part, inside in parts.items() if inside}

    def build(self) -> Experts:
        high, low = self.high.build(), self.low.build()
        if high.path != low.path or len(high.blocks) != len(low.blocks):
            raise UserError(
                f"two experts must agree in path and number of blocks, but have {high.path} with {len(high.blocks)} blocks "
                f"and {low.path} with {len(low.blocks)}"
            )
        return Experts(Pair(high.module, low.module), high, low, self.boundary)


def _inside(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


A14B = ExpertsSpec()  # Wan 2.2 T2V
I2V_A14B = ExpertsSpec(A14B_I2V, replace(A14B_I2V, subfolder="transformer_2"), 0.9)  # Wan 2.2
