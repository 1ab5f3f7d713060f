"""Causal students of the toy world: FastGen's three stages at its size.

fewstep pairs TOY --prompts .. --out pairs --path-times 4 ..     (the demo's pairs serve, too)
fewstep train experiment=toy_kd_causal
fewstep train experiment=toy_sf

A clip of 17 frames has 5 latent frames: the first shows one frame, each other one four. A chunk is one of them.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.config import recipe
from fewstep.methods import DMD2, KD, CausalKD, CausalSample, SelfForcing
from fewstep.networks.causal_attention import Causality
from fewstep.networks.roles import Full
from fewstep.toyworld import recipes
from fewstep.training.run import Run

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


@recipe("toy_sf")
def toy_sf() -> Run:
    """Self-Forcing against the toy teacher, from the student of toy_kd_causal."""
    run = recipes.toy_dmd2_4step()
    dmd2 = run.method
    assert isinstance(dmd2, DMD2)
    kd = replace(run.job, name="toy_kd_causal")
    method = SelfForcing(
        student=CausalSample(t_list=dmd2.student.t_list),
        student_update_freq=dmd2.student_update_freq,
        guidance=dmd2.guidance,
        times=dmd2.times,
    )
    init = f"{kd.project}/{kd.group}/{kd.name}@latest:student.ema"
    return replace(
        run,
        job=replace(run.job, name="toy_sf", after=(kd.name,)),
        method=method,
        networks=replace(run.networks, student=Full(init=init, causal=CAUSALITY)),
    )
