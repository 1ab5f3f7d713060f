"""Files that once ran a program: a checkpoint, a picture, a file of specifications, models, pickles. The command is real."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.data.safe_pickle import UnsafePickle, loads
from fewstep.errors import UserError
from fewstep.untrusted.torch_files import load_torch

TINY = (
    "experiment=analytic_kd job.project=p job.group=g job.name=run trainer.batch_size=8 data.num=16 checkpoint.save_iter=2 "
    "optim.warmup_iters=1 preview=none"
)


def fewstep(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUTPUT_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fewstep", *words]
    return subprocess.run(command, cwd=folder, env=environment, input="y\n", capture_output=True, text=True, timeout=600)


def refused(done: subprocess.CompletedProcess[str], status: int, folder: Path) -> str:
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert not (folder / "ran").exists()
    return done.stderr


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.slow
def test_resuming_a_run_does_not_execute_its_checkpoint(tmp_path: Path) -> None:
    assert fewstep(["train", *TINY.split(), "trainer.max_iter=2"], tmp_path).returncode == 0
    table = tmp_path / "p/g/run/checkpoints/iter_000000002/.metadata"
    table.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    said = refused(fewstep(["train", *TINY.split(), "trainer.max_iter=4"], tmp_path), 1, tmp_path)
    assert "asks for 'posix.system'" in said
    for words in (
        ["export", f"{tmp_path}/p/g/run", "--out", "x"],
        ["generate", f"{tmp_path}/p/g/run", "--prompt", "x", "--out", "y"],
    ):
        refused(fewstep(words, tmp_path), 1, tmp_path)


@pytest.mark.slow
def test_a_picture_that_is_a_program_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/metas").mkdir()
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {tmp_path}/ran) (w) file\nshowpage\n"
    (tmp_path / "set/images/a.png").write_text(program)
    (tmp_path / "set/metas/a.txt").write_text("a picture")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin/gs").chmod(0o755)
    os.environ["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert "cannot be opened" in fewstep(["check", "data", "set"], tmp_path).stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config", "out", "guardrail", "disable_guardrail", "output_dir"])
def test_a_file_of_specifications_names_no_program_and_no_place(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "spec.json").write_text(json.dumps({"prompt": "a ball", name: str(tmp_path / "evil.py")}))
    assert main(["generate", "model", "-i", "spec.json"]) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_model_with_code_of_its_own_runs_none_whatever_is_answered(tmp_path: Path) -> None:
    """transformers asks on standard input whether to run it, if it is not told."""
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: ...\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForDepthEstimation": "evil.Evil"}
    (tmp_path / "depth/config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    from fewstep.data.files import video

    video.write(tmp_path / "set/videos/a.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8)
    words = ["prepare", "controls", "set", "--type", "depth", "--model", "depth"]
    refused(fewstep(words, tmp_path), 1, tmp_path)


def colliding(num: int) -> dict[int, None]:
    return {k * (2**61 - 1): None for k in range(1, num)}


def test_keys_with_one_hash_are_refused_at_once(tmp_path: Path) -> None:
    """As a pickle, and as weights: Python compares each with all before it, 22 s for 640 kB."""
    with pytest.raises(UnsafePickle, match="many keys with the same hash"):
        loads(pickle.dumps(colliding(200)))
    with pytest.raises(UnsafePickle, match="many keys with the same hash"):
        loads(pickle.dumps({(key, "a"): None for key in colliding(200)}))
    torch.save({"a": torch.zeros(2), "b": colliding(200)}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="many keys with the same hash"):
        load_torch(tmp_path / "a.pt")
    assert loads(pickle.dumps(colliding(20))) == colliding(20)


def test_compressed_weights_are_refused(tmp_path: Path) -> None:
    """18 MB of a deflated .pth were 4.4 GiB of memory."""
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as whole, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert (tmp_path / "b.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed"):
        load_torch(tmp_path / "b.pth")
    assert torch.equal(load_torch(tmp_path / "a.pth")["a"], torch.zeros(2**20))


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_state_of_a_module_is_read_as_it_was_saved(is_zip: bool, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    loaded = load_torch(tmp_path / "a.pt")
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
