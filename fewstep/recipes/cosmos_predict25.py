"""Recipes of Cosmos-Predict2.5 and Transfer2.5: DMD2 in TrigFlow into four steps, under the published names and settings.

    dmd2_trigflow_distill_cosmos_predict2_{2B|14B}_bidirectional_TnI2V[_w_discriminator]
    dmd2_trigflow_distill_cosmos_transfer2p5_2B_bidirectional_{edge|vis|depth|seg}

720p, 93 frames: latents of 24 x 88 x 160 (`fewstep prepare latents`), texts are the outputs of Qwen2.5-VL's 28 layers
(`fewstep prepare text --text reason1`). The learning rate rises to 0.99 of its nominal value in 100 iterations and then falls
towards 0.4 over 400,000; the run ends long before. The published code reads the unconditional prompt from a file; here it is
zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fewstep.config import recipe
from fewstep.data.controls import Control, Depth, Edge, Seg, Vis
from fewstep.data.folder.dataset import Folder
from fewstep.methods import Gan, predict25
from fewstep.networks.families.cosmos.models import transfer2_5_2b
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT2_5_2B, PREDICT2_5_14B
from fewstep.networks.heads import QuerySpec
from fewstep.networks.roles import Networks
from fewstep.recipes.watched import watched
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

CONTROLS: Mapping[str, Control] = {"edge": Edge(), "vis": Vis(), "depth": Depth(), "seg": Seg()}
METHOD = replace(predict25(), first_frames=(0.6, 0.2, 0.2))  # its guidance 3; every 5th turn is the student's
GAN = Gan(weight=1.0, features="critic", form="bce", real_noise="same")


def _run(name: str, teacher: CosmosSpec, weights: str, critic_lr: float = 2e-7, control: Control | None = None) -> Run:
    run = Run(
        job=Job(project="cosmos_predict2_distill", group="predict2_distill", name=name),
        method=METHOD,
        networks=Networks(teacher=teacher, teacher_init=weights),
        data=Folder("datasets/dmd2", x0="latents", text="reason1", negative="zeros", control=control),
        optim=_optim(1e-6),
        critic_optim=_optim(critic_lr),
        ema=Ema(profile="power", width=0.1),
        trainer=Trainer(max_iter=30_000, batch_size=1, precision="bf16", checkpointing=True, log_every=10),
        checkpoint=Checkpoint(save_iter=500),
        parallel=Parallel(mode="fsdp"),
    )
    return watched(run)


def _optim(lr: float) -> Optim:
    """lr times 0.99 after the warm-up and 0.946 at iteration 30,000, on a line to 0.4 at iteration 400,000."""
    return Optim(lr=0.99 * lr, clip=1.0, schedule="linear", warmup_iters=100, end_factor=0.9555)


def predict_2b() -> Run:
    name = "dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V"
    return _run(name, PREDICT2_5_2B, "checkpoints/nvidia/Cosmos-Predict2.5-2B/model.pt")


def predict_14b() -> Run:
    name = "dmd2_trigflow_distill_cosmos_predict2_14B_bidirectional_TnI2V"
    return _run(name, PREDICT2_5_14B, "checkpoints/nvidia/Cosmos-Predict2.5-14B/model.pt", critic_lr=1e-7)


def predict_2b_with_head() -> Run:
    run = predict_2b()
    return replace(
        run,
        job=replace(run.job, name=f"{run.job.name}_w_discriminator"),
        method=replace(METHOD, first_frames=(0.5, 0.3, 0.2), gan=GAN),
        networks=replace(run.networks, head=QuerySpec(taps=(11, 19, 27), channels=2048)),
        head_optim=_optim(2e-7),
    )


def transfer_2b(control: str) -> Run:
    name = f"dmd2_trigflow_distill_cosmos_transfer2p5_2B_bidirectional_{control}"
    weights = f"checkpoints/nvidia/Cosmos-Transfer2.5-2B/{control}.pt"
    return _run(name, transfer2_5_2b(control), weights, control=CONTROLS[control])


def _register(make: Callable[[], Run], about: str) -> None:
    def build() -> Run:
        return make()

    build.__doc__ = about
    recipe(make().job.name)(build)


_register(predict_2b, "DMD2 of Cosmos-Predict2.5 2B into four steps: text, image and video to world.")
_register(predict_2b_with_head, "The same with a discriminator on the critic's features.")
_register(predict_14b, "DMD2 of Cosmos-Predict2.5 14B into four steps: 32 GPUs of 140 GB; of 80 GB with networks.critic=lora.")
for _control in CONTROLS:
    _register(partial(transfer_2b, _control), f"DMD2 of Cosmos-Transfer2.5 2B ({_control}) into four steps.")
