"""Causal students of the toy world: two chains to Self-Forcing, at its size.

FastGen's three stages, on states of the teacher's ODE (the demo's pairs):
    fewstep train experiment=toy_kd_causal
    fewstep train experiment=toy_sf
Causal-rCM's and Causal-Forcing's, on clips alone:
    fewstep train experiment=toy_causal_finetune
    fewstep train experiment=toy_causal_consistency
    fewstep train experiment=toy_sf_consistency

A clip of 17 frames has 5 latent frames: the first shows one frame, each other one four. A chunk is one of them.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.config import recipe
from fewstep.diffusion.times import LogitNormal
from fewstep.methods import DMD2, KD, CausalConsistency, CausalFinetune, CausalKD, CausalSample, Grid, SelfForcing
from fewstep.networks.causal import CausalSpec
from fewstep.networks.causal_attention import Causality
from fewstep.networks.roles import Full, Networks
from fewstep.toyworld import recipes
from fewstep.training.run import Job, Run

CAUSALITY = Causality(chunk=1, span=5)


@recipe("toy_kd_causal")
def toy_kd_causal() -> Run:
    """CausalKD of the toy teacher into a streaming student of four steps, on states of its ODE."""
    run = recipes.toy_kd_4step()
    assert isinstance(run.method, KD) and run.method.t_list is not None
    return replace(
        run,
        job=replace(run.job, name="toy_kd_causal"),
        method=CausalKD(t_list=run.method.t_list),
        networks=replace(run.networks, student=Full(causal=CAUSALITY)),
    )


@recipe("toy_causal_finetune")
def toy_causal_finetune() -> Run:
    """The toy teacher made causal by teacher forcing on clips: the teacher of toy_causal_consistency."""
    run = recipes.toy_dmd2_4step()
    return replace(
        run,
        job=replace(run.job, name="toy_causal_finetune", after=()),
        method=CausalFinetune(times=LogitNormal(), drop_condition=0.1),
        networks=Networks(run.networks.teacher, student=Full(causal=CAUSALITY)),
        optim=replace(run.optim, lr=5e-4, betas=(0.9, 0.99), warmup_iters=20),
        critic_optim=None,
    )


@recipe("toy_causal_consistency")
def toy_causal_consistency() -> Run:
    """Consistency distillation of the causal toy teacher into a streaming student of four steps, on clips alone."""
    run, shift = recipes.toy_dmd2_4step(), recipes.STUDENT_SHIFT
    assert isinstance(run.method, DMD2)
    assert run.networks.teacher is not None
    teacher = replace(run.job, name="toy_causal_finetune")
    return replace(
        run,
        job=replace(run.job, name="toy_causal_consistency", after=(teacher.name,)),
        method=CausalConsistency(run.method.student.t_list, Grid(shift=shift), run.method.guidance),
        networks=Networks(CausalSpec.over(run.networks.teacher, CAUSALITY), teacher_init=_average_of(teacher)),
        optim=replace(run.optim, lr=5e-4, betas=(0.9, 0.99), warmup_iters=20),
        critic_optim=None,
    )


@recipe("toy_sf")
def toy_sf() -> Run:
    """Self-Forcing against the toy teacher, from the student of toy_kd_causal."""
    return _self_forcing("toy_sf", "toy_kd_causal")


@recipe("toy_sf_consistency")
def toy_sf_consistency() -> Run:
    """Self-Forcing against the toy teacher, from the student of toy_causal_consistency."""
    return _self_forcing("toy_sf_consistency", "toy_causal_consistency")


def _self_forcing(name: str, before: str) -> Run:
    run = recipes.toy_dmd2_4step()
    dmd2 = run.method
    assert isinstance(dmd2, DMD2)
    method = SelfForcing(
        student=CausalSample(t_list=dmd2.student.t_list, critic_exit="last"),
        student_update_freq=dmd2.student_update_freq,
        guidance=dmd2.guidance,
        times=dmd2.times,
    )
    student = Full(init=_average_of(replace(run.job, name=before)), causal=CAUSALITY)
    return replace(
        run,
        job=replace(run.job, name=name, after=(before,)),
        method=method,
        networks=replace(run.networks, student=student),
    )


def _average_of(job: Job) -> str:
    return f"{job.project}/{job.group}/{job.name}@latest:student.ema"
