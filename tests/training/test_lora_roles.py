"""Adapters over one frozen network learn what whole networks learn, with every method and no change in any."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.batch import Condition
from fewstep.diffusion import Rng, TeacherSampler
from fewstep.diffusion.times import Shifted
from fewstep.evaluation import energy_distance
from fewstep.inference.synthetic import MixtureSamples, TeacherPairs
from fewstep.methods import DMD2, KD, Finetune, StudentSample
from fewstep.networks.lora import Lora, merged
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.recipes.analytic import MIXTURE
from fewstep.training.ema import Ema
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.preview import PointsPreview
from fewstep.training.run import Checkpoint, Job, Run, Trainer

TINY = TinySpec(width=48, depth=3)
BASE = "lora/default/base@latest:student.ema"
SCORE = PointsPreview(reference=MixtureSamples(MIXTURE, num=4096, seed=77))


def run(name: str, method: Any, networks: Networks, data: Any, iters: int, lr: float, **changes: Any) -> Run:
    return Run(
        job=Job("lora", name=name),
        method=method,
        networks=networks,
        data=data,
        optim=Optim(lr=lr, schedule="cosine", warmup_iters=10, betas=(0.9, 0.99)),
        critic_optim=Optim(lr=2 * lr, betas=(0.0, 0.99)),
        ema=Ema(beta=0.97),
        trainer=Trainer(max_iter=iters, batch_size=256, num_threads=1),
        checkpoint=Checkpoint(save_iter=iters),
        preview=SCORE,
        **changes,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An output root with a many-step model of the mixture, the base of all roles here."""
    folder, before = tmp_path_factory.mktemp("lora"), os.environ.get("OUTPUT_ROOT")
    os.environ["OUTPUT_ROOT"] = str(folder)
    base = run(
        "base", Finetune(num_sample_steps=16), Networks(student=Full(TINY, "random")), MixtureSamples(MIXTURE), 300, 3e-3
    )
    assert train(replace(base, critic_optim=None))["energy_distance"] < 0.01
    yield folder
    if before is None:
        del os.environ["OUTPUT_ROOT"]
    else:
        os.environ["OUTPUT_ROOT"] = before


def networks(**roles: Any) -> Networks:
    return Networks(TINY, teacher_init=BASE, **roles)


def test_kd_learns_and_saves_adapters_only(root: Path) -> None:
    data = TeacherPairs(MIXTURE, num=8192, sampler=TeacherSampler("heun", 16, shift=1.0))
    told = train(replace(run("kd", KD(), networks(student=Lora(rank=8)), data, 250, 4e-3), critic_optim=None))
    assert told["energy_distance_undistilled"] > 0.5 and told["energy_distance"] < 0.005
    average = read("lora/default/kd@latest:student.ema")
    assert average and all(".lora_" in name for name in average)
    base = read(BASE)
    plain = TINY.build()
    plain.module.load_state_dict(merged(base, average))
    rng, sampler = Rng(5, rows=range(2048)), KD().sampler(plain.path)
    made = sampler(plain, rng.normal((2,)), Condition(), rng)
    reference = MixtureSamples(MIXTURE, num=2048, seed=78).open().batch(torch.arange(2048)).x0
    assert reference is not None
    assert energy_distance(made, reference) < 0.008  # what is merged is what was scored


def test_dmd2_learns_with_student_and_critic_on_the_teacher_s_backbone(root: Path) -> None:
    method = DMD2(student=StudentSample((1.0, 0.7)), times=Shifted(shift=2.0), student_update_freq=2)
    roles = networks(student=Lora(rank=8), critic=Lora(rank=8))
    told = train(run("dmd2", method, roles, MixtureSamples(MIXTURE), 400, 2e-3))
    assert told["energy_distance_undistilled"] > 0.2
    assert told["energy_distance"] < 0.05


@pytest.mark.slow
def test_dmd2_learns_as_well_from_a_rounded_teacher(root: Path) -> None:
    """Adapters on a rounded backbone, and whole roles beside a rounded teacher."""
    method = DMD2(student=StudentSample((1.0, 0.7)), times=Shifted(shift=2.0), student_update_freq=2)
    for roles, rate in ((networks(student=Lora(rank=8), critic=Lora(rank=8)), 2e-3), (networks(), 1e-3)):
        distances: dict[str, float] = {}
        for frozen in ("compute", "8bit", "float8"):
            plain = run(f"{frozen}_{rate}", method, roles, MixtureSamples(MIXTURE), 400, rate)
            result = train(replace(plain, trainer=replace(plain.trainer, frozen=frozen)))
            distances[frozen] = result["energy_distance"]
            assert result["energy_distance_undistilled"] > 0.2
        print({name: round(value, 4) for name, value in distances.items()})
        assert max(distances.values()) < 1.5 * distances["compute"] + 0.005


def test_finetune_learns_other_data(root: Path) -> None:
    """Post-training: the base knows the mixture, the adapters move it to one component's data."""
    other = replace(MIXTURE, weights=(1.0, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6))
    method, roles = Finetune(num_sample_steps=16), networks(student=Lora(rank=8))
    told = train(
        replace(
            run("finetune", method, roles, MixtureSamples(other), 200, 4e-3),
            critic_optim=None,
            preview=PointsPreview(reference=MixtureSamples(other, num=4096, seed=77)),
        )
    )
    assert told["energy_distance_undistilled"] > 1.0 and told["energy_distance"] < 0.05


def test_a_run_with_adapters_resumes_with_the_same_bits(root: Path) -> None:
    method = DMD2(student=StudentSample((1.0,)), student_update_freq=2)
    roles = networks(student=Lora(rank=2), critic=Lora(rank=2, train=("enter",)))
    whole = replace(run("whole", method, roles, MixtureSamples(MIXTURE), 6, 1e-3), preview=None)
    whole = replace(whole, checkpoint=Checkpoint(save_iter=3), optim=Optim(lr=1e-3))
    train(whole)
    part = replace(whole, job=Job("lora", name="part"), trainer=replace(whole.trainer, max_iter=3))
    train(part)
    train(replace(part, trainer=whole.trainer))
    for role in ("student", "student.ema", "critic"):
        want, got = read(f"lora/default/whole@6:{role}"), read(f"lora/default/part@6:{role}")
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
