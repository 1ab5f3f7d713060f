"""The toy world, from pixels to a teacher: the recipes that made the weights shipped in fewstep/toy/.

    fewstep prepare toyworld --out datasets/toyworld/train --num 24000 --seed 11 --only videos,metas,edge
    fewstep train experiment=toy_tokenizer
"""

from __future__ import annotations

from fewstep.config import recipe
from fewstep.data.folder import Folder
from fewstep.methods import Autoencode
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tokenizer import TokenizerSpec
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

TRAIN = "datasets/toyworld/train"


def _job(name: str, *after: str) -> Job:
    return Job(project="toyworld", group="basic", name=name, after=after)


@recipe("toy_tokenizer")
def toy_tokenizer() -> Run:
    """The toy world's video tokenizer: 17 x 32 x 32 pixels to 5 x 4 x 4 latents of 16 channels."""
    return Run(
        job=_job("toy_tokenizer"),
        method=Autoencode(),
        networks=Networks(student=Full(TokenizerSpec(), init="random")),
        data=Folder(TRAIN, text=None),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, schedule="cosine", warmup_iters=200, clip=1.0),
        ema=Ema(beta=0.999),
        trainer=Trainer(max_iter=8000, batch_size=4, num_threads=1, log_every=100),
        checkpoint=Checkpoint(save_iter=500),
        health=Health(every=None),
    )
