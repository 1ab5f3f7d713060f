"""Algorithms, one file each; each a frozen dataclass whose fields are its hyper-parameters."""

from fewstep.methods.contract import Method, Nets, Terms, Turn
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.finetune import Finetune
from fewstep.methods.kd import KD

__all__ = ["DMD2", "KD", "Finetune", "Method", "Nets", "Terms", "Turn"]
