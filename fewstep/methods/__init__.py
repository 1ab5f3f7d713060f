"""Algorithms, one file each; each a frozen dataclass whose fields are its hyper-parameters."""

from fewstep.methods.contract import Method, Nets, Terms, Turn
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.dmd2_dialects import FastGen, Predict25, Transfer1
from fewstep.methods.f_distill import FDistill
from fewstep.methods.finetune import Finetune
from fewstep.methods.gan import Gan
from fewstep.methods.kd import KD
from fewstep.methods.ladd import LADD
from fewstep.methods.phased import PhasedDMD
from fewstep.methods.reward import RewardDMD
from fewstep.methods.sid import SiD

__all__ = [
    "DMD2",
    "KD",
    "LADD",
    "FDistill",
    "FastGen",
    "Finetune",
    "Gan",
    "Method",
    "Nets",
    "PhasedDMD",
    "Predict25",
    "RewardDMD",
    "SiD",
    "Terms",
    "Transfer1",
    "Turn",
]
