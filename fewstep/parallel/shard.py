"""What is done to a network before it is trained, in the one order that works: checkpointing, compile, FSDP2.

Checkpointing wraps a block, compile sees the wrapped block, FSDP2 shards what is left. A network file knows none of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as recompute
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fewstep.parallel.mesh import World

Mode = Literal["ddp", "fsdp"]


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    world: World,
    *,
    mode: Mode,
    compute: torch.dtype,
    checkpointing: bool = False,
    compiled: bool = False,
) -> None:
    """Changes `module` in place for training or frozen use in this world."""
    if checkpointing:
        for block in blocks:
            recompute(block)
    if compiled:
        for block in blocks:
            block.compile()
    if mode == "fsdp" and world.mesh is not None:
        # cast_forward_inputs would round the time of a frame to bf16: t = 0.999 becomes 1.0, pure noise.
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = world.mesh if world.mesh.shape[0] > 1 else world.mesh["shard"]
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)


def average_gradients(parameters: Iterable[Tensor], world: World, bucket_bytes: int = 64 * 2**20) -> None:
    """The mean gradient over all processes, for parameters that are whole on each: data parallelism without a wrapper.

    One call after the last backward of a step, whatever number of forwards, roles and micro-batches went before it; a module
    wrapper would want exactly one forward for each backward. Sharded parameters are averaged by FSDP already.
    """
    if world.mesh is None:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # unused here, perhaps used on another rank: all ranks must call alike
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
        if size >= bucket_bytes:
            _reduce(bucket, world)
            bucket, size = [], 0
    _reduce(bucket, world)


def _reduce(gradients: list[Tensor], world: World) -> None:
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
