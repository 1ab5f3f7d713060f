"""Recipes of Cosmos-Predict1 7B Video2World post-training, all weights or adapters, under the published names and settings.

Clips of 121 frames as latents: `fewstep prepare latents DIR --scale 0.5 --num-frames 121 --height 720 --width 1280` (480 x 848
for adapters). The network receives 0, 1 or 2 latent frames with noise of sigma exp(N(-3, 2)), and a fifth of the samples
without text.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.config import recipe
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion.times import LogNormal
from fewstep.methods import Finetune
from fewstep.networks.families.cosmos.predict import PREDICT1_7B
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

WEIGHTS = "checkpoints/Cosmos-Predict1-7B-Video2World/model.pt"
TIMES = LogNormal(mean=0.0, std=1.0, scale=4.0)  # sqrt(16 latent frames)


@recipe("video2world_7b_example_cosmos_nemo_assets")
def video2world_7b_example_cosmos_nemo_assets() -> Run:
    """Post-training of Cosmos-Predict1 7B Video2World: all weights, 8 GPUs."""
    return Run(
        job=Job("posttraining", "diffusion_video2world", "video2world_7b_example_cosmos_nemo_assets"),
        method=Finetune(
            space="x0",
            weighting="edm",
            sigma_data=0.5,
            reduction="mean_all",  # given frames count as exact
            times=TIMES,
            first_frames=(1 / 3, 1 / 3, 1 / 3),
            frame_noise=LogNormal(mean=-3.0, std=2.0),
            drop_condition=0.2,  # text dropout of Cosmos 1
        ),
        networks=Networks(student=Full(PREDICT1_7B, init=WEIGHTS)),
        data=Folder("datasets/cosmos_nemo_assets", x0="latents", negative="zeros"),
        # The original warms up to 2^-14.3 in 2500 iterations and ends after 2000: this is the same line up to its end.
        optim=Optim(lr=0.8 * 2**-14.3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-10, warmup_iters=2000),
        trainer=Trainer(max_iter=2000, batch_size=1, precision="bf16", checkpointing=True, log_every=200),
        checkpoint=Checkpoint(save_iter=200, original=True),
        parallel=Parallel(mode="fsdp"),
    )


@recipe("video2world_7b_lora_example_cosmos_nemo_assets")
def video2world_7b_lora_example_cosmos_nemo_assets() -> Run:
    """The same with adapters of rank 8 on queries and values, 4 GPUs."""
    run = video2world_7b_example_cosmos_nemo_assets()
    return replace(
        run,
        job=replace(run.job, name="video2world_7b_lora_example_cosmos_nemo_assets"),
        networks=Networks(
            teacher=PREDICT1_7B, teacher_init=WEIGHTS, student=Lora(rank=8, targets=("to_q", "to_v"), down="normal")
        ),
        optim=replace(run.optim, lr=1e-4, warmup_iters=0),
        trainer=replace(run.trainer, max_iter=5000),
        checkpoint=Checkpoint(save_iter=1000, original=True),
        parallel=Parallel(mode="ddp"),
    )
