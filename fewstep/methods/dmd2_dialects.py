"""DMD2 as three code bases publish it: values of one class, of which every setting can still be changed."""

from __future__ import annotations

import math

from fewstep.config import preset
from fewstep.diffusion import EDM, TrigFlow, times
from fewstep.methods.critic import Critic
from fewstep.methods.dmd2 import DMD2, Normalizer
from fewstep.methods.gan import Gan
from fewstep.methods.student import StudentSample
from fewstep.methods.turns import Warmup


@preset("dmd2_transfer1", group="method")
def transfer1() -> DMD2:
    """Cosmos-Transfer1: one step on EDM, eps-weighted critic, GAN on the features of the teacher's middle block."""
    return DMD2(
        student=StudentSample(t_list=(80.0,)),
        path=EDM(t_max=320.0),  # sigma is drawn up to 80 sqrt(16 latent frames); the student starts at 80
        times=times.KarrasIndex(scale=4.0),  # sqrt(latent frames), "adjust_video_noise"
        guidance=6.0,  # g 5
        normalizer=Normalizer(over="all"),
        reduction="half_mean_all",
        critic=Critic(space="eps", reduction="mean_all"),
        gan=Gan(weight=1e-3, features="teacher", real_noise="own"),
    )


@preset("dmd2_predict25", group="method")
def predict25() -> DMD2:
    """Cosmos-Predict2.5 and Transfer2.5: four steps on TrigFlow over a rectified-flow teacher, no GAN."""
    flow_times = (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))  # of a flow 1, .9375, .8333, .625
    return DMD2(
        student=StudentSample(t_list=flow_times, renoise="same"),
        path=TrigFlow(),
        times=times.Shifted(shift=5.0),
        guidance=4.0,  # g 3
        reduction="mean_all",
        critic=Critic(space="velocity"),  # (G - x0)^2 / sin^2 t is the velocity form on TrigFlow, and on no other path
        warmup=Warmup(steps=1, role="student"),
    )


@preset("dmd2_fastgen", group="method")
def fastgen() -> DMD2:
    """FastGen: x0 critic, GAN on teacher features; with several steps the student's input is noised real data."""
    return DMD2(
        student=StudentSample(t_list=(0.999, 0.937, 0.833, 0.624), input="data"),  # renoise "sde"; "ode" in its video recipes
        times=times.Shifted(shift=5.0, low=0.001, high=0.999),
        normalizer=Normalizer(min=0.0, add=1e-6, over="all"),
        reduction="half_mean_all",
        critic=Critic(space="x0", reduction="mean_all"),
        gan=Gan(weight=1e-3, features="teacher", real_noise="independent"),
    )
