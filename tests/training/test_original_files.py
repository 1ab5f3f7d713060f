"""checkpoint.original: files of the original Cosmos code beside each checkpoint, which hold what the checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.config import check
from fewstep.data.mock import Mock
from fewstep.inference.model import of_run
from fewstep.methods import Finetune
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

SMALL = CosmosSpec(
    family="edm", sigma_data=0.5, use_fps=True, clean_time=None, latent_channels=2, num_heads=2, head_dim=12, num_layers=2,
    mlp_ratio=2.0, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), rope_scale=(2.0, 1.0, 1.0), learnable_positions=True,
)  # fmt: skip


def run(name: str, networks: Networks, ema: Ema) -> Run:
    return Run(
        job=Job(name=name), method=Finetune(), networks=networks, data=Mock((2, 3, 4, 4), (4, 8), num=4), ema=ema,
        optim=Optim(lr=1e-2), trainer=Trainer(max_iter=3, batch_size=2, num_threads=1), health=Health(every=None),
        checkpoint=Checkpoint(save_iter=1, keep_last=1, original=True),
    )  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*.pt")}


def test_the_files_hold_the_checkpoint_and_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    full = run("full", Networks(student=Full(SMALL, init="random")), Ema(beta=0.5))
    train(full)
    folder = full.job.folder()
    assert names(folder) == {"iter_000000003_reg_model.pt", "iter_000000003_ema_model.pt"}  # those of 1 and 2 went with them
    for part, file in (("student.weights", "reg_model"), ("student.ema", "ema_model")):
        mine = of_run(f"{folder}:{part}").network.module.state_dict()
        theirs = read(str(folder / "checkpoints" / f"iter_000000003_{file}.pt"))
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)

    adapters = run("adapters", Networks(teacher=SMALL, student=Lora(rank=2)), Ema(beta=0.5))
    train(adapters)
    folder = adapters.job.folder()
    assert names(folder) == {"iter_000000003_model.pt"}
    file: Any = folder / "checkpoints" / "iter_000000003_model.pt"
    for part, place in (("student.weights", f"{file}:model"), ("student.ema", str(file))):
        mine, theirs = of_run(f"{folder}:{part}").network.module.state_dict(), read(place)
        assert all(torch.equal(theirs[name], mine[name]) for name in mine)  # merged: base and adapters in one

    alone = run("alone", Networks(student=Full(SMALL, init="random")), Ema(profile="none"))
    train(alone)
    assert names(alone.job.folder()) == {"iter_000000003_reg_model.pt"}


def test_another_network_is_refused_before_anything_is_built() -> None:
    tiny = run("tiny", Networks(student=Full(TinySpec("dit", channels=2), init="random")), Ema())
    with pytest.raises(ValueError, match=r"checkpoint\.original: is for networks of Cosmos"):
        check(tiny)
    check(replace(tiny, checkpoint=Checkpoint()))
