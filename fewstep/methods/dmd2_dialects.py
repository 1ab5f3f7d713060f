"""DMD2 as three code bases publish it: the same implementation under their settings. Every field can still be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.config import kind
from fewstep.diffusion import EDM, TrigFlow, times
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.rollout import Renoise
from fewstep.methods.contract import Reduction
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.gan import Gan


@kind("dmd2_transfer1", group="method")
@dataclass(frozen=True)
class Transfer1(DMD2):
    """Cosmos-Transfer1: one step on EDM, eps-weighted critic, GAN on the features of the teacher's middle block."""

    t_list: tuple[float, ...] = (80.0,)
    path: AnyPath | None = EDM(t_max=320.0)  # sigma is drawn up to 80 sqrt(16 latent frames); the student starts at 80
    guidance: float = 6.0  # g 5
    times: times.AnyTimes = times.KarrasIndex(scale=4.0)  # sqrt(latent frames), "adjust_video_noise"
    critic_space: Kind = "eps"
    reduction: Reduction = "half_mean_all"
    critic_reduction: Reduction = "mean_all"
    normalizer_over: Literal["free", "all"] = "all"
    gan: Gan | None = Gan(weight=1e-3, features="teacher", real_noise="own")


@kind("dmd2_predict25", group="method")
@dataclass(frozen=True)
class Predict25(DMD2):
    """Cosmos-Predict2.5 and Transfer2.5: four steps on TrigFlow over a rectified-flow teacher, no GAN."""

    t_list: tuple[float, ...] = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))  # flow 1, .9375, .8333, .625
    renoise: Renoise = "same"
    path: AnyPath | None = TrigFlow()
    warmup_steps: int = 1
    warmup_role: Literal["student", "critic", "regression"] = "student"
    guidance: float = 4.0  # g 3
    times: times.AnyTimes = times.Shifted(shift=5.0)
    critic_space: Kind = "velocity"  # (G - x0)^2 / sin^2 t is the velocity form on TrigFlow, and on no other path
    reduction: Reduction = "mean_all"
    critic_reduction: Reduction = "mean"


@kind("dmd2_fastgen", group="method")
@dataclass(frozen=True)
class FastGen(DMD2):
    """FastGen: x0 critic, GAN on teacher features; with several steps the student sees noised real data."""

    t_list: tuple[float, ...] = (0.999, 0.937, 0.833, 0.624)
    renoise: Renoise = "fresh"  # "sde"; "ode" in its video recipes
    student_input: Literal["rollout", "data"] = "data"
    times: times.AnyTimes = times.Shifted(shift=5.0, low=0.001, high=0.999)
    critic_space: Kind = "x0"
    reduction: Reduction = "half_mean_all"
    critic_reduction: Reduction = "mean_all"
    normalizer_min: float = 0.0
    normalizer_add: float = 1e-6
    normalizer_over: Literal["free", "all"] = "all"
    gan: Gan | None = Gan(weight=1e-3, features="teacher", real_noise="independent")
