"""The texts of `fewstep launch`: accepted by bash and by SkyPilot's schema, and their torchrun line run on two local nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.cli import main
from fewstep.config import ConfigError
from fewstep.training.launch import Nodes, split_words

# Of sky/utils/schemas.py in SkyPilot 0.14.1: get_task_schema and get_resources_schema, as far as we write them.
TASK = {"name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict, "setup": str, "run": str}
RESOURCES = {"accelerators": str, "use_spot": bool}
RUN = ("experiment=analytic_finetune", "trainer.max_iter=4", "optim.warmup_iters=0")


def text_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *RUN, *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def bash_accepts(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_words_of_the_machines() -> None:
    assert split_words(["nodes=1:4", "a.b=c", "gpus=8", "gpu=H100"]) == (["a.b=c"], Nodes(1, 4, 8, "H100"))
    for word, message in (("nodes=0", "nodes: is a number"), ("nodes=4:1", "or a range"), ("gpus=x", "gpus: is a number")):
        with pytest.raises(ConfigError, match=message):
            split_words([word])


@pytest.mark.parametrize("nodes", ["nodes=2", "nodes=1:4"])
def test_bash_accepts_the_script_of_slurm(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(capsys, nodes, "gpus=8", "--to", "slurm", "--option=--partition=long one")
    assert bash_accepts(text) and not bash_accepts(text.replace('"$SLURM_JOB_NODELIST"', '"$SLURM_JOB_NODELIST'))
    assert "#SBATCH --partition=long one\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    is_range = nodes == "nodes=1:4"
    assert f"#SBATCH --nodes={'1-4' if is_range else '2'}\n" in text
    assert f"torchrun --nnodes={'1:' if is_range else ''}$SLURM_NNODES --nproc_per_node=8 --max-restarts=3" in text


def test_what_skypilot_reads(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(capsys, "nodes=2", "gpus=8", "gpu=A100", "--to", "skypilot", "--option", "use_spot=true")
    task = yaml.safe_load(text)
    assert_typed(task, TASK)
    assert_typed(task["resources"], RESOURCES)
    assert task["resources"] == {"accelerators": "A100:8", "use_spot": True} and task["num_nodes"] == 2
    assert all(re.fullmatch(r"[a-zA-Z_]\w*", name) and isinstance(value, str) for name, value in task["envs"].items())
    assert bash_accepts(task["run"]) and "  torchrun" in text  # a block that a person can edit
    assert main(["launch", *RUN, "nodes=1:2", "--to", "skypilot", "--dry-run"]) == 1
    assert "fixed number of nodes" in capsys.readouterr().err


def assert_typed(data: Mapping[str, Any], types: Mapping[str, type]) -> None:
    assert {key: type(value) for key, value in data.items()} == {key: types[key] for key in data}


def test_a_run_that_cannot_start_is_refused_before_it_is_queued(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["launch", *RUN, "optim.lr=-1", "--to", "slurm", "--dry-run"]) == 2
    assert "optim.lr: is -1" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *RUN, "--to", "slurm"]) == 1
    assert "sbatch is not here" in capsys.readouterr().err


def test_the_script_is_written_and_handed_to_sbatch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\ncp "$1" "$(dirname "$0")/submitted"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "out"))
    assert main(["launch", *RUN, "--to", "slurm"]) == 0
    assert (tmp_path / "submitted").read_text() == text_of(capsys, "--to", "slurm")


@pytest.mark.slow
def test_the_torchrun_line_runs_on_two_local_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What srun starts on each node, twice on this machine, with the variables that Slurm sets."""
    words = ("parallel.device=cpu", "preview=none", "trainer.batch_size=16", "nodes=2", "gpus=1", "--to", "slurm")
    script = text_of(capsys, *words)
    begin = script.index("RENDEZVOUS_ID=")
    body = script[begin:].replace("srun --kill-on-bad-exit=1 torchrun", f"{sys.executable} -m torch.distributed.run")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTPUT_ROOT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
    }  # fmt: skip
    nodes = [
        subprocess.Popen(["bash", "-euc", body], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    try:
        output = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], output
    summary = json.loads((tmp_path / "out/analytic/basic/analytic_finetune/summary.json").read_text())
    assert summary["num_processes"] == 2 and summary["samples"] == 4 * 2 * 16
