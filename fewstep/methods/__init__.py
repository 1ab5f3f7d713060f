"""Algorithms, one file each; each a frozen dataclass whose fields are its hyper-parameters."""

from fewstep.methods.average_velocity import AverageVelocity
from fewstep.methods.causal_consistency import CausalConsistency
from fewstep.methods.causal_finetune import CausalFinetune
from fewstep.methods.causal_kd import CausalKD
from fewstep.methods.causal_sample import CausalSample
from fewstep.methods.consistency import Consistency, Curriculum, Grid, Truncation
from fewstep.methods.contract import Method, Nets, Terms, Turn
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2, Normalizer, Regression
from fewstep.methods.dmd2_dialects import fastgen, predict25, transfer1
from fewstep.methods.f_distill import FDivergence
from fewstep.methods.finetune import Finetune
from fewstep.methods.flow_map import FlowMap, OnPolicy
from fewstep.methods.gan import Gan
from fewstep.methods.kd import KD
from fewstep.methods.ladd import LADD
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.rcm import RCM
from fewstep.methods.reward_dmd import RewardWeight
from fewstep.methods.scm import SCM
from fewstep.methods.self_forcing import SelfForcing, causvid
from fewstep.methods.sid import SiD
from fewstep.methods.student import StudentSample
from fewstep.methods.tangent import Tangent, TangentTerm
from fewstep.methods.turns import Warmup

__all__ = [
    "DMD2",
    "KD",
    "LADD",
    "RCM",
    "SCM",
    "AverageVelocity",
    "CausalConsistency",
    "CausalFinetune",
    "CausalKD",
    "CausalSample",
    "Consistency",
    "Critic",
    "Curriculum",
    "FDivergence",
    "Finetune",
    "FlowMap",
    "Gan",
    "Grid",
    "MeanFlow",
    "Method",
    "Nets",
    "Normalizer",
    "OnPolicy",
    "PhasedDMD",
    "Regression",
    "RewardWeight",
    "SelfForcing",
    "SiD",
    "StudentSample",
    "Tangent",
    "TangentTerm",
    "Terms",
    "Truncation",
    "Turn",
    "Warmup",
    "causvid",
    "fastgen",
    "predict25",
    "transfer1",
]
