"""The toy world, from pixels to a teacher: the recipes that made the weights shipped in fewstep/toyworld/stack/.

fewstep prepare toyworld --out datasets/toyworld/train --num 24000 --seed 11 --only videos,metas,edge,vis,depth
python -m fewstep.toyworld.train_features --seed 1 --out perceptual.safetensors   (below the output root)
python -m fewstep.toyworld.train_tokenizer tokenizer
fewstep prepare words datasets/toyworld/train --out fewstep/toyworld/stack/text_encoder
fewstep prepare text datasets/toyworld/train --text-encoder fewstep/toyworld/stack
fewstep prepare latents datasets/toyworld/train --codec fewstep/toyworld/stack --control edge    (and vis, and depth)
fewstep train experiment=toy_teacher
python -m fewstep.toyworld.train_tokenizer decoder
fewstep train experiment=toy_edge    (and toy_vis, and toy_depth)

After each training `python -m fewstep.toyworld.release` copies the weights into the stack; docs/toyworld.md has every command.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import fewstep
from fewstep.config import alike, recipe
from fewstep.data.controls import Control, Depth
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import TrigFlow
from fewstep.diffusion.derivative import Difference
from fewstep.diffusion.path import floats
from fewstep.diffusion.sampling import student_times
from fewstep.diffusion.times import LogitNormal, LogNormal, Shifted, shifted
from fewstep.environment import output_root
from fewstep.methods import (
    DMD2,
    KD,
    RCM,
    SCM,
    AverageVelocity,
    Finetune,
    FlowMap,
    OnPolicy,
    StudentSample,
    Tangent,
    TangentTerm,
)
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.recipes.watched import watched
from fewstep.toyworld.dataset import EDGE, VIS
from fewstep.toyworld.train_tokenizer import LATENT_CHANNELS
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

TRAIN = "datasets/toyworld/train"
SHIPPED = str(fewstep.TOY)
WORLD, PAIRS = "world", "pairs"  # of the demo, below the output root: clips with captions, and what the teacher made of them
GUIDANCE = 2.0  # of the teacher; baked into every student
STUDENT_SHIFT = 3.0  # of the students' times
LORA_LR = 5.0  # times the learning rate of full weights
TEACHER = CosmosSpec(
    latent_channels=LATENT_CHANNELS,
    num_heads=5,
    head_dim=32,
    num_layers=6,
    text_dim=64,
    adaln_lora_dim=32,
    max_size=(8, 8, 8),
    rope_scale=(1.0, 1.0, 1.0),
    padding_mask=False,
)
CONTROLLED = alike(CosmosControlSpec, TEACHER, num_control_blocks=1, hint_channels=LATENT_CHANNELS)


def _job(name: str, *after: str) -> Job:
    return Job(project="toyworld", group="basic", name=name, after=after)


@recipe("toy_teacher")
def toy_teacher() -> Run:
    """The toy world's teacher: a rectified flow, conditioned on text and on 0, 1 or 2 given latent frames."""
    return Run(
        job=_job("toy_teacher"),
        method=Finetune(times=LogitNormal(), drop_condition=0.1, first_frames=(0.7, 0.15, 0.15)),
        networks=Networks(student=Full(TEACHER, init="random")),
        data=Folder(TRAIN, x0="latents", max_tokens=40, mask_text=True, negative="zeros"),
        optim=Optim(lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01, schedule="cosine", warmup_iters=500, clip=1.0),
        ema=Ema(beta=0.9995),
        trainer=Trainer(max_iter=20000, batch_size=32, num_threads=1, log_every=100),
        checkpoint=Checkpoint(save_iter=500),
        health=Health(every=None),
    )


@recipe("toy_edge")
def toy_edge() -> Run:
    """A control branch for the frozen toy teacher: clips follow the edges of another clip (form of Transfer2.5)."""
    return _branch(EDGE)


@recipe("toy_vis")
def toy_vis() -> Run:
    """The same for the blur of another clip."""
    return _branch(VIS)


@recipe("toy_depth")
def toy_depth() -> Run:
    """The same for the depth of another clip."""
    return _branch(Depth())


