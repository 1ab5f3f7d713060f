"""Learning rates against their formulas, and against what the weights did."""

import json
import math
from pathlib import Path

import pytest
import torch

from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import DMD2, StudentSample
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training.loop import train
from fewstep.training.optim import AdamW, Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer


def test_constant() -> None:
    assert [Optim(lr=2e-3).lr_at(i, 10) for i in range(10)] == [2e-3] * 10


def test_warm_up_is_linear_and_reaches_the_rate() -> None:
    optim = Optim(lr=1.0, warmup_iters=4)
    assert [optim.lr_at(i, 100) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=50, eta_min=0.3 * 0.1)
    ours = Optim(lr=0.3, schedule="cosine", end_factor=0.1)
    for i in range(50):
        assert ours.lr_at(i, 50) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        theirs.step()


def test_linear_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1.0, end_factor=0.2, total_iters=50)
    ours = Optim(lr=0.3, schedule="linear", end_factor=0.2)
    for i in range(50):
        assert ours.lr_at(i, 50) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        theirs.step()


def test_after_a_warm_up_the_schedule_runs_over_what_is_left() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup_iters=20)
    assert optim.lr_at(20, 100) == 1.0
    assert optim.lr_at(60, 100) == pytest.approx(0.5)
    assert optim.lr_at(99, 100) == pytest.approx((1 + math.cos(math.pi * 79 / 80)) / 2)


def test_the_weights_move_by_the_rate_that_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With beta1 = beta2 = 0 and no decay Adam moves every weight by lr g / (|g| + eps): the rate is read off the weights."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    mixture = MixtureSpec(means=((1.0, 0.0),), stds=(0.3,))
    tiny = Full(TinySpec(width=8, depth=1), init="random")
    student = Optim(lr=1e-2, betas=(0.0, 0.0), weight_decay=0.0, eps=1e-20, clip=None, schedule="cosine", warmup_iters=3)
    critic = Optim(lr=4e-3, betas=(0.0, 0.0), weight_decay=0.0, eps=1e-20, clip=None, schedule="linear")
    run = Run(
        job=Job(name="rates"),
        method=DMD2(student=StudentSample((1.0,)), student_update_freq=2),
        networks=Networks(mixture, tiny, tiny),
        data=MixtureSamples(mixture, num=64),
        optim=student,
        critic_optim=critic,
        trainer=Trainer(max_iter=8, batch_size=4, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=1, keep_last=99),
    )
    train(run)
    lines = [json.loads(line) for line in (run.job.folder() / "metrics.jsonl").read_text().splitlines()]
    for step in range(1, 8):
        role, optim, other = ("critic", critic, "student") if step % 2 else ("student", student, "critic")
        want = optim.lr_at(step, 8)  # iteration number `step` makes checkpoint step + 1
        assert lines[step][f"lr/{role}"] == pytest.approx(want, rel=1e-6)
        before, after = (read(f"fewstep/default/rates@{s}:{role}") for s in (step, step + 1))
        moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in before])
        assert float(moved[moved > 0].median()) == pytest.approx(want, rel=1e-3)
        still = [read(f"fewstep/default/rates@{s}:{other}") for s in (step, step + 1)]
        assert all(torch.equal(still[0][n], still[1][n]) for n in still[0])


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_bit_for_bit_that_of_torchs_adamw(fused: bool) -> None:
    optim = Optim(lr=1e-2, betas=(0.5, 0.99), weight_decay=0.1, eps=1e-6)
    weights = [[torch.nn.Parameter(w) for w in torch.randn(2, 7, generator=torch.Generator().manual_seed(0))] for _ in "ab"]
    unused = torch.nn.Parameter(torch.ones(3))
    ours = optim.build([*weights[0], unused])
    assert isinstance(ours, AdamW)
    ours.defaults["fused"] = fused
    theirs = torch.optim.AdamW(weights[1], lr=torch.tensor(1e-2), betas=(0.5, 0.99), weight_decay=0.1, eps=1e-6, fused=fused)
    for step in range(4):
        for own, other in zip(*weights, strict=True):
            own.grad = other.grad = torch.sin(own.detach() * (step + 1))
        ours.step()
        theirs.step()
    assert all(torch.equal(own, other) for own, other in zip(*weights, strict=True))
    assert torch.equal(unused, torch.ones(3)) and not ours.state[unused]
