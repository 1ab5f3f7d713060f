"""Algorithms, one file each; each a frozen dataclass whose fields are its hyper-parameters."""

from fewstep.methods.causal_finetune import CausalFinetune
from fewstep.methods.causal_kd import CausalKD
from fewstep.methods.causal_sample import CausalSample
from fewstep.methods.contract import Method, Nets, Terms, Turn
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2, Normalizer, Regression
from fewstep.methods.dmd2_dialects import fastgen, predict25, transfer1
from fewstep.methods.f_distill import FDivergence
from fewstep.methods.finetune import Finetune
from fewstep.methods.gan import Gan
from fewstep.methods.kd import KD
from fewstep.methods.ladd import LADD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.reward_dmd import RewardWeight
from fewstep.methods.self_forcing import SelfForcing, causvid
from fewstep.methods.sid import SiD
from fewstep.methods.student import StudentSample
from fewstep.methods.turns import Warmup

__all__ = [
    "DMD2",
    "KD",
    "LADD",
    "CausalFinetune",
    "CausalKD",
    "CausalSample",
    "Critic",
    "FDivergence",
    "Finetune",
    "Gan",
    "Method",
    "Nets",
    "Normalizer",
    "PhasedDMD",
    "Regression",
    "RewardWeight",
    "SelfForcing",
    "SiD",
    "StudentSample",
    "Terms",
    "Turn",
    "Warmup",
    "causvid",
    "fastgen",
    "predict25",
    "transfer1",
]
