"""The training commands of the Cosmos documents compose under their names, with the published numbers. No network is built."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fewstep.cli import main
from fewstep.config import check, compose, originals, parse, read_command, recipes, to_yaml
from fewstep.config.text import read_yaml_mapping
from fewstep.networks import roles
from fewstep.networks.families.cosmos.models import MODELS
from fewstep.networks.lora import Lora
from fewstep.training.run import Run

PREDICT25 = "--config=cosmos_predict2/_src/predict2/distill/configs/registry_predict2p5.py --"
CTRL = "--config=cosmos_transfer1/diffusion/config/config_train.py --"
DMD2 = "--config=cosmos_transfer1/distillation/config/config_ctrl_dmd2.py --"
PREDICT1 = "--config=cosmos_predict1/diffusion/training/config/config.py --"
EDGE = "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3"
# What follows `train` in the documents, word by word; and the folder below the output root.
COMMANDS = {
    f"{PREDICT25} experiment=dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V": (
        "cosmos_predict2_distill/predict2_distill/dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V"
    ),
    f"--dryrun {CTRL} experiment={EDGE}_pretrain": f"cosmos_transfer1_pretrain/CTRL_7Bv1_lvg/{EDGE}_pretrain",
    f"--dryrun {CTRL} experiment={EDGE}_posttrain": f"cosmos_transfer1_posttrain/CTRL_7Bv1_lvg/{EDGE}_posttrain",
    f"{CTRL} experiment={EDGE}_pretrain trainer.max_iter=100 checkpoint.save_iter=40": (
        f"cosmos_transfer1_pretrain/CTRL_7Bv1_lvg/{EDGE}_pretrain"
    ),
    f"{CTRL} experiment={EDGE.replace('edge', 'depth')}_posttrain": (
        f"cosmos_transfer1_posttrain/CTRL_7Bv1_lvg/{EDGE.replace('edge', 'depth')}_posttrain"
    ),
    f"{DMD2} experiment=DISTILL_CTRL_7Bv1_edge_fsdp_dmd2_train job.name=checkpoint_conversion checkpoint.load_path=p": (
        "cosmos_transfer1_distill/DISTILL_CTRL_7Bv1/checkpoint_conversion"
    ),
    f"{DMD2.replace('dmd2', 'kd')} experiment=DISTILL_CTRL_7Bv1_edge_fsdp_kd_train": (
        "cosmos_transfer1_distill/DISTILL_CTRL_7Bv1/DISTILL_CTRL_7Bv1_edge_fsdp_kd_train"
    ),
    f"{PREDICT1} experiment=video2world_7b_example_cosmos_nemo_assets": (
        "posttraining/diffusion_video2world/video2world_7b_example_cosmos_nemo_assets"
    ),
    f"{PREDICT1} experiment=video2world_7b_lora_example_cosmos_nemo_assets": (
        "posttraining/diffusion_video2world/video2world_7b_lora_example_cosmos_nemo_assets"
    ),
}
CONTROLS = ("edge", "vis", "depth", "seg", "keypoint")
NAMES = [
    *(f"DISTILL_CTRL_7Bv1_{control}_fsdp_{stage}_train" for control in CONTROLS for stage in ("kd", "dmd2")),
    *(f"{EDGE.replace('edge', control)}_{stage}" for control in CONTROLS for stage in ("pretrain", "posttrain")),
    *(f"dmd2_trigflow_distill_cosmos_transfer2p5_2B_bidirectional_{control}" for control in CONTROLS[:4]),
    *(f"dmd2_trigflow_distill_cosmos_predict2_{size}_bidirectional_TnI2V" for size in ("2B", "14B")),
    "dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V_w_discriminator",
    "video2world_7b_example_cosmos_nemo_assets",
    "video2world_7b_lora_example_cosmos_nemo_assets",
]


@pytest.fixture(autouse=True)
def no_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise AssertionError("a network of billions of weights is not built to compose a run")

    monkeypatch.setattr(roles, "build", build)
    for spec in {type(spec) for spec in MODELS.values()}:
        monkeypatch.setattr(spec, "build", build)


def composed(words: str) -> Run:
    return compose(read_command(words.split()), Run)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_published_command_composes(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    run = composed(words)
    assert str(run.job.folder()) == f"checkpoints/{COMMANDS[words]}"
    assert len(originals(read_command(words.split()))) == 1
    if "max_iter" in words:
        assert (run.trainer.max_iter, run.checkpoint.save_iter) == (100, 40)


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_without_a_warning_and_is_the_same_when_read_back(name: str) -> None:
    run = composed(f"experiment={name}")
    assert run.job.name == name
    assert list(check(run)) == []
    assert parse(Run, read_yaml_mapping(to_yaml(run), "config.yaml")) == run
    assert recipes()[name].doc.endswith(".")


def test_transfer1s_numbers() -> None:
    """Published: KD at 1e-5 for 10,000 iterations; DMD2 at 5e-7 for 24,000, guidance 5, GAN 1e-3, 1 of 5; batch 64."""
    for control in CONTROLS:
        kd, dmd2 = (composed(f"experiment=DISTILL_CTRL_7Bv1_{control}_fsdp_{stage}_train") for stage in ("kd", "dmd2"))
        assert (kd.optim.lr, kd.trainer.max_iter, kd.optim.weight_decay, kd.optim.clip) == (1e-5, 10_000, 0.01, 10.0)
        assert (dmd2.optim.lr, dmd2.trainer.max_iter) == (5e-7, 24_000)
        assert {dmd2.optim_of(role) for role in ("student", "critic", "head")} == {dmd2.optim}
        method: Any = dmd2.method
        assert (method.guidance - 1, method.gan.weight, method.student_update_freq) == (5.0, 1e-3, 5)  # Cosmos' g is w - 1
        assert method.student.t_list == (80.0,) == kd.method.t_list  # type: ignore[attr-defined]
        for run in (kd, dmd2):
            assert 8 * run.trainer.batch_size * run.trainer.grad_accum == 64
            assert run.data.control.folder == control  # type: ignore[attr-defined]
            assert run.networks.teacher.controls == (control,)  # type: ignore[union-attr]
            assert run.networks.teacher_init.endswith(f"checkpoints_teacher/{control}_control.pt")  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "critic_lr"), [("2B", 2e-7), ("14B", 1e-7)])
def test_predict25s_numbers(size: str, critic_lr: float) -> None:
    """cosmos.md 2.6: learning rates, guidance 3, every fifth turn, 60/20/20 % of 0, 1, 2 frames, the rate's slow decline."""
    run = composed(f"experiment=dmd2_trigflow_distill_cosmos_predict2_{size}_bidirectional_TnI2V")
    method: Any = run.method
    assert (method.guidance - 1, method.student_update_freq, method.first_frames) == (3.0, 5, (0.6, 0.2, 0.2))
    assert method.student.t_list == (math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3))
    assert (run.trainer.max_iter, run.checkpoint.save_iter, run.ema.width) == (30_000, 500, 0.1)
    for role, lr in (("student", 1e-6), ("critic", critic_lr)):
        optim = run.optim_of(role)
        assert (optim.betas, optim.weight_decay, optim.clip) == ((0.9, 0.999), 0.01, 1.0)
        for step in (100, 1000, 15_000, 29_999):  # f_min + (f_max - f_min) (cycle - n) / cycle
            wanted = lr * (0.4 + 0.59 * (400_000 - step) / 400_000)
            assert optim.lr_at(step, run.trainer.max_iter) == pytest.approx(wanted, rel=1e-3)


def test_predict1s_numbers() -> None:
    """cosmos.md 3.2: 2^-14.3 behind a warm-up of 2500 that 2000 iterations never leave; adapters at 1e-4, rank 8, scale 1."""
    full = composed("experiment=video2world_7b_example_cosmos_nemo_assets")
    for step in (0, 999, 1999):
        assert full.optim.lr_at(step, full.trainer.max_iter) == pytest.approx(2**-14.3 * (step + 1) / 2500)
    assert (full.optim.betas, full.optim.weight_decay, full.optim.eps) == ((0.9, 0.99), 0.1, 1e-10)
    lora = composed("experiment=video2world_7b_lora_example_cosmos_nemo_assets")
    student = lora.networks.student
    assert isinstance(student, Lora)
    assert (student.rank, student.scale, student.targets, lora.optim.lr) == (8, 1.0, ("to_q", "to_v"), 1e-4)
    assert (lora.trainer.max_iter, lora.checkpoint.save_iter) == (5000, 1000)


def test_ls_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--json"]) == 0
    listed = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert listed >= set(NAMES)
