"""Processes and shards. It imports torch only, so that inference on several devices needs no trainer."""

from fewstep.parallel.mesh import World, is_joined, join_world, leave_world
from fewstep.parallel.shard import average_gradients, kept_in_fp32, place

__all__ = ["World", "average_gradients", "is_joined", "join_world", "kept_in_fp32", "leave_world", "place"]
