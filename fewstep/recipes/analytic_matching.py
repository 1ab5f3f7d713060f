"""DMD2 with its GAN, and its relatives, on the mixture of eight Gaussians: recipes with a known answer.

All start from the flow-matching model of `analytic_finetune` and are scored by the energy distance to the data (squared form,
unbiased), as in analytic.py. The analytic teacher has no features: a head reads the critic's, or (LADD) those of that model.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.config import recipe
from fewstep.diffusion.times import Shifted
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import LADD, FDivergence, Gan, PhasedDMD, RewardWeight, SiD, StudentSample
from fewstep.methods.reward_dmd import Toward
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.roles import Full, Networks
from fewstep.recipes.analytic import (
    FOUR_STEPS,
    MIXTURE,
    PRETRAINED,
    STUDENT,
    analytic_dmd2_onestep,
    analytic_finetune,
    four_steps,
)
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Run

HEAD = MultiscaleSpec(taps=(0, 1, 2), channels=STUDENT.width, hidden=64)

# A wrong teacher: shifted, and with all modes of equal weight. Its modes are as wide as those of the data, because a few-step
# student has narrower modes than its teacher, which must not count as getting nearer to the data.
BIASED = replace(
    MIXTURE, means=tuple((round(x + 0.4, 4), round(y + 0.2, 4)) for x, y in MIXTURE.means), weights=(1.0,) * len(MIXTURE.means)
)


def _with_name(run: Run, name: str, *after: str) -> Run:
    return replace(run, job=replace(run.job, name=name, after=after or ("analytic_finetune",)))


@recipe("analytic_biased")
def analytic_biased() -> Run:
    """Flow matching on samples of a biased teacher, from which its students start. Scored against the true data."""
    return _with_name(replace(analytic_finetune(), data=MixtureSamples(BIASED)), "analytic_biased", "analytic_finetune")


@recipe("analytic_dmd2_biased")
def analytic_dmd2_biased() -> Run:
    """Four-step DMD2 against a biased teacher, without GAN: the student inherits the bias."""
    run, start = four_steps(), "analytic/basic/analytic_biased@latest:student.ema"
    networks = Networks(teacher=BIASED, student=Full(STUDENT, init=start), critic=Full(STUDENT, init=start))
    run = replace(run, networks=networks, health=Health())
    return _with_name(run, "analytic_dmd2_biased", "analytic_biased")


@recipe("analytic_dmd2_gan")
def analytic_dmd2_gan() -> Run:
    """The same with a GAN on the true data: the student ends nearer to the data than its teacher."""
    run = analytic_dmd2_biased()
    return replace(
        _with_name(run, "analytic_dmd2_gan", "analytic_biased"),
        method=replace(FOUR_STEPS, gan=Gan(weight=3.0, features="critic", real_noise="own", r1_weight=1.0, r1_std=0.05)),
        networks=replace(run.networks, head=HEAD),
    )


@recipe("analytic_f_distill")
def analytic_f_distill() -> Run:
    """Four-step f-distill (Jensen-Shannon) against the exact teacher."""
    run = four_steps()
    return replace(
        _with_name(run, "analytic_f_distill"),
        method=replace(FOUR_STEPS, gan=Gan(weight=1e-2, features="critic"), sample_weight=FDivergence("js")),
        networks=replace(run.networks, head=HEAD),
    )


@recipe("analytic_ladd")
def analytic_ladd() -> Run:
    """Four-step LADD: the features are those of the flow-matching model, the real samples are data."""
    run = four_steps()
    return replace(
        _with_name(run, "analytic_ladd"),
        method=LADD(times=Shifted(shift=2.0), gan=Gan(weight=1.0, r1_weight=1.0, r1_std=0.05)),
        networks=Networks(teacher=STUDENT, teacher_init=PRETRAINED, student=Full(STUDENT, init=PRETRAINED), head=HEAD),
        critic_optim=None,
        head_optim=Optim(lr=1e-3, betas=(0.0, 0.99)),
        optim=Optim(lr=2e-4, schedule="cosine", betas=(0.0, 0.99)),
        health=Health(),
    )


@recipe("analytic_sid")
def analytic_sid() -> Run:
    """One-step SiD against the exact teacher."""
    return replace(
        _with_name(analytic_dmd2_onestep(), "analytic_sid"),
        method=SiD(student=StudentSample(t_list=(1.0,)), times=Shifted(shift=2.0), student_update_freq=2),
    )


@recipe("analytic_phased")
def analytic_phased() -> Run:
    """Two phases with one expert each against the exact teacher; both experts start from the flow-matching model."""
    run = four_steps()
    return replace(
        _with_name(run, "analytic_phased"),
        method=PhasedDMD(t_list=(1.0, 0.75), times=Shifted(shift=2.0), student_update_freq=3, steps_per_phase=2000),
        networks=replace(run.networks, student=Full(ExpertsSpec(STUDENT, STUDENT, 0.9), init=PRETRAINED)),
        health=Health(),
    )


@recipe("analytic_reward")
def analytic_reward() -> Run:
    """Four-step DMD2, weighted towards the right; the student can represent the teacher and ends at it all the same."""
    return replace(
        _with_name(four_steps(), "analytic_reward"),
        method=replace(FOUR_STEPS, sample_weight=RewardWeight(reward=Toward(direction=(1.0, 0.0)), beta=1.0, max_weight=5.0)),
    )
