"""Whole runs on the toy world's folder, read by workers: they learn; kills and other ranks change no sample of any batch."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.data.contract import BadSamples
from fewstep.data.folder.dataset import Folder
from fewstep.data.loader import Loader
from fewstep.data.order import samples_at
from fewstep.methods import Finetune
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read_tensors
from fewstep.toyworld.dataset import write
from fewstep.toyworld.physics import World
from fewstep.training.health import Health
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

NUM, SEED = 13, 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "set"
    write(out, NUM, SEED, World(num_frames=9))
    return out


def a_run(toy: Path, name: str, **loader: int) -> Run:
    return Run(
        job=Job(name=name),
        method=Finetune(),
        networks=Networks(student=Full(TinySpec("dit", channels=3, width=32, depth=1), init="random")),
        data=Folder(str(toy), text=None, num_frames=5, start_frame_interval=4, video_size=(4, 4), ram_gib=0.0),
        optim=Optim(lr=3e-3, warmup_iters=1),
        trainer=Trainer(max_iter=24, batch_size=4, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=24),
        health=Health(every=None),
        loader=Loader(**loader),
    )


def lines(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.job.folder() / "metrics.jsonl").read_text().splitlines()]


def test_the_written_toy_world_is_trained_on_and_workers_change_no_bit(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    runs = [a_run(toy, f"w{workers}", num_workers=workers, ahead=3) for workers in (0, 2)]
    for run in runs:
        train(run)
    losses = [[line["loss/denoising"] for line in lines(run)] for run in runs]
    assert losses[0] == losses[1]
    assert sum(losses[0][-6:]) < 0.9 * sum(losses[0][:6]), losses[0]  # it learns
    weights = [read_tensors(run.job.folder() / "checkpoints" / "iter_000000024", "student.weights.") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(0 <= line["data/wait_share"] <= 1 for run in runs for line in lines(run))


def test_a_clip_that_goes_bad_is_left_out_and_counted(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    base = a_run(toy, "bad", num_workers=2)
    read = type(base.data.open())._read  # type: ignore[attr-defined]
    begun: list[bool] = []

    def damaged(self: object, sample: object) -> object:
        if begun and sample.stem == "clip_000003":  # type: ignore[attr-defined]
            raise ValueError("videos/clip_000003.mp4: damaged near frame 3")
        return read(self, sample)  # type: ignore[arg-type]

    monkeypatch.setattr("fewstep.data.folder.dataset.FolderData._read", damaged)
    monkeypatch.setattr("fewstep.training.loop._open_batches", _after(begun, "fewstep.training.loop", "_open_batches"))
    train(replace(base, data=replace(base.data, max_bad=2)))  # two windows of one clip
    assert lines(base)[-1]["data/bad"] == 2
    said = (base.job.folder() / "log.txt").read_text()
    assert "left out of the data (2 of data.max_bad=2): videos/clip_000003.mp4: damaged near frame 3" in said
    begun.clear()
    strict = a_run(toy, "strict", num_workers=2)
    with pytest.raises((ValueError, BadSamples), match=r"clip_000003\.mp4: damaged near frame 3"):
        train(strict)


def _after(begun: list[bool], module: str, name: str) -> object:
    import importlib

    whole = getattr(importlib.import_module(module), name)

    def wrapped(*args: object) -> object:
        begun.append(True)
        return whole(*args)

    return wrapped


# ---- real processes, killed -----------------------------------------------------------------------------------------

SCRIPT = """
import json, os, time
from dataclasses import dataclass
from fewstep.config import kind, recipe
from fewstep.data.folder.dataset import Folder
from fewstep.data.loader import Loader
from fewstep.methods import Finetune
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

@kind("noted", group="method")
@dataclass(frozen=True)
class Noted(Finetune):
    def losses(self, turn, nets, batch, rng):
        told = {"step": rng.step, "rows": rng.rows.tolist(), "index": batch.index.tolist()}
        with open(os.environ["NOTES"], "a") as file:
            file.write(json.dumps(told) + "\\n")
        time.sleep(0.02)
        yield from super().losses(turn, nets, batch, rng)

