"""Recipes for any teacher and any data set: what else they need they read from the teacher.

    fewstep train experiment=finetune teacher=PIPELINE data.dataset_dir=DIR            post-train it on clips
    fewstep train experiment=lora teacher=PIPELINE data.dataset_dir=DIR rank=16        the same with adapters
    fewstep train experiment=kd teacher=PIPELINE data.dataset_dir=PAIRS steps=4        a student, from the teacher's pairs
    fewstep train experiment=dmd2 teacher=PIPELINE data.dataset_dir=DIR steps=4 networks.student.init=RUN_OF_KD
    fewstep train experiment=scm|rcm|flow_map teacher=PIPELINE data.dataset_dir=DIR    consistency models, a flow map
    fewstep train experiment=flow_map_on_policy teacher=PIPELINE data.dataset_dir=DIR networks.student.init=RUN_OF_FLOW_MAP

    fewstep train experiment=kd teacher=PIPELINE control=edge,vis,depth                one student for several controls

PIPELINE is any address of a teacher: a diffusers folder or hub id, a run of `finetune`, an export of one, published weights.
With several controls every batch has one of them, drawn equally; pairs are then in datasets/pairs/CONTROL (other places:
data.sources.N.data.dataset_dir). Guidance, times and learning rates are those that students of its family are published with
(NetworkSpec.distillation); the learning rates of networks under 100 million weights are those of the toy world. A text of 512
T5 tokens, a mask of the padding, and so on follow from the pipeline. Every value is in config.yaml and can be changed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fewstep.config import ConfigError, choices, recipe
from fewstep.data.folder.dataset import Folder
from fewstep.data.mix import Mix, by_control
from fewstep.diffusion import EDM, VP
from fewstep.diffusion.times import LogitNormal, LogNormal, Shifted, Uniform
from fewstep.inference.teacher import Teacher, teacher_at
from fewstep.methods import DMD2, KD, RCM, SCM, Finetune, FlowMap, Method, OnPolicy, StudentSample, TangentTerm, transfer1
from fewstep.networks.contract import NetworkSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.anyflow import AnyFlowSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.recipes.watched import watched
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

Control = Literal["edge", "vis", "depth", "seg", "keypoint"]
BLOCK = 64  # samples in a row of one control: one micro-batch on all processes, of up to so many samples
RCM_TIMES = LogNormal(mean=0.7, std=1.6)  # rCM, of tan t on video
RCM_STEPS = (math.pi / 2, 1.5, 1.4, 1.0)  # rCM's times of up to four steps, in TrigFlow
EMA = Ema(profile="power", width=0.1)  # Predict2.5; right for a run of any length


@recipe("finetune")
def finetune(teacher: str = "", control: tuple[Control, ...] = ()) -> Run:
    """Post-train a teacher on clips of your own, all weights; it stays a teacher."""
    return _finetune("finetune", _opened(teacher, control), control, 0)


@recipe("lora")
def lora(teacher: str = "", rank: int = 16, control: tuple[Control, ...] = ()) -> Run:
    """Post-train a teacher on clips of your own with low-rank adapters; it stays a teacher."""
    return _finetune("lora", _opened(teacher, control), control, rank)


@recipe("kd")
def kd(teacher: str = "", steps: int = 4, shift: float | None = None, control: tuple[Control, ...] = (), rank: int = 0) -> Run:
    """KD of any teacher into a student of `steps` steps, on its pairs (`fewstep pairs`); rank=32: adapters."""
    source = _opened(teacher, control)
    _refuse_steps(steps)
    method = KD(student_sample_steps=steps, t_list=source.times(steps, shift))
    data = _data(source, "pairs", control, pairs=("noise",) if steps == 1 else ("path",))
    optim = Optim(lr=_lr(source, source.published.kd_lr, 5e-4, rank), betas=(0.9, 0.99), clip=1.0)
    return watched(_run(source, f"kd_{steps}step", method, _networks(source, rank), data, optim))


@recipe("dmd2")
def dmd2(
    teacher: str = "",
    steps: int = 4,
    shift: float | None = None,
    guidance: float | None = None,
    control: tuple[Control, ...] = (),
    rank: int = 0,
) -> Run:
    """DMD2 of any teacher into a student of `steps` steps; networks.student.init=RUN begins with a run of kd."""
    source = _opened(teacher, control)
    _refuse_steps(steps)
    method = _dmd2(source, steps, shift, source.published.guidance if guidance is None else guidance)
    return _from_clips(source, f"dmd2_{steps}step", method, _networks(source, rank), control, rank)


@recipe("scm")
def scm(
    teacher: str = "", steps: int = 2, guidance: float | None = None, control: tuple[Control, ...] = (), rank: int = 0
) -> Run:
    """sCM of any teacher: a consistency model of `steps` steps in continuous time, from clips; no pairs are needed."""
    source = _opened(teacher, control)
    _refuse_steps(steps, most=len(RCM_STEPS))
    term = TangentTerm(times=RCM_TIMES, guidance=source.published.guidance if guidance is None else guidance)
    return _from_clips(source, f"scm_{steps}step", SCM(term, RCM_STEPS[:steps]), _networks(source, rank), control, rank)


@recipe("rcm")
def rcm(
    teacher: str = "", steps: int = 4, guidance: float | None = None, control: tuple[Control, ...] = (), rank: int = 0
) -> Run:
    """rCM of any teacher into a student of `steps` steps: sCM on clips, and DMD2 on the student's own samples."""
    source = _opened(teacher, control)
    _refuse_steps(steps, most=len(RCM_STEPS))
    method, w = RCM(), source.published.guidance if guidance is None else guidance
    dmd = replace(method.dmd, student=StudentSample(RCM_STEPS[:steps]), guidance=w)
    method = RCM(replace(method.consistency, guidance=w), dmd)
    return _from_clips(source, f"rcm_{steps}step", method, _networks(source, rank), control, rank)


