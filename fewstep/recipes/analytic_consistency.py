"""Consistency models and flow maps on the mixture of analytic.py: the exact teacher, small MLPs, the same score.

Each starts from the student of analytic_finetune, as a student starts from its teacher's weights.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fewstep.config import recipe
from fewstep.diffusion import TrigFlow
from fewstep.diffusion.derivative import Jvp
from fewstep.diffusion.times import Shifted
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import (
    DMD2,
    RCM,
    SCM,
    AverageVelocity,
    Consistency,
    Curriculum,
    FlowMap,
    Grid,
    MeanFlow,
    Method,
    OnPolicy,
    StudentSample,
    Tangent,
    TangentTerm,
    Truncation,
)
from fewstep.networks.roles import Full, Networks
from fewstep.recipes.analytic import MIXTURE, PRETRAINED, STUDENT, analytic_kd
from fewstep.training.optim import Optim
from fewstep.training.run import Run

TWO_STEPS = (math.pi / 2, 1.1)
MAP = replace(STUDENT, end_time=True)
TIMES = Shifted(shift=2.0)


def _run(name: str, method: Method, student: Full) -> Run:
    run = analytic_kd()
    return replace(
        run,
        job=replace(run.job, name=name),
        method=method,
        networks=Networks(teacher=MIXTURE, student=student),
        data=MixtureSamples(MIXTURE),
        optim=replace(run.optim, lr=1e-3),
    )


@recipe("analytic_scm")
def analytic_scm() -> Run:
    """sCM in two steps: a consistency model in continuous time, from the exact teacher."""
    term = TangentTerm(tangent=Tangent(warmup_iters=1000))
    return _run("analytic_scm", SCM(term, TWO_STEPS), Full(STUDENT, init=PRETRAINED))


@recipe("analytic_consistency")
def analytic_consistency() -> Run:
    """A consistency model in one step, distilled from the exact teacher with ECT's curriculum."""
    method = Consistency(schedule=Curriculum(stage_iters=400))
    return _run("analytic_consistency", method, Full(STUDENT, init=PRETRAINED))


@recipe("analytic_tcm")
def analytic_tcm() -> Run:
    """The second stage of TCM: one step, above t = .5; the student of analytic_consistency answers below."""
    method = Consistency(source="data", schedule=Grid(num=64, shift=2.0), huber=0.03, truncation=Truncation(t=0.5))
    first = "analytic/basic/analytic_consistency@latest:student.ema"
    run = _run("analytic_tcm", method, Full(STUDENT, init=first))
    job = replace(run.job, after=("analytic_consistency",))
    return replace(run, job=job, networks=replace(run.networks, teacher=STUDENT, teacher_init=first))


@recipe("analytic_rcm")
def analytic_rcm() -> Run:
    """rCM in two steps: sCM's term on data, and DMD2's on the student's own samples."""
    term = TangentTerm(tangent=Tangent(warmup_iters=300))
    dmd = DMD2(student=StudentSample(TWO_STEPS), path=TrigFlow(), times=TIMES, student_update_freq=2)
    run = _run("analytic_rcm", RCM(term, dmd), Full(STUDENT, init=PRETRAINED))
    return replace(
        run,
        networks=replace(run.networks, critic=Full(STUDENT, init=PRETRAINED)),
        optim=Optim(lr=5e-4, schedule="cosine", betas=(0.0, 0.999)),
        critic_optim=Optim(lr=1e-3, betas=(0.0, 0.999)),
        trainer=replace(run.trainer, batch_size=256),
    )


@recipe("analytic_meanflow")
def analytic_meanflow() -> Run:
    """MeanFlow in two jumps, from the exact teacher."""
    method = MeanFlow(AverageVelocity(times=TIMES, share_instant=0.25), num_steps=2)
    run = _run("analytic_meanflow", method, Full(MAP, init=PRETRAINED))
    return replace(run, optim=replace(run.optim, lr=2e-3))


@recipe("analytic_flow_map")
def analytic_flow_map() -> Run:
    """A flow map for any number of jumps, from the exact teacher; four jumps in its previews."""
    velocity = AverageVelocity(times=TIMES, share_whole=0.25, derivative=Jvp())
    run = _run("analytic_flow_map", FlowMap(velocity, shift=2.0), Full(MAP, init=PRETRAINED))
    return replace(run, optim=replace(run.optim, lr=2e-3))


@recipe("analytic_flow_map_on_policy")
def analytic_flow_map_on_policy() -> Run:
    """The second stage: distribution matching on the flow map's own jumps, from analytic_flow_map."""
    run = analytic_flow_map()
    assert isinstance(run.method, FlowMap)
    matching = OnPolicy(num_jumps=(1, 2, 4, 8, 16), times=TIMES)
    start = "analytic/basic/analytic_flow_map@latest:student.ema"
    return replace(
        run,
        job=replace(run.job, name="analytic_flow_map_on_policy", after=("analytic_flow_map",)),
        method=replace(run.method, on_policy=matching),
        networks=replace(run.networks, student=Full(MAP, init=start), critic=Full(STUDENT, init=PRETRAINED)),
        optim=Optim(lr=2e-4, schedule="cosine", betas=(0.0, 0.999)),
        critic_optim=Optim(lr=1e-3, betas=(0.0, 0.999)),
        trainer=replace(run.trainer, max_iter=2000, batch_size=256),
    )
