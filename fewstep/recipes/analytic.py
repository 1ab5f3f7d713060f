"""Recipes with a known answer: a mixture of eight Gaussians of the plane, unequal in weight and width.

The teacher is the mixture itself, exact at every noise level; students and critics are small MLPs. Each recipe runs in a minute
on two cores, and reports the energy distance between the student's samples and the data (squared form, unbiased).
"""

from __future__ import annotations

import math
from dataclasses import replace

from fewstep.config import recipe
from fewstep.diffusion.times import Shifted
from fewstep.inference.synthetic import MixtureSamples, TeacherPairs
from fewstep.methods import DMD2, KD, Finetune, StudentSample
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.preview import PointsPreview
from fewstep.training.run import Checkpoint, Job, Run, Trainer

MIXTURE = MixtureSpec(
    means=tuple((round(1.4 * math.cos(k * math.pi / 4), 4), round(1.4 * math.sin(k * math.pi / 4), 4)) for k in range(8)),
    stds=(0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1, 0.2),
    weights=(3.0, 1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 1.0),
)
STUDENT = TinySpec(width=64, depth=3)
PRETRAINED = "analytic/basic/analytic_finetune@latest:student.ema"
FOUR_STEPS = DMD2(times=Shifted(shift=2.0), student_update_freq=2)
SCORE = PointsPreview(reference=MixtureSamples(MIXTURE, num=4096, seed=77))


def _job(name: str, *after: str) -> Job:
    return Job(project="analytic", group="basic", name=name, after=after)


@recipe("analytic_finetune")
def analytic_finetune() -> Run:
    """Flow matching on the data: the many-step model from which the analytic students start."""
    return Run(
        job=_job("analytic_finetune"),
        method=Finetune(num_sample_steps=32),
        networks=Networks(student=Full(STUDENT, init="random")),
        data=MixtureSamples(MIXTURE),
        optim=Optim(lr=2e-3, schedule="cosine", warmup_iters=100),
        ema=Ema(beta=0.995),
        trainer=Trainer(max_iter=2000, batch_size=512, num_threads=1, log_every=250),
        checkpoint=Checkpoint(save_iter=1000),
        preview=SCORE,
    )


@recipe("analytic_kd")
def analytic_kd() -> Run:
    """One-step KD on pairs of noise and sample of the exact teacher."""
    run = analytic_finetune()
    return replace(
        run,
        job=_job("analytic_kd", "analytic_finetune"),
        method=KD(student_sample_steps=1, t_list=(1.0,)),
        networks=Networks(teacher=MIXTURE, student=Full(STUDENT, init=PRETRAINED)),
        data=TeacherPairs(MIXTURE, num=65536),
        trainer=replace(run.trainer, max_iter=3000),
        checkpoint=Checkpoint(save_iter=1500),
    )


@recipe("analytic_kd_4step")
def analytic_kd_4step() -> Run:
    """Four-step KD on stored states of the exact teacher's ODE."""
    t_list = (1.0, 0.9375, 0.8333333333333334, 0.625)
    run = analytic_kd()
    return replace(
        run,
        job=replace(run.job, name="analytic_kd_4step"),
        method=KD(student_sample_steps=4, t_list=t_list),
        data=TeacherPairs(MIXTURE, num=65536, path_times=t_list),
    )


def four_steps() -> Run:
    """Four-step DMD2 with a random exit: what the relatives of DMD2 change."""
    return Run(
        job=_job("analytic_dmd2", "analytic_finetune"),
        method=FOUR_STEPS,
        networks=Networks(teacher=MIXTURE, student=Full(STUDENT, init=PRETRAINED), critic=Full(STUDENT, init=PRETRAINED)),
        data=MixtureSamples(MIXTURE),
        optim=Optim(lr=5e-4, schedule="cosine", betas=(0.0, 0.999)),
        critic_optim=Optim(lr=1e-3, betas=(0.0, 0.999)),
        ema=Ema(beta=0.99),
        trainer=Trainer(max_iter=4000, batch_size=256, num_threads=1, log_every=250),
        checkpoint=Checkpoint(save_iter=2000),
        preview=SCORE,
        health=Health(every=1000, num=256),
    )


@recipe("analytic_dmd2")
def analytic_dmd2() -> Run:
    """Four-step DMD2 against the exact teacher.

    exit_step=last: the critic knows finished samples only. Of ten settings compared by benchmarks/time_to_quality.py (seeds 10,
    11, 12) it is the fastest, in half of the iterations, and ends nearest (docs/methods/dmd2.md). The learning rates are those
    of a sweep of 24 trials (there).
    """
    run = four_steps()
    return replace(
        run,
        method=replace(FOUR_STEPS, student=StudentSample(exit_step="last")),
        optim=replace(run.optim, lr=8e-4),
        critic_optim=Optim(lr=8e-4, betas=(0.0, 0.999)),
    )


@recipe("analytic_dmd2_onestep")
def analytic_dmd2_onestep() -> Run:
    """One-step DMD2 against the exact teacher."""
    run = four_steps()
    return replace(
        run,
        job=replace(run.job, name="analytic_dmd2_onestep"),
        method=DMD2(student=StudentSample(t_list=(1.0,)), times=Shifted(shift=2.0)),
    )