@recipe("flow_map")
def flow_map(teacher: str = "", steps: int = 4, shift: float | None = None, guidance: float | None = None) -> Run:
    """A flow map of a Wan or Cosmos teacher: one student for any number of steps, from clips. Of Wan: diffusers' AnyFlow."""
    return _flow_map(_opened(teacher, ()), "flow_map", FlowMap(), steps, shift, guidance)


@recipe("flow_map_on_policy")
def flow_map_on_policy(teacher: str = "", steps: int = 4, shift: float | None = None, guidance: float | None = None) -> Run:
    """Its second stage, DMD2's term on the student's own jumps; networks.student.init=RUN begins with a run of flow_map."""
    source = _opened(teacher, ())
    method = FlowMap(on_policy=OnPolicy(times=Shifted(source.published.shift if shift is None else shift)))
    return _flow_map(source, "flow_map_on_policy", method, steps, shift, guidance)


# ---- parts of the above ----------------------------------------------------------------------------------------------


def _opened(address: str, control: tuple[Control, ...]) -> Teacher:
    if not address:
        raise ConfigError([("teacher", "which? Give teacher=ADDRESS: a pipeline's folder or hub id, a run, published weights")])
    teacher = teacher_at(address, control)
    branches = teacher.spec.control_branches
    missing = [name for name in control if name not in branches]
    if missing:
        listed = f"has branches for {', '.join(branches)} only" if branches else "has no control branch"
        raise ConfigError([("control", f"{missing[0]}: {address} {listed}")])
    return teacher


def _refuse_steps(steps: int, most: int | None = None) -> None:
    if steps < 1:
        raise ConfigError([("steps", f"must be at least 1, not {steps}")])
    if most is not None and steps > most:
        raise ConfigError([("steps", f"must be at most {most} for this method, not {steps}")])


def _finetune(name: str, source: Teacher, control: tuple[Control, ...], rank: int) -> Run:
    adapted = Networks(teacher=source.spec, teacher_init=source.init, student=Lora(rank=rank)) if rank else None
    whole = Networks(student=Full(source.spec, init=source.init or "random"))
    data = _data(source, "clips", control, negative=_negative(source))
    optim = Optim(lr=_lr(source, 2e-5, 5e-4, rank), betas=(0.9, 0.99), weight_decay=0.01, clip=1.0)
    return _run(source, name, _denoising(source), adapted or whole, data, optim, iterations=2000)


def _denoising(source: Teacher) -> Finetune:
    """The loss that the family was trained with, and a tenth of the texts dropped, which keeps guidance."""
    path, common = source.path, Finetune(drop_condition=0.1)
    if isinstance(path, EDM):  # Predict1
        times = LogNormal(mean=0.0, std=1.0, scale=4.0)  # sqrt(16 latent frames)
        return replace(common, space="x0", weighting="edm", sigma_data=path.sigma_data, times=times)
    if isinstance(path, VP):
        return replace(common, space="eps", times=Uniform())
    return replace(common, times=LogitNormal(mean=math.log(source.sampler.shift)))  # the teacher's shift of a logit-normal


