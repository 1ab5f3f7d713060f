"""Processes and shards. It imports torch only, so that inference on several devices needs no trainer."""

from fewstep.parallel.mesh import World, join_world, leave_world
from fewstep.parallel.shard import average_gradients, place

__all__ = ["World", "average_gradients", "join_world", "leave_world", "place"]
