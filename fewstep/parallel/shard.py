"""Prepares a network for its device in the one order that works: checkpointing, compile, FSDP2 or a device.

Checkpointing wraps a block, compile sees the wrapped block, FSDP2 shards the result. Network files contain none of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.parallel.mesh import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Mode = Literal["ddp", "fsdp"]
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of a precision, as users name it
Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


def place(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    world: World,
    *,
    mode: Mode,
    compute: torch.dtype,
    trained: bool,
    adapters: Sequence[nn.Module] = (),
    remember: Contexts | None = None,
    checkpointing: bool = False,
    selective: bool = False,
    compiled: bool = False,
) -> None:
    """Changes `module` in place: on its device, sharded or whole; frozen weights in `compute`, trained ones in fp32.

    Those that a class wants in fp32 (`kept_in_fp32`) stay so; sharded, the modules outside of the blocks that hold nothing
    else. What lies inside a block is gathered with it, in `compute`.
    adapters: parts of a frozen module that are trained all the same.
    remember: called at the forward of a block; returns a context for that forward and for its recomputation in backward, for
    modules whose output depends on a mode.
    checkpointing: a block runs again in backward instead of being kept; with `selective` all of it but its matrix products
    and attention.
    """
    module.requires_grad_(trained).train(trained)
    for part in adapters:
        part.requires_grad_(True)
    exact_names = kept_in_fp32(module)
    exact_ids = {id(parameter) for name, parameter in module.named_parameters() if name in exact_names}

    def lower(part: nn.Module) -> None:
        """Rounds what is frozen: all of a frozen module, and what a trained one keeps so. Not part.to(): a rounded buffer (a
        table) is another network."""
        for parameter in part.parameters():
            if not parameter.requires_grad and not is_sharded(parameter) and id(parameter) not in exact_ids:
                parameter.data = parameter.data.to(compute)

    if checkpointing:
        from torch.distributed._composable import checkpoint

        contexts = partial(_keep_products, remember) if selective else remember
        for block in blocks:
            checkpoint(block, **({} if contexts is None else {"context_fn": contexts}))
    if compiled:
        for block in blocks:
            block.compile()
    if mode == "ddp" or world.weights is None:
        lower(module)
        module.to(world.device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # cast_forward_inputs would round the time of a frame to bf16: t = 0.999 becomes 1.0, pure noise.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = world.weights if world.weights.shape[0] > 1 else world.weights["shard"]
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in _holding_only(exact_names, module, blocks):
        fully_shard(part, mesh=mesh, mp_policy=exact, reshard_after_forward=True)
    for part in (*blocks, module):
        # By default the outermost weights stay gathered after a forward, until a backward frees them. Ours are written between
        # (a step, the average) and change requires_grad with the turn, neither of which a gathered copy would see.
        lower(part)  # one block after the other: the weights may still be in their file, which no process holds whole
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # FSDP fixes the precision of gradients at the first forward, from the weights that require one then. A critic is first
    # asked in the student's turn: its gradients would stay bf16 for ever. So it is done here, while all of them do.
    module._get_fsdp_state()._lazy_init()  # pyright: ignore[reportCallIssue]  # there is no public way; torch 2.6 .. 2.13


def _keep_products(
    remember: Contexts | None,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward of a block, and for the one in backward, which takes products and attention from the first."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten: Any = torch.ops.aten  # filled at import
    products = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = function._overloadpacket
        is_dear = packet in products or ("attention" in function.name() and "backward" not in function.name())
        return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)  # modes, whose entries torch does not annotate
    first, again = contexts
    if remember is None:
        return first, again
    modes = remember()
    return _both(modes[0], first), _both(modes[1], again)


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


def reduce_over_replicas(module: nn.Module, now: bool) -> None:
    """Whether the next backward of a sharded module sums its gradients over replicas (HSDP), or leaves that to a later one.

    Left, they are added to the next; what no later backward reaches is lost: see `has_unreduced`.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(now)


def has_unreduced(module: nn.Module) -> bool:
    """Whether gradients were left that no backward has summed over replicas since."""
    from torch.distributed.fsdp import FSDPModule

    groups = [part._get_fsdp_state()._fsdp_param_group for part in module.modules() if isinstance(part, FSDPModule)]
    return any(group is not None and group._partial_reduce_output is not None for group in groups)


def kept_in_fp32(module: nn.Module) -> set[str]:
    """Names of the parameters that compute in fp32 whatever the rest does, because their class expects them so.

    A class names them as diffusers' classes do: `_keep_in_fp32_modules` lists parts of names. Wan keeps its norms, tables and
    the embedding of the time, Cosmos its learnt positions.
    """
    names: set[str] = set()
    for at, part in module.named_modules():
        listed = set(getattr(part, "_keep_in_fp32_modules", None) or ())
        if listed:
            names |= {f"{at}.{n}" if at else n for n, _ in part.named_parameters() if listed & set(n.split("."))}
    return names


def _holding_only(names: set[str], module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost modules outside of the blocks all of whose parameters, one at least, are among `names`."""
    result: list[nn.Module] = []
    inside = {id(part) for block in blocks for part in block.modules()}
    claims: set[str] = set()
    for at, part in module.named_modules():
        own = {f"{at}.{name}" for name, _ in part.named_parameters()}
        if at and own and own <= names and not own & claims and id(part) not in inside:
            result.append(part)
            claims |= own
    return result


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor lies in parts on several processes. Does not import DTensor, which takes as long as torch itself."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no such tensor
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this process; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def average_gradients(parameters: Iterable[Tensor], world: World, bucket_bytes: int = 64 * 2**20) -> None:
    """The mean gradient over all processes, for parameters that are whole on each: data parallelism without a wrapper.

    One call after the last backward of a step, after any number of forwards, roles and micro-batches; a module
    wrapper would want exactly one forward for each backward. Sharded parameters are averaged by FSDP already.
    """
    whole = [] if world.mesh is None else [parameter for parameter in parameters if not is_sharded(parameter)]
    if not whole:
        return
    # What no rank used keeps no gradient, as in a process alone; what one rank used counts as 0 on the others.
    counts = torch.tensor([float(parameter.grad is not None) for parameter in whole], device=whole[0].device)
    dist.all_reduce(counts)
    bucket: list[Tensor] = []
    size = 0
    for parameter, uses in zip(whole, counts.tolist(), strict=True):
        if not uses:
            continue
        if parameter.grad is None:
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