@recipe("noted")
def noted():
    return Run(
        job=Job(name="noted"), method=Noted(),
        networks=Networks(student=Full(TinySpec("dit", channels=3, width=16, depth=1), init="random")),
        data=Folder("DATA", text=None, num_frames=5, start_frame_interval=4, video_size=(4, 4), ram_gib=0.0),
        optim=Optim(lr=3e-3, warmup_iters=1), trainer=Trainer(max_iter=10**9, batch_size=3, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=5), health=Health(every=None),
    )
"""


class Processes:
    """The command in processes of its own; `notes` are the samples of each batch, as the method saw them."""

    def __init__(self, home: Path, toy: Path):
        self.home, self.notes = home, home / "notes.jsonl"
        (home / "script.py").write_text(SCRIPT.replace("DATA", str(toy)))

    def start(self, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
        launch = [sys.executable, "-m"]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                launch += ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free.getsockname()[1]}", "-m"]
        words = [*launch, "fewstep.train", "--config", str(self.home / "script.py"), "experiment=noted", *overrides]
        home = {"OUTPUT_ROOT": str(self.home), "NOTES": str(self.notes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            words, env=os.environ | home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def finish(self, *overrides: str, ranks: int = 1) -> None:
        process = self.start(*overrides, ranks=ranks)
        told, _ = process.communicate(timeout=240)
        assert process.returncode == 0, told

    def read(self) -> list[dict[str, list[int]]]:
        return (
            [json.loads(line) for line in self.notes.read_text().splitlines() if line.endswith("}")]
            if self.notes.is_file()
            else []
        )


@pytest.mark.slow
def test_killed_at_ten_random_points_with_other_workers_each_time(toy: Path, tmp_path: Path) -> None:
    job, draw, last = Processes(tmp_path, toy), random.Random(7), 120
    kills = 0
    while kills < 10:
        before = len(job.read())
        process = job.start(f"trainer.max_iter={last}", f"loader.num_workers={draw.choice([0, 1, 3])}")
        wanted = before + draw.randint(3, 14)
        while process.poll() is None and len(job.read()) < wanted:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        time.sleep(draw.random() * 0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    job.finish(f"trainer.max_iter={last}")
    order = samples_at(torch.arange(3 * last), 2 * NUM, 0).tolist()
    seen: dict[int, list[int]] = {}
    for note in job.read():
        step = int(note["step"])  # type: ignore[call-overload]
        assert note["index"] == order[3 * step : 3 * step + 3], "a repeated iteration has the samples it had"
        seen[step] = note["index"]
    assert sorted(seen) == list(range(last))


@pytest.mark.slow
def test_one_two_one_ranks_of_real_processes(toy: Path, tmp_path: Path) -> None:
    job, position, found = Processes(tmp_path, toy), 0, dict[int, int]()
    for ranks, last in ((1, 11), (2, 24), (1, 40)):
        job.notes.unlink(missing_ok=True)
        job.finish(f"trainer.max_iter={last}", f"loader.num_workers={ranks}", ranks=ranks)
        first = {1: 0, 2: 11}[ranks] if last != 40 else 24
        for note in job.read():
            for row, number in zip(note["rows"], note["index"], strict=True):
                place = position + (int(note["step"]) - first) * 3 * ranks + row  # type: ignore[call-overload]
                assert place not in found
                found[place] = number
        position += (last - first) * 3 * ranks
    assert sorted(found) == list(range(position)) and position == 33 + 78 + 48
    assert [found[place] for place in range(position)] == samples_at(torch.arange(position), 2 * NUM, 0).tolist()
    for epoch in range(position // (2 * NUM)):
        assert Counter(found[p] for p in range(epoch * 2 * NUM, (epoch + 1) * 2 * NUM)) == Counter(range(2 * NUM))
