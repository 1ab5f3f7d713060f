"""Processes and shards. It imports torch only, so that inference on several devices needs no trainer."""

from fewstep.parallel.context import Context
from fewstep.parallel.mesh import (
    World,
    device_of,
    is_joined,
    is_lost_process,
    join_world,
    leave_world,
    peak_memory_gib,
    sum_over_processes,
)
from fewstep.parallel.shard import (
    COMPUTE,
    average_gradients,
    has_unreduced,
    is_sharded,
    kept_in_fp32,
    local,
    place,
    reduce_over_replicas,
)

__all__ = [
    "COMPUTE",
    "Context",
    "World",
    "average_gradients",
    "device_of",
    "has_unreduced",
    "is_joined",
    "is_lost_process",
    "is_sharded",
    "join_world",
    "kept_in_fp32",
    "leave_world",
    "local",
    "peak_memory_gib",
    "place",
    "reduce_over_replicas",
    "sum_over_processes",
]
