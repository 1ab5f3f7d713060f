"""Recipes of the Cosmos families, with the settings that were published for them."""

from __future__ import annotations

from fewstep.config import recipe
from fewstep.data.controls import Edge
from fewstep.data.folder import Folder
from fewstep.methods.dmd2_dialects import Transfer1
from fewstep.networks.cosmos_models import transfer1_7b
from fewstep.networks.heads import Conv3dSpec
from fewstep.networks.roles import Networks
from fewstep.training.optim import Optim
from fewstep.training.run import Job, Parallel, Run, Trainer


@recipe("dmd2_cosmos_transfer1_7b_edge")
def dmd2_cosmos_transfer1_7b_edge() -> Run:
    """DMD2 of Cosmos-Transfer1 7B (edge) into one step: 704 x 1280, 121 frames. Its weights: networks.teacher_init=ADDRESS."""
    return Run(
        job=Job(project="cosmos_transfer1", group="dmd2", name="dmd2_cosmos_transfer1_7b_edge"),
        method=Transfer1(),
        networks=Networks(teacher=transfer1_7b("edge"), head=Conv3dSpec(taps=(14,), channels=4096)),
        data=Folder("datasets/dmd2", x0="latents", control=Edge(), negative="zeros"),
        optim=Optim(lr=5e-7, weight_decay=0.01),
        trainer=Trainer(max_iter=24_000, batch_size=1, grad_accum=8, precision="bf16", checkpointing=True),  # 64 on 8 GPUs
        parallel=Parallel(mode="fsdp"),
    )
