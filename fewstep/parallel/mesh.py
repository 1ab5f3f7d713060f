"""The processes of one run: rank and device of this process, and the mesh of all."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fewstep.environment import ranks
from fewstep.errors import UserError
from fewstep.parallel.context import Context


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # ("replicate", "shard", "context"); None for a process alone
    # All processes once more, over the CPU, for what goes on beside training: a checkpoint written in the background talks
    # while training talks, and on one group their messages would be taken for each other's.
    aside: dist.ProcessGroup | None = None
    context: Context | None = None  # the processes that share the tokens of a clip with this one; None: it has them to itself
    weights: DeviceMesh | None = None  # ("replicate", "shard"): over which weights are divided, contexts included

    @property
    def num_readers(self) -> int:
        """How many parts the global batch has: the processes of one context read the same samples."""
        return self.size if self.context is None else self.size // self.context.size

    @property
    def reader(self) -> int:
        """Which part of the global batch this process reads."""
        return self.rank if self.context is None else self.rank // self.context.size

    @property
    def writes(self) -> bool:
        """Whether this process writes what those of its context have computed together."""
        return self.context is None or self.context.rank == 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of `value` over all processes; the same bits on each."""
        if self.mesh is None:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on any process: the same result on all.

        A signal reaches ranks at different times.
        """
        if self.mesh is None:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in values.tolist()]

    def gather(self, text: str) -> list[str]:
        """The text of each process, by rank."""
        texts: list[Any] = [None] * self.size  # Any: torch's signature
        if self.mesh is None:
            return [text]
        dist.all_gather_object(texts, text)
        return texts


def join_world(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_replicas: int | None = None,
    timeout_s: float = 1800.0,
    context: int = 1,
) -> World:
    """Joins the processes that torchrun describes in the environment; a process alone needs no group.

    num_replicas: the mesh is that many replicas, each sharded over size / num_replicas ranks (HSDP); None: 1.
    context: processes that share the tokens of a clip, neighbours in rank.
    """
    own = ranks()
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        raise UserError("parallel.device=cuda, but torch sees no GPU here; set parallel.device=cpu or auto")
    if on_gpu and own.local >= torch.cuda.device_count():
        raise UserError(
            f"this is process {own.local + 1} of its machine, which has {torch.cuda.device_count()} GPU(s): start torchrun "
            f"with --nproc_per_node={torch.cuda.device_count()}, or set parallel.device=cpu"
        )
    if on_gpu:
        torch.cuda.set_device(own.local)
    place = torch.device("cuda", own.local) if on_gpu else torch.device("cpu")
    if own.size == 1:
        return World(0, 1, place, None)
    replicas = num_replicas or 1
    if own.size % replicas:
        raise UserError(f"parallel.num_replicas={replicas} does not divide the {own.size} processes of this run")
    shards = own.size // replicas
    if shards % context:
        raise UserError(
            f"parallel.context={context} does not divide the {shards} processes "
            + ("of this run" if replicas == 1 else f"of each of the {replicas} replicas")
        )
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_s)
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        # torchrun 2.13 keeps one store over all its attempts: processes that are started anew would find the addresses of those
        # that died, and wait for them.
        store = dist.PrefixStore(f"attempt_{own.attempt}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
    mesh = init_device_mesh(
        place.type, (replicas, shards // context, context), mesh_dim_names=("replicate", "shard", "context")
    )
    weights = init_device_mesh(place.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    aside = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(aside, dist.ProcessGroup), aside
    sharing = Context(own.rank % context, context, mesh.get_group("context")) if context > 1 else None
    return World(own.rank, own.size, place, mesh, aside, sharing, weights)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error came out of a collective because another process has ended or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def device_of(name: str | None) -> str:
    """The device of this name, or by default this process's GPU where there is one. Raises UserError if it is not there."""
    if name is None:
        return f"cuda:{ranks().local}" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    num = counts[kind] if kind in counts else torch.xpu.device_count()
    if int(number or 0) >= num:
        raise UserError(f"--device {name}: this machine has {num} devices of this kind. Take --device cpu, or leave it out")
    return name


def peak_memory_gib(device: torch.device | str) -> float:
    """Most memory held so far: of the GPU, since its count was last reset, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_joined() -> bool:
    """True between join_world and leave_world of a run of several processes."""
    return dist.is_initialized()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of each value over the processes of a run, each of which calls it as often; in a process alone, the values."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def leave_world() -> None:
    """Leaves the process group of join_world; without it a clean exit prints a warning, and gloo may hang."""
    if dist.is_initialized():
        dist.destroy_process_group()
