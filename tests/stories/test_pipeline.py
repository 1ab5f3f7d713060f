"""`fewstep pipeline`: FastGen's stages one by one as train_cosmos_sf.sh has them, and all at once; killed at each and rerun."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.cli import main

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines
from test_distill import descendants

pytestmark = pytest.mark.slow
PROMPTS = "a red square moves to the left\na blue dot moves to the right\na green square moves up\na red dot moves\n"
COMMON = ("--chunk", "1", "--span", "3", "--num-eval", "4")
SHORT = (
    "trainer.max_iter=4",
    "trainer.log_every=1",
    "checkpoint.save_iter=2",
    "trainer.precision=fp32",
    "trainer.batch_size=2",
)
PAIRS = ("pairs.num-frames=9", "pairs.height=32", "pairs.width=32", "pairs.steps=8")
HEAD = {"wan": ("sf.networks.head.taps=[1]", "sf.networks.head.channels=24", "sf.networks.head.hidden=16")}
HEAD["predict25"] = ("sf.networks.head.taps=[1]", "sf.networks.head.channels=24", "sf.networks.head.hidden=16")
ROADS = {"predict25": "cosmos_self_forcing", "wan": "wan_self_forcing"}


def words(folder: Path, family: str) -> list[str]:
    trainings = [f"{name}.{word}" for name in ("kd", "sf") for word in SHORT]
    own = [*COMMON, "--prompts", str(folder / "prompts.txt"), *PAIRS, *trainings, *HEAD[family]]
    return [ROADS[family], *_places(folder), *own]


def _places(folder: Path) -> list[str]:
    return ["--teacher", str(folder / "teacher"), "--out", str(folder / "student")]


def done(*command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(["pipeline", *command])
    assert status == 0, output.getvalue()[-5000:]
    return output.getvalue()


def world(folder: Path, family: str) -> Path:
    tiny_pipelines.PIPELINES[family](folder / "teacher")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.float().reshape(-1) for _, t in sorted(load_file(folder / "student" / "student.safetensors").items())])


WHOLE: dict[str, tuple[Path, str]] = {}


@pytest.fixture
def whole(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a pipeline that ran all at once, and what it said."""
    if family not in WHOLE:
        folder = world(tmp_path_factory.mktemp(family), family)
        WHOLE[family] = folder, done(*words(folder, family))
    return WHOLE[family]


@pytest.mark.parametrize("family", ROADS)
def test_stage_by_stage_and_all_at_once_it_is_the_same_student(family: str, whole: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = whole
    assert re.search(r"the student is .* kd \(", text) and (folder / "student.work" / "report.html").stat().st_size > 50_000
    parts = world(tmp_path, family)
    for stage in ("pairs", "kd", "bridge", "sf", "export"):  # train_cosmos_sf.sh 1, 2, bridge, 3
        assert f"--- {stage}:" in done(*words(parts, family), "--only", stage)
    assert torch.equal(weights(folder), weights(parts))
    card = json.loads((folder / "student" / "student.json").read_text())
    assert card["network"]["kind"] == "causal" and card["network"]["span"] == 3
    assert done(*words(folder, family)).count("done earlier") == 8


@pytest.mark.parametrize("family", ["predict25"])
def test_killed_in_each_stage_and_rerun_it_ends_with_the_same_student(
    family: str, whole: tuple[Path, str], tmp_path: Path
) -> None:
    broken, records = world(tmp_path, family), (whole[0] / "student.work" / "stages").glob("*.json")
    seconds = {path.stem: json.loads(path.read_text())["seconds"] for path in records}
    for stage in ("pairs", "kd", "kd_scores", "bridge", "sf", "sf_scores", "export"):
        command = [sys.executable, "-m", "fewstep", "pipeline", *words(broken, family)]
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"--- {stage}:"):
                break
        time.sleep(0.7 * seconds[stage])
        for pid in reversed([process.pid, *descendants(process.pid)]):  # as when the power fails
            os.kill(pid, signal.SIGKILL) if Path(f"/proc/{pid}").exists() else None
        process.communicate()
    done(*words(broken, family))
    assert torch.equal(weights(whole[0]), weights(broken))


def test_the_chain_without_pairs(tmp_path: Path) -> None:
    tiny_pipelines.wan(tmp_path / "teacher")
    clips = tiny_pipelines.clips(tmp_path / "clips", num=4, frames=9)
    trainings = [f"{name}.{word}" for name in ("tf", "cd", "sf") for word in SHORT]
    own = [*COMMON, "--dataset", str(clips), *trainings, "text.negative-prompt="]
    assert re.search(r"the student is .* cd \(", done("causal_consistency", *_places(tmp_path), *own))
    assert json.loads((tmp_path / "student" / "student.json").read_text())["network"]["kind"] == "causal"
