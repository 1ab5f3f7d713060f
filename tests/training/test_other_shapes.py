"""A run that begins with the weights of a run on latents of another shape says so: KD and DMD2 on unlike clips train, too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.batch import Batch
from fewstep.config import build_recipe
from fewstep.diffusion import RectifiedFlow, StudentSampler
from fewstep.inference.card import Envelope, StudentCard
from fewstep.training.run_folder import other_shapes


def test_a_start_from_a_run_on_other_shapes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    folder = tmp_path / "kd"
    (folder / "checkpoints" / "iter_000000001").mkdir(parents=True)
    (folder / "checkpoints" / "iter_000000001" / ".metadata").touch()
    (folder / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000001")
    StudentCard(
        network={"kind": "tiny"}, sampler=StudentSampler((1.0,), RectifiedFlow()), envelope=Envelope((8, 9, 4, 4))
    ).write(folder)
    run = build_recipe("toy_kd_1step")
    student = replace(run.networks.student, init=f"{folder}:student")
    run = replace(run, networks=replace(run.networks, student=student, teacher_init="teacher.pt"))
    (warning,) = other_shapes(run, Batch(x0=torch.zeros(2, 8, 5, 4, 4)))
    assert warning.startswith(f"networks.student.init: {folder}:student was trained on latents of (8, 9, 4, 4), and these data")
    assert other_shapes(run, Batch(x0=torch.zeros(2, 8, 9, 4, 4))) == []
    card = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(card | {"envelope": {}}))
    assert other_shapes(run, Batch(x0=torch.zeros(2, 8, 5, 4, 4))) == []
