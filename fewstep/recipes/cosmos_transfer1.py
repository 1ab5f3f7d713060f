"""Recipes of Cosmos-Transfer1 7B under their published names and with the published settings.

    DISTILL_CTRL_7Bv1_{type}_fsdp_{kd|dmd2}_train                                   distillation into one step
    DISTILL_CTRL_7Bv1_all_fsdp_{kd|dmd2}_train                                      one student for the five types (ours)
    CTRL_7Bv1pt3_lvg_tp_121frames_control_input_{type}_block3_{pretrain|posttrain}  a control branch for the frozen base

704 x 1280, 121 frames, as latents (`fewstep prepare latents --scale 0.5`). The batch of 64 is 8 processes with 8
micro-batches each: with another number of processes set trainer.grad_accum. The student of all types has a branch for each, and
every iteration is of one type; its pairs are in datasets/kd/{type}. DMD2 starts from KD with
networks.student.init=RUN. Pre-training needs its base as a folder: `fewstep convert .../base_model.pt .../base_model`. The
optimiser is as published; there is no warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fewstep.config import recipe
from fewstep.data.controls import Control, Depth, Edge, Keypoint, Seg, Vis
from fewstep.data.folder.dataset import Folder
from fewstep.data.mix import by_control
from fewstep.diffusion.times import LogNormal
from fewstep.methods import KD, Finetune, transfer1
from fewstep.networks.families.cosmos.models import transfer1_7b
from fewstep.networks.heads import Conv3dSpec
from fewstep.networks.roles import Full, Networks
from fewstep.recipes.watched import watched
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

CONTROLS: Mapping[str, Control] = {"edge": Edge(), "vis": Vis(), "depth": Depth(), "seg": Seg(), "keypoint": Keypoint()}
FIRST_FRAMES = (1 / 3, 1 / 3, 1 / 3)  # first_random_n: 0, 1 or 2 latent frames, each as likely
FRAME_NOISE = LogNormal(mean=-3.0, std=2.0)  # sigma of the noise on given frames while a branch is trained
BLOCK = 64  # samples in a row of one control: the batch
FILES = "checkpoints/nvidia/Cosmos-Transfer1-7B"  # where their download, and `fewstep convert --ctrl_type`, put them


@recipe("dmd2_cosmos_transfer1_7b_edge")
def dmd2_cosmos_transfer1_7b_edge() -> Run:
    """DMD2 of Cosmos-Transfer1 7B (edge) into one step: 704 x 1280, 121 frames. Set networks.teacher_init=ADDRESS."""
    run = Run(
        job=Job(project="cosmos_transfer1", group="dmd2", name="dmd2_cosmos_transfer1_7b_edge"),
        method=transfer1(),
        networks=Networks(teacher=transfer1_7b("edge"), head=Conv3dSpec(taps=(14,), channels=4096)),
        data=Folder("datasets/dmd2", x0="latents", control=Edge(), negative="zeros"),
        optim=Optim(lr=5e-7, weight_decay=0.01),
        trainer=Trainer(max_iter=24_000, batch_size=1, grad_accum=8, precision="bf16", checkpointing=True),  # 64 on 8 GPUs
        parallel=Parallel(mode="fsdp"),
    )
    return watched(run)


def _distilled(controls: tuple[str, ...], stage: str) -> Job:
    name = f"DISTILL_CTRL_7Bv1_{controls[0] if len(controls) == 1 else 'all'}_fsdp_{stage}_train"
    return Job(project="cosmos_transfer1_distill", group="DISTILL_CTRL_7Bv1", name=name)


def _kd(*controls: str) -> Run:
    files = "+".join([f"{FILES}/base_model.pt", *(f"{name}={FILES}/{name}_control.pt" for name in controls)])
    run = Run(
        job=_distilled(controls, "kd"),
        method=KD(student_sample_steps=1, t_list=(80.0,), first_frames=FIRST_FRAMES),
        networks=Networks(
            teacher=transfer1_7b(*controls),
            teacher_init=f"{FILES}/checkpoints_teacher/{controls[0]}_control.pt" if len(controls) == 1 else files,
        ),
        data=by_control(Folder("datasets/kd", x0="latents", pairs=("noise",)), [CONTROLS[name] for name in controls], BLOCK),
        optim=Optim(lr=1e-5, weight_decay=0.01, clip=10.0),
        ema=Ema(profile="none"),
        trainer=Trainer(max_iter=10_000, batch_size=1, grad_accum=8, precision="bf16", checkpointing=True),
        checkpoint=Checkpoint(save_iter=500),
        parallel=Parallel(mode="fsdp"),
    )
    return watched(run)


def _dmd2(*controls: str) -> Run:
    run = _kd(*controls)
    distilled = replace(
        run,
        job=_distilled(controls, "dmd2"),
        method=replace(transfer1(), first_frames=FIRST_FRAMES),  # its guidance 5, GAN 1e-3; every 5th turn is the student's
        networks=replace(run.networks, head=Conv3dSpec(taps=(14,), channels=4096)),
        data=by_control(Folder("datasets/dmd2", x0="latents", negative="zeros"), [CONTROLS[name] for name in controls], BLOCK),
        optim=Optim(lr=5e-7, weight_decay=0.01, clip=10.0),  # of all three roles
        trainer=replace(run.trainer, max_iter=24_000),
    )
    return watched(distilled)


def _branch(control: str, stage: str) -> Run:
    network = replace(transfer1_7b(control), train="control")
    if stage == "pretrain":  # a fresh branch is a copy of its base, which must therefore be there when it is made
        student = Full(replace(network, pretrained=f"{FILES}/base_model"), init="random")
    else:
        student = Full(network, init=f"{FILES}/base_model.pt+{FILES}/{control}_control.pt")
    name = f"CTRL_7Bv1pt3_lvg_tp_121frames_control_input_{control}_block3_{stage}"
    times = LogNormal(mean=0.0, std=1.0, scale=4.0)  # sqrt(16 latent frames)
    return Run(
        job=Job(project=f"cosmos_transfer1_{stage}", group="CTRL_7Bv1_lvg", name=name),
        method=Finetune(
            space="x0", weighting="edm", sigma_data=0.5, times=times, first_frames=FIRST_FRAMES, frame_noise=FRAME_NOISE
        ),
        networks=Networks(student=student),
        data=Folder("datasets/dmd2", x0="latents", control=CONTROLS[control]),
        optim=Optim(lr=2**-14.3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-10),
        trainer=Trainer(max_iter=999_999_999, batch_size=1, precision="bf16", checkpointing=True, log_every=200),
        checkpoint=Checkpoint(save_iter=1000),
        parallel=Parallel(mode="fsdp"),
    )


def _register(make: Callable[[], Run], about: str) -> None:
    def build() -> Run:
        return make()

    build.__doc__ = about
    recipe(make().job.name)(build)


_register(partial(_kd, *CONTROLS), "KD of Cosmos-Transfer1 7B into one student of one step for all five controls.")
_register(partial(_dmd2, *CONTROLS), "DMD2 of Cosmos-Transfer1 7B into one student of one step for all five controls.")
for _control in CONTROLS:
    _register(partial(_kd, _control), f"KD of Cosmos-Transfer1 7B ({_control}) into one step, on 10,000 pairs of its own.")
    _register(partial(_dmd2, _control), f"DMD2 of Cosmos-Transfer1 7B ({_control}) into one step, from its teacher.")
    _register(partial(_branch, _control, "pretrain"), f"A fresh {_control} branch for the frozen base of Cosmos-Transfer1 7B.")
    _register(partial(_branch, _control, "posttrain"), f"The published {_control} branch of Cosmos-Transfer1 7B, trained on.")
