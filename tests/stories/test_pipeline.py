"""`fewstep pipeline`: FastGen's stages one by one as train_cosmos_sf.sh has them, and all at once; killed at each and rerun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines
from test_distill import descendants

pytestmark = pytest.mark.slow
PROMPTS = "a red square moves to the left\na blue dot moves to the right\na green square moves up\na red dot moves\n"
COMMON = ("--teacher", "teacher", "--out", "student", "--chunk", "1", "--span", "3", "--num-eval", "4")
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


def words(family: str) -> list[str]:
    trainings = [f"{name}.{word}" for name in ("kd", "sf") for word in SHORT]
    return [ROADS[family], *COMMON, "--prompts", "prompts.txt", *PAIRS, *trainings, *HEAD[family]]


def begun(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fewstep", "pipeline", *command],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def done(folder: Path, *command: str) -> str:
    process = begun(folder, *command)
    text, _ = process.communicate()
    assert process.returncode == 0, text[-5000:]
    return text


def world(folder: Path, family: str) -> Path:
    tiny_pipelines.PIPELINES[family](folder / "teacher")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([t.float().reshape(-1) for _, t in sorted(load_file(folder / "student" / "student.safetensors").items())])


@pytest.mark.parametrize("family", ROADS)
def test_stage_by_stage_and_all_at_once_it_is_the_same_student(family: str, tmp_path: Path) -> None:
    whole, parts = (world(tmp_path / name, family) for name in ("whole", "parts"))
    text = done(whole, *words(family))
    assert "that of kd" in text and (whole / "student.work" / "report.html").stat().st_size > 50_000
    for stage in ("pairs", "kd", "bridge", "sf", "export"):  # train_cosmos_sf.sh 1, 2, bridge, 3
        assert f"--- {stage}:" in done(parts, *words(family), "--only", stage)
    assert torch.equal(weights(whole), weights(parts))
    card = json.loads((whole / "student" / "student.json").read_text())
    assert card["network"]["kind"] == "causal" and card["network"]["span"] == 3
    assert done(whole, *words(family)).count("done earlier") == 8


def test_killed_in_each_stage_and_rerun_it_ends_with_the_same_student(tmp_path: Path) -> None:
    whole, broken = (world(tmp_path / name, "predict25") for name in ("whole", "broken"))
    done(whole, *words("predict25"))
    seconds = {
        path.stem: json.loads(path.read_text())["seconds"] for path in (whole / "student.work" / "stages").glob("*.json")
    }
    for stage in ("pairs", "kd", "kd_scores", "bridge", "sf", "sf_scores", "export"):
        process = begun(broken, *words("predict25"))
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"--- {stage}:"):
                break
        time.sleep(0.7 * seconds[stage])
        for pid in reversed([process.pid, *descendants(process.pid)]):  # as when the power fails
            os.kill(pid, signal.SIGKILL) if Path(f"/proc/{pid}").exists() else None
        process.communicate()
    done(broken, *words("predict25"))
    assert torch.equal(weights(whole), weights(broken))


def test_the_chain_without_pairs(tmp_path: Path) -> None:
    tiny_pipelines.wan(tmp_path / "teacher")
    tiny_pipelines.clips(tmp_path / "clips", num=4, frames=9)
    trainings = [f"{name}.{word}" for name in ("tf", "cd", "sf") for word in SHORT]
    text = done(tmp_path, "causal_consistency", *COMMON, "--dataset", "clips", *trainings, "text.negative-prompt=")
    assert "that of cd" in text
    assert json.loads((tmp_path / "student" / "student.json").read_text())["network"]["kind"] == "causal"
