"""FastGen's configurations of knowledge distillation under their names: the published numbers, and a step of each toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.config import build_recipe, check
from fewstep.config.command import compose, read_command
from fewstep.inference.model import open_model
from fewstep.methods import KD
from fewstep.networks.roles import build
from fewstep.training.loop import train
from fewstep.training.run import Run

# name: lr, batch of one GPU, iterations, iterations between checkpoints, precision, steps (configs/experiments/*/config_kd*.py)
PUBLISHED = {
    "WanT2V_kd": (7e-5, 2, 6000, 1000, "bf16", 1),
    "WanT2V_kd_path": (7e-5, 2, 10_000, 5000, "bf16", 4),
    "SDXL_kd": (1e-5, 16, 6000, 1000, "fp32", 1),
    "CogVideoX_kd": (1e-4, 2, 6000, 500, "bf16", 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers(name: str) -> None:
    run: Run = build_recipe(name)
    check(run)
    assert isinstance(run.method, KD)
    found = (run.optim.lr, run.trainer.batch_size, run.trainer.max_iter, run.checkpoint.save_iter, run.trainer.precision)
    assert (*found, run.method.student_sample_steps) == PUBLISHED[name]
    assert (run.optim.betas, run.optim.weight_decay, run.optim.clip, run.optim.warmup_iters) == ((0.9, 0.999), 0.01, 10.0, 0)
    assert run.ema.profile == "none" and run.method.reduction == "half_mean" and run.method.renoise == "fresh"
    network: Any = run.networks.teacher
    times = run.method.times_on(network.path)
    published = {1: [1.0], 4: [0.999, 0.937, 0.833, 0.624]}[run.method.student_sample_steps]
    assert list(times) == pytest.approx(published, abs=1.001e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_toy_takes_a_real_step_by_the_same_method(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    run = compose(read_command([f"experiment={name}_toy", "trainer.max_iter=1", "trainer.log_every=1"]), Run)
    assert run.method == build_recipe(name).method
    before = build(run.networks, ("teacher",), run.trainer.seed)["teacher"].module.state_dict()
    train(run)
    after = open_model(str(run.job.folder())).network.module.state_dict()
    moved = [float((after[key] - before[key]).abs().max()) for key in before if before[key].is_floating_point()]
    assert 0 < max(moved) < 2e-3 and all(torch.isfinite(after[key]).all() for key in after)  # one step of Adam at 1e-3
