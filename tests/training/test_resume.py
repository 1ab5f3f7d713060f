"""A run that goes on: under other settings it says so and keeps the old file; a finished one does nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.cli import main
from fewstep.config import ConfigError
from fewstep.data.mock import Mock
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import DMD2, Finetune
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Job, Run, Trainer

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
STUDENT = TinySpec(width=16, depth=2)


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    return tmp_path


def run_of(name: str, last: int, lr: float = 1e-3, init: str = "random") -> Run:
    return Run(
        job=Job(name=name),
        method=Finetune(),
        networks=Networks(student=Full(STUDENT, init=init)),
        data=MixtureSamples(MIXTURE, num=100),
        optim=Optim(lr=lr),
        trainer=Trainer(max_iter=last, batch_size=8, num_threads=1, log_every=1),
    )


def test_changed_settings_are_named_and_the_old_ones_kept() -> None:
    train(run_of("first", 2))
    folder = run_of("first", 2).job.folder()
    old = (folder / "config.yaml").read_text()
    train(run_of("first", 4, lr=1e-5))
    assert (folder / "config.001.yaml").read_text() == old
    text = (folder / "log.txt").read_text()
    assert f"settings that changed, the ones before are in {folder / 'config.001.yaml'}: " in text
    assert "optim.lr: 0.001 -> 1.0e-05" in text and "trainer.max_iter: 2 -> 4" in text
    train(run_of("first", 5))
    assert (folder / "config.002.yaml").read_text() != old
    train(run_of("first", 5))  # nothing changed, nothing to keep
    assert sorted(path.name for path in folder.glob("config*")) == ["config.001.yaml", "config.002.yaml", "config.yaml"]


def test_a_finished_run_does_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("first", 3)
    summary = train(run)
    folder = run.job.folder()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr("fewstep.training.loop.build", lambda *args, **options: pytest.fail("networks are built"))
    capsys.readouterr()
    again = train(replace(run, optim=Optim(lr=7.0)))
    assert again["wall_s"] == summary["wall_s"] and again["step"] == 3
    said = capsys.readouterr().err
    assert f"{folder}: nothing to do, iteration 3 of 3." in said and "optim.lr: 0.001 -> 7.0" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


def test_a_summary_of_fewer_iterations_is_written_again() -> None:
    """A run was made longer, and ended by a fault between its last checkpoint and its summary."""
    train(run_of("first", 2))
    path = run_of("first", 2).job.folder() / "summary.json"
    of_two = path.read_text()
    whole = train(run_of("first", 3))
    path.write_text(of_two)
    again = train(run_of("first", 3))
    assert {name for name in whole if whole[name] != again[name]} <= {"wall_s", "peak_memory_gib"} and again["step"] == 3
    assert json.loads(path.read_text()) == again


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"networks": Networks(student=Full(TinySpec(width=24, depth=2), init="random"))}, "student.network.width: 16 -> 24"),
        ({"networks": Networks(MIXTURE, Full(STUDENT, init="random")), "method": DMD2()}, "method.kind: finetune -> dmd2"),
    ],
)
def test_other_networks_and_methods_are_refused_before_anything_is_built(
    change: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("first", 2)
    train(run)
    config = (run.job.folder() / "config.yaml").read_text()
    monkeypatch.setattr("fewstep.training.loop.build", lambda *args, **options: pytest.fail("networks are built"))
    with pytest.raises(ConfigError, match=said):
        train(replace(run, trainer=replace(run.trainer, max_iter=4), **change))  # pyright: ignore[reportArgumentType]  # of Run
    assert (run.job.folder() / "config.yaml").read_text() == config


def test_the_weights_that_a_run_began_with_are_not_needed_again() -> None:
    train(run_of("first", 2))
    for name in ("whole", "divided"):
        train(run_of(name, 2 if name == "divided" else 4, init="fewstep/default/first"))
    shutil.rmtree(run_of("first", 2).job.folder())
    train(run_of("divided", 4, init="fewstep/default/first"))
    whole, divided = (read(f"fewstep/default/{name}:student.ema") for name in ("whole", "divided"))
    assert whole and all(torch.equal(whole[name], divided[name]) for name in whole)


def test_the_pipeline_that_a_network_came_from_is_not_needed_again(tmp_path: Path) -> None:
    """Its weights are in the checkpoint, its configuration and its sampler in the run folder."""
    tiny = WanSpec(
        latent_channels=4, num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8, freq_dim=16, max_positions=32,
    )  # fmt: skip
    tiny.build().module.save_pretrained(tmp_path / "wan" / "transformer")  # pyright: ignore[reportCallIssue]  # of diffusers
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "wan" / "scheduler")

    def run(name: str, last: int) -> Run:
        networks = Networks(student=Full(WanSpec(pretrained=str(tmp_path / "wan"), text_dim=8), init="random"))
        data = Mock(shape=(4, 2, 4, 4), text=(3, 8), num=8)
        trainer = Trainer(max_iter=last, batch_size=2, num_threads=1)
        return Run(job=Job(name=name), method=Finetune(), networks=networks, data=data, trainer=trainer)

    train(run("whole", 4))
    train(run("divided", 2))
    (tmp_path / "wan").rename(tmp_path / "gone")
    train(run("divided", 4))
    whole, divided = (read(f"fewstep/default/{name}:student.ema") for name in ("whole", "divided"))
    assert whole and all(torch.equal(whole[name], divided[name]) for name in whole)
    cards = [(run(name, 4).job.folder() / "student.json").read_text() for name in ("whole", "divided")]
    assert cards[0] == cards[1] and '"shift": 3.0' in cards[0]


def test_a_dry_run_leaves_the_settings_of_a_run_that_has_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.training.plan.gpu_fit.dryrun", lambda run: "")
    words = ["experiment=analytic_finetune", "trainer.batch_size=8", "preview=none", "optim.warmup_iters=0"]
    assert main(["train", *words, "trainer.max_iter=1"]) == 0
    path = Path(capsys.readouterr().err.split("done: ")[1].split("/summary.json")[0]) / "config.yaml"
    old = path.read_text()
    assert main(["train", "--dryrun", *words, "trainer.max_iter=5"]) == 0
    assert path.read_text() == old and "trainer.max_iter: 1 -> 5" in capsys.readouterr().err
