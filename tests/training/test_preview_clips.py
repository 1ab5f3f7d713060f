"""Previews of video while a run trains: the same prompts and noises each time, beside the truth, as film, sheet and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder
from fewstep.diffusion import Rng
from fewstep.inference.model import open_model

TOY = str(fewstep.TOY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step student of four pairs, trained for 4 iterations with a preview every 2."""
    root = tmp_path_factory.mktemp("previews")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUT_ROOT", str(root))
        assert main(["prepare", "toyworld", "--out", str(root / "world"), "--num", "4", "--seed", "3", "--workers", "1"]) == 0
        words = ("--steps", "2", "--max-tokens", "40", "--mask-text", "--quality", "lossless")
        assert main(["pairs", TOY, str(root / "world"), "--out", str(root / "pairs"), *words]) == 0
        settings = ("trainer.max_iter=4", "trainer.batch_size=4", "checkpoint.save_iter=2", "trainer.log_every=2")
        shown = ("preview.num=2", "preview.every=2", "preview.max_share=1", "optim.warmup_iters=1")
        best = ("checkpoint.best_metric=preview/truth_mse", "checkpoint.keep_last=1")
        assert main(["train", "experiment=toy_kd_1step", *settings, *shown, *best]) == 0
    return root / "toyworld" / "basic" / "toy_kd_1step"


def test_each_preview_is_a_film_a_sheet_and_numbers_that_are_those_of_the_student(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "preview/truth_mse" in row] == [0, 2, 4]
    for step in (0, 2, 4):
        film = video.read(run / "previews" / f"step_{step:09d}.mp4")
        assert film.frames.shape == (17, 2 * 66 + 14, 2 * 66, 3) and film.fps == 16  # 2 rows of 64, names above, 2 columns
        assert cv2.imread(str(run / "previews" / f"step_{step:09d}.png")).shape == (2 * 66 + 14, 2 * (3 * 64 + 2), 3)
    # the student's error at the end, from its checkpoint, without any code of the preview
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUT_ROOT", str(run.parents[2]))
        model = open_model(f"{run}@latest:student.ema")
    batch = (
        Folder(str(run.parents[2] / "pairs"), x0="latents", max_tokens=40, mask_text=True, pairs=("noise",))
        .open()
        .batch(torch.arange(2))
    )
    assert batch.noise is not None and batch.x0 is not None
    with torch.no_grad():
        latents = model.sampler(model.network, batch.noise, batch.cond, Rng(0, 0, torch.arange(2)))
    wanted = float((latents - batch.x0.float()).square().mean())
    assert rows[-1]["preview/truth_mse"] == pytest.approx(wanted, rel=1e-4)
    assert rows[-1]["preview/truth_mse"] < rows[0]["preview/truth_mse"]


def test_the_truth_beside_the_student_is_the_pair_s_own_clip(run: Path) -> None:
    film = video.read(run / "previews" / "step_000000004.mp4").frames
    clip = video.read(sorted((run.parents[2] / "pairs" / "videos").iterdir())[0]).frames.repeat(2, axis=1).repeat(2, axis=2)
    shown = film[:, 16:80, 68:132]  # below the names and two rows of the border; right of the student
    other = film[:, 82:146, 68:132].astype(int)  # of the other sample
    own_error, other_error = np.abs(shown.astype(int) - clip).mean(), np.abs(other - clip).mean()
    assert own_error < 4 and other_error > 2 * own_error  # an mp4 with halved chroma


def test_the_best_checkpoint_stays_and_has_an_address(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["preview/truth_mse"] for row in rows if row["step"] in (2, 4)}
    best = min(values, key=lambda step: values[step])
    assert (run / "checkpoints" / "best_checkpoint.txt").read_text() == f"iter_{best:09d}"
    monkeypatch.setenv("OUTPUT_ROOT", str(run.parents[2]))
    assert open_model(f"{run}@best:student.ema").network is not None