def _dmd2(source: Teacher, steps: int, shift: float | None, guidance: float) -> DMD2:
    student = StudentSample(t_list=source.times(steps, shift))
    if isinstance(source.path, EDM):  # Transfer1, without its GAN
        return replace(transfer1(), student=student, guidance=guidance, gan=None)
    return DMD2(student=student, guidance=guidance, times=Shifted(source.published.shift if shift is None else shift))


def _flow_map(source: Teacher, name: str, method: FlowMap, steps: int, shift: float | None, guidance: float | None) -> Run:
    _refuse_steps(steps)
    published = source.published
    method = replace(
        method,
        velocity=replace(method.velocity, guidance=published.guidance if guidance is None else guidance),
        num_steps=steps,
        shift=published.shift if shift is None else shift,
    )
    networks = replace(_networks(source, 0), student=Full(_with_second_time(source.spec)))
    return _from_clips(source, name, method, networks, (), 0)


def _with_second_time(spec: NetworkSpec) -> NetworkSpec:
    """The network of a flow map that begins with the weights of this one."""
    if isinstance(spec, WanSpec):
        return AnyFlowSpec.like(spec)
    if isinstance(spec, CosmosSpec) and not spec.control_branches:
        return replace(spec, end_gate=AnyFlowSpec().gate)
    why = "a flow map needs a network with a second time, which Wan (anyflow) and Cosmos without control branches have"
    raise ConfigError([("teacher", why)])


def _networks(source: Teacher, rank: int) -> Networks:
    return Networks(teacher=source.spec, teacher_init=source.init, student=Lora(rank=rank) if rank else Full())


def _from_clips(source: Teacher, name: str, method: Method, networks: Networks, control: tuple[Control, ...], rank: int) -> Run:
    """A run on clips with the learning rates of DMD2; with adapters (`rank`) the critic has them, too."""
    published = source.published
    optim = Optim(lr=_lr(source, published.lr, 2e-4, rank), betas=(0.0, 0.99), clip=1.0)
    critic = replace(optim, lr=_lr(source, published.critic_lr, 4e-4, rank)) if "critic" in method.roles else None
    if critic and rank:
        networks = replace(networks, critic=Lora(rank=rank))
    data = _data(source, "clips", control, negative=_negative(source))
    return watched(_run(source, name, method, networks, data, optim, critic))


def _run(
    source: Teacher,
    name: str,
    method: Method,
    networks: Networks,
    data: Folder | Mix,
    optim: Optim,
    critic_optim: Optim | None = None,
    iterations: int = 6000,
) -> Run:
    return Run(
        job=_job(source, name),
        method=method,
        networks=networks,
        data=data,
        optim=optim,
        critic_optim=critic_optim,
        ema=EMA,
        trainer=_trainer(source, iterations),
        checkpoint=Checkpoint(save_iter=500),
        parallel=_parallel(source),
    )


def _data(
    source: Teacher, where: str, control: tuple[Control, ...], *, pairs: Any = (), negative: str | None = None
) -> Folder | Mix:
    """A folder of clips; for several controls one for each, drawn equally. A pair belongs to the control it was made with."""
    text = source.text
    folder = Folder(
        f"datasets/{where}",
        x0="latents",
        max_tokens=text.max_tokens,
        mask_text=text.uses_mask,
        negative=negative,
        pairs=pairs,
    )
    return by_control(folder, tuple(choices("control")[name]() for name in control), BLOCK)  # registered by name


def _negative(source: Teacher) -> str:
    return "zeros" if source.published.negative == "zeros" else "negative.pickle"


def _job(source: Teacher, name: str) -> Job:
    return Job(project="general", group=Path(source.address.partition("@")[0].partition(":")[0]).name or "teacher", name=name)


def _lr(source: Teacher, published: float, small: float, rank: int) -> float:
    """Adapters take five times the learning rate of full weights."""
    return (small if source.is_small else published) * (5.0 if rank else 1.0)


def _trainer(source: Teacher, max_iter: int) -> Trainer:
    if source.is_small:
        return Trainer(max_iter=max_iter, batch_size=16, log_every=20)
    return Trainer(max_iter=max_iter, batch_size=1, grad_accum=8, precision="bf16", checkpointing=True, log_every=20)


def _parallel(source: Teacher) -> Parallel:
    return Parallel() if source.is_small else Parallel(mode="fsdp")