def _branch(control: Control) -> Run:
    network = replace(CONTROLLED, controls=(control.folder,), train="control", pretrained=SHIPPED)
    return Run(
        job=_job(f"toy_{control.folder}"),
        method=Finetune(times=LogitNormal(), drop_condition=0.1, first_frames=(0.7, 0.15, 0.15)),
        networks=Networks(student=Full(network, init="random")),
        data=Folder(TRAIN, x0="latents", max_tokens=40, mask_text=True, negative="zeros", control=control),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, schedule="cosine", warmup_iters=100, clip=1.0),
        ema=Ema(beta=0.999),
        trainer=Trainer(max_iter=1800, batch_size=32, num_threads=1, log_every=100),
        checkpoint=Checkpoint(save_iter=500),
        health=Health(every=None),
    )


# --- students ---------------------------------------------------------------------------------------------------------


def _pairs(*pairs: Literal["noise", "path"]) -> Folder:
    return Folder(str(output_root() / PAIRS), x0="latents", max_tokens=40, mask_text=True, pairs=pairs)


def _kd(name: str, num_steps: int) -> Run:
    t_list = tuple(floats(shifted(num_steps, STUDENT_SHIFT)))
    run = Run(
        job=_job(name),
        method=KD(student_sample_steps=num_steps, t_list=t_list),
        networks=Networks(teacher=replace(TEACHER, pretrained=SHIPPED)),
        data=_pairs("noise" if num_steps == 1 else "path"),
        optim=Optim(lr=5e-4, betas=(0.9, 0.99), schedule="cosine", warmup_iters=20, clip=1.0),
        ema=Ema(beta=0.98),
        trainer=Trainer(max_iter=400, batch_size=32, num_threads=1, log_every=20),
        checkpoint=Checkpoint(save_iter=200),
    )
    return watched(run, every=100, num=32)


@recipe("toy_kd_4step")
def toy_kd_4step() -> Run:
    """Four-step KD on states of the toy teacher's ODE (`fewstep pairs ... --path-times`)."""
    return _kd("toy_kd_4step", 4)


@recipe("toy_kd_1step")
def toy_kd_1step() -> Run:
    """One-step KD on the toy teacher's noise/clip pairs."""
    return _kd("toy_kd_1step", 1)


def _dmd2(name: str, num_steps: int, start: str) -> Run:
    teacher = replace(TEACHER, pretrained=SHIPPED)
    kd = f"toyworld/basic/{start}@latest:student.ema"
    run = Run(
        job=_job(name, start),
        method=DMD2(
            student=StudentSample(t_list=tuple(floats(shifted(num_steps, STUDENT_SHIFT)))),
            student_update_freq=2,
            guidance=GUIDANCE,
            times=Shifted(shift=1.0),
        ),
        networks=Networks(teacher=teacher, student=Full(teacher, init=kd), critic=Full()),
        data=Folder(str(output_root() / WORLD), x0="latents", max_tokens=40, mask_text=True, negative="zeros"),
        optim=Optim(lr=2e-4, betas=(0.0, 0.99), schedule="cosine", warmup_iters=10, clip=1.0),
        critic_optim=Optim(lr=4e-4, betas=(0.0, 0.99), clip=1.0),
        ema=Ema(beta=0.98),
        trainer=Trainer(max_iter=600, batch_size=32, num_threads=1, log_every=20),
        checkpoint=Checkpoint(save_iter=200),
    )
    return watched(run, every=100, num=32)


@recipe("toy_dmd2_4step")
def toy_dmd2_4step() -> Run:
    """Four-step DMD2 against the toy teacher, from the student of toy_kd_4step."""
    return _dmd2("toy_dmd2_4step", 4, "toy_kd_4step")


@recipe("toy_dmd2_1step")
def toy_dmd2_1step() -> Run:
    """One-step DMD2 against the toy teacher, from the student of toy_kd_1step."""
    return _dmd2("toy_dmd2_1step", 1, "toy_kd_1step")


