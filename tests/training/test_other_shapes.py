"""Data that fit in shape alone are named: latents of another shape than those of the run before, of another codec or scale."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.batch import Batch
from fewstep.config import build_recipe
from fewstep.data.files.packs import Label, open_writer
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import EDM, RectifiedFlow, StudentSampler
from fewstep.inference.card import Envelope, StudentCard
from fewstep.networks.encoders.codecs import open_codec
from fewstep.training.preview_clips import ClipsPreview
from fewstep.training.run_folder import other_codec, other_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "stories"))
import materials


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


def test_latents_of_another_codec_or_scale_are_named(tmp_path: Path) -> None:
    """Codecs of Wan and Cosmos 1 have as many channels, and an EDM network wants half the scale."""
    materials.wan_codec(tmp_path / "own")
    materials.cosmos_codec(tmp_path / "other")
    codec = open_codec(tmp_path / "own")
    with open_writer(tmp_path / "data" / "latents", {"codec": codec.fingerprint}) as writer:
        writer.put(Label("a", content="03ab", facts={"fps": 24.0, "num_frames": 9}), lambda: torch.zeros(4, 3, 8, 8).half())
    data = Folder(str(tmp_path / "data"), x0="latents", text=None).open()
    for name, path, says in (
        ("own", RectifiedFlow(), ""),
        ("own", EDM(), f"prepare latents DIR --codec {tmp_path}/own --scale 0.5"),
        ("other", RectifiedFlow(), f"prepare latents DIR --codec {tmp_path}/other"),
        ("nothing", RectifiedFlow(), ""),
    ):
        run = replace(build_recipe("toy_kd_1step"), preview=ClipsPreview(codec=str(tmp_path / name)))
        network: Any = SimpleNamespace(path=path)
        assert [text.endswith(says) for text in other_codec(run, data, network)] == [True] * bool(says), (name, path)
