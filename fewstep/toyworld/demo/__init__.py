"""`fewstep demo`: the whole road in miniature. The toy world's teacher becomes a four-step and a one-step student."""

from fewstep.toyworld.demo.run import demo
from fewstep.toyworld.demo.stages import Size

__all__ = ["Size", "demo"]