def _dmd2_lora(name: str, num_steps: int) -> Run:
    """Starts from the teacher: the adapters lie over its weights, and a KD student would have to be extracted into adapters."""
    run, adapters = _dmd2(name, num_steps, ""), Lora(rank=32)
    assert run.critic_optim is not None
    return replace(
        run,
        job=_job(name),
        networks=replace(run.networks, student=adapters, critic=adapters),
        optim=replace(run.optim, lr=LORA_LR * run.optim.lr),
        critic_optim=replace(run.critic_optim, lr=LORA_LR * run.critic_optim.lr),
    )


@recipe("toy_dmd2_4step_lora")
def toy_dmd2_4step_lora() -> Run:
    """Four-step DMD2 with student and critic as adapters on the toy teacher, and from it (benchmarks/lora_roles.py)."""
    return _dmd2_lora("toy_dmd2_4step_lora", 4)


@recipe("toy_dmd2_1step_lora")
def toy_dmd2_1step_lora() -> Run:
    """The same for one step."""
    return _dmd2_lora("toy_dmd2_1step_lora", 1)


# --- consistency models and flow maps ---------------------------------------------------------------------------------
# rCM and sCM begin with the student of toy_kd_4step, a consistency function at four times of the teacher's ODE already, so that
# the tangent counts in full from the first iteration: a warm-up would pull the student back to the teacher.

TRIG_TIMES = student_times(4, TrigFlow(), STUDENT_SHIFT)  # those of toy_kd_4step
TANGENT = TangentTerm(times=LogNormal(mean=0.7, std=1.6), guidance=GUIDANCE, tangent=Tangent(warmup_iters=0))


@recipe("toy_scm")
def toy_scm() -> Run:
    """sCM against the toy teacher in four steps, from the student of toy_kd_4step."""
    return replace(_dmd2("toy_scm", 4, "toy_kd_4step"), method=SCM(TANGENT, TRIG_TIMES), critic_optim=None)


@recipe("toy_rcm")
def toy_rcm() -> Run:
    """rCM against the toy teacher in four steps, from the student of toy_kd_4step: sCM's term, and DMD2's of toy_dmd2_4step."""
    run = _dmd2("toy_rcm", 4, "toy_kd_4step")
    assert isinstance(run.method, DMD2)
    dmd = replace(run.method, student=StudentSample(TRIG_TIMES), path=TrigFlow())
    return replace(run, method=RCM(replace(TANGENT, weight=0.2), dmd))


@recipe("toy_flow_map")
def toy_flow_map() -> Run:
    """A flow map of the toy teacher, from its weights: one student for any number of steps."""
    run = _dmd2("toy_flow_map", 4, "")
    velocity = AverageVelocity(times=Shifted(STUDENT_SHIFT), share_whole=0.25, guidance=GUIDANCE, derivative=Difference())
    student = Full(replace(TEACHER, pretrained=SHIPPED, end_gate=0.25))
    return replace(
        run,
        job=_job("toy_flow_map"),
        method=FlowMap(velocity, shift=STUDENT_SHIFT),
        networks=Networks(teacher=run.networks.teacher, student=student),
        optim=replace(run.optim, lr=5e-4, betas=(0.9, 0.99)),
        critic_optim=None,
        ema=Ema(beta=0.995),
        trainer=replace(run.trainer, max_iter=1200),
    )


@recipe("toy_flow_map_on_policy")
def toy_flow_map_on_policy() -> Run:
    """The second stage: DMD2's term on the flow map's own jumps, from the student of toy_flow_map."""
    run, first = _dmd2("toy_flow_map_on_policy", 4, "toy_flow_map"), toy_flow_map()
    assert isinstance(first.method, FlowMap) and isinstance(run.networks.student, Full)
    assert isinstance(first.networks.student, Full)
    # The gradient of the average velocities is some ten times that of DMD2's term here.
    matching = OnPolicy(num_jumps=(1, 2, 4, 8, 16), velocity_weight=0.1, times=Shifted(shift=1.0))
    student = replace(first.networks.student, init=run.networks.student.init)
    return replace(run, method=replace(first.method, on_policy=matching), networks=replace(run.networks, student=student))
