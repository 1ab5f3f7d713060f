"""Algorithms, one file each; each a frozen dataclass whose fields are its hyper-parameters."""

from fewstep.methods.autoencode import Autoencode
from fewstep.methods.contract import Method, Nets, Terms, Turn
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.dmd2_dialects import FastGen, Predict25, Transfer1
from fewstep.methods.finetune import Finetune
from fewstep.methods.gan import Gan
from fewstep.methods.kd import KD

__all__ = [
    "DMD2",
    "KD",
    "Autoencode",
    "FastGen",
    "Finetune",
    "Gan",
    "Method",
    "Nets",
    "Predict25",
    "Terms",
    "Transfer1",
    "Turn",
]
